"""How close a network is to the solution: errors on test sets, and fields on a grid."""

from __future__ import annotations

import contextlib
import json
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from experiments.pinn.equation import Equation
from experiments.pinn.equations import load_equation
from experiments.pinn.residual import Lift, lift_at, lifted, prepared, residual_at
from experiments.pinn.settings import PinnConfig
from experiments.training.problem import Field

TEST_CHUNK = 8192
"""Points of test sets and fields at which the network is evaluated at a time."""
BLOCK_ELEMENTS = 2**22
"""Coordinates of the points at which the solution is evaluated at a time: 32 MB."""


class ReferenceSet(NamedTuple):
    """A set of test points, the lift there (None with soft conditions), and the exact values in float64."""

    points: Tensor
    lift: Lift | None
    exact: Tensor


def reference_sets(equation: Equation, settings: PinnConfig, device: torch.device) -> dict[str, ReferenceSet]:
    """The test sets of the equation, on the device; {} where its solution is not known."""
    dtype, sets = getattr(torch, settings.dtype), {}
    for name, (points, exact) in _reference_of(settings)[0].items():
        own = points.to(device)
        sets[name] = ReferenceSet(own.to(dtype), lift_at(equation, settings, own), exact.to(device))
    return sets


def predictor_errors(settings: PinnConfig) -> dict[str, dict[str, float]]:
    """Relative L2 errors of the trivial predictors, by test set and predictor."""
    return _reference_of(settings)[1]


def _reference_of(settings: PinnConfig) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, float]]]:
    return _reference(settings.equation, json.dumps(settings.options, sort_keys=True), settings.folder)


@lru_cache(maxsize=4)
def _reference(
    name: str, options: str, folder: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, float]]]:
    """Test sets with their solutions, and the errors of the predictors; cached: all runs of a process share them."""
    equation = load_equation(name, json.loads(options), folder)
    reference = solutions(equation)
    predictors: dict[str, dict[str, float]] = {}
    for key, (points, exact) in reference.items():
        norm = float(torch.linalg.vector_norm(exact))
        predictors[key] = {
            rival: float(torch.linalg.vector_norm(predict(points) - exact)) / norm if norm > 0 else math.nan
            for rival, predict in equation.predictors().items()
        }
    return reference, predictors


def solutions(equation: Equation) -> dict[str, tuple[Tensor, Tensor]]:
    """The test sets with the exact solution there, (points, values) by name; {} where it is not known."""
    rows = max(1, BLOCK_ELEMENTS // (equation.num_space + 1))
    try:
        return {
            name: (points, torch.cat([equation.exact(block) for block in points.split(rows)]))
            for name, points in equation.test_points().items()
        }
    except NotImplementedError:
        return {}


def _values(network: nn.Module, points: Tensor, lift: Lift | None) -> Tensor:
    parts = [network(part) for part in points.split(TEST_CHUNK)]
    return lifted(torch.cat(parts), lift).double()


def errors_on(network: nn.Module, test: ReferenceSet) -> dict[str, float]:
    """||u - exact|| / ||exact||, mean and maximum of |u - exact|."""
    error = _values(network, test.points, test.lift) - test.exact
    return {
        "relative_l2": float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(test.exact)),
        "mean_absolute_error": float(error.abs().mean()),
        "max_error": float(error.abs().max()),
    }


def fields_of(network: nn.Module, equation: Equation, config: PinnConfig, collocation: Tensor) -> dict[str, Field]:
    """Solution, exact solution and residual on the equation's grid, and the last interior points; {} without a grid."""
    grid = equation.grid()
    if grid is None:
        return {}
    x, t = (axis.double() for axis in grid)
    shape = (len(x), len(t))
    whole = torch.cartesian_prod(x, t)
    points = prepared(equation, config, next(network.parameters()).device, whole, whole[:0], whole[:0, :1])

    def on_grid(values: Tensor, long_name: str) -> Field:
        return Field(("x", "t"), values.double().reshape(shape).cpu().numpy(), "1", long_name)

    fields = {
        "x": Field(("x",), x.numpy(), "1", "space"),
        "t": Field(("t",), t.numpy(), "1", "time"),
        "u": on_grid(_values(network, points.interior, points.lift), "solution of the network"),
        "pde_residual": on_grid(
            residual_at(equation, network, points, config.chunk_points),
            "left side minus right side of the equation",
        ),
        "point": Field(("point",), np.arange(len(collocation)), "1", "number of the collocation point"),
        "collocation_x": Field(("point",), collocation[:, 0].numpy(), "1", "space coordinate of the interior points"),
        "collocation_t": Field(("point",), collocation[:, 1].numpy(), "1", "time coordinate of the interior points"),
    }
    with contextlib.suppress(NotImplementedError):  # a solution that is not known
        fields["exact"] = on_grid(equation.exact(whole), "exact solution")
    return fields
