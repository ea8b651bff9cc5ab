"""The residual of an equation at points of this rank: what is prepared once, and what a network makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.models.mlp import MLP, Derivatives
from experiments.pinn.equation import Equation, compose
from experiments.pinn.settings import PinnConfig

Lift = tuple[Derivatives, Derivatives]
"""a and b of hard conditions, u = a + b N."""


class Points(NamedTuple):
    """Collocation points of this rank, (rows, num_space + 1), and what the equation says of them alone.

    Attributes:
        interior: points where the residual is asked for.
        source: (rows, 1), at the interior points.
        lift: at the interior points; None with soft conditions.
        conditions: points of the initial and boundary conditions.
        values: (rows, 1), of the solution there.
        condition_lift: the lift there.
        num_interior, num_conditions: points of all ranks.
    """

    interior: Tensor
    source: Tensor
    lift: Lift | None
    conditions: Tensor
    values: Tensor
    condition_lift: Lift | None
    num_interior: int
    num_conditions: int


def prepared(
    equation: Equation, config: PinnConfig, device: torch.device, interior: Tensor, conditions: Tensor, values: Tensor
) -> Points:
    """Points on the device, with what the equation says of them: computed in float64, rounded to the dtype."""
    dtype = getattr(torch, config.dtype)
    interior, conditions = interior.to(device), conditions.to(device)
    return Points(
        interior=interior.to(dtype),
        source=equation.source(interior).to(dtype),
        lift=lift_at(equation, config, interior),
        conditions=conditions.to(dtype),
        values=values.to(device, dtype),
        condition_lift=lift_at(equation, config, conditions),
        num_interior=len(interior),
        num_conditions=len(conditions),
    )


def lift_at(equation: Equation, config: PinnConfig, points: Tensor) -> Lift | None:
    """The lift of hard conditions, in the dtype of the network; None with soft conditions."""
    if config.conditions == "soft":
        return None
    lift = equation.lift(points)
    assert lift is not None  # checked with the configuration
    return _each(lift, lambda part: part.to(getattr(torch, config.dtype)))


def _each(lift: Lift, function: Callable[[Tensor], Tensor]) -> Lift:
    a, b = (Derivatives(*map(function, part)) for part in lift)
    return a, b


def residual_of(equation: Equation, u: Derivatives, points: Points, rows: slice) -> Tensor:
    """The residual (rows, 1) of the network whose derivatives at some of the points are `u`."""
    return equation.residual(points.interior[rows], _composed(u, points, rows), points.source[rows])


def residual_at(equation: Equation, network: nn.Module, points: Points, chunk: int | None) -> Tensor:
    """The residual (N, 1) at all interior points."""
    parts = [points.interior[:0, :1]]
    for rows, u in derivatives_at(network, points, chunk, equation.uses_gradient_square):
        parts.append(equation.residual(points.interior[rows], u, points.source[rows]))
    return torch.cat(parts)


def derivatives_at(
    network: nn.Module, points: Points, chunk: int | None, gradient_square: bool
) -> Iterator[tuple[slice, Derivatives]]:
    """Slices of the interior points, and the derivatives of the solution there."""
    assert isinstance(network, MLP)
    for rows, u in network.chunked_derivatives(points.interior, chunk, gradient_square=gradient_square):
        yield rows, _composed(u, points, rows)


def _composed(u: Derivatives, points: Points, rows: slice) -> Derivatives:
    """Derivatives of a + b N at some of the points, given those of the network N."""
    if points.lift is None:
        return u
    return compose(*_each(points.lift, lambda part: part[rows]), u, num_space=points.interior.shape[1] - 1)


def lifted(value: Tensor, lift: Lift | None) -> Tensor:
    return value if lift is None else lift[0].value + lift[1].value * value
