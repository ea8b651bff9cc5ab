"""Physics-informed networks: what an equation provides."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.models.mlp import Derivatives

Predictor = Callable[[Tensor], Tensor]
REQUIRED = ("sample", "conditions", "residual")  # of a subclass of Equation, beside num_space and label


class Equation:
    """A partial differential equation with its points, conditions and, where known, its solution.

    A subclass says at least `num_space`, `label`, `sample`, `conditions` and `residual`, and `exact` together with
    `test_points` where the solution is known; its constructor takes the options of `problem.options`. Points are
    (N, num_space + 1): the spatial columns, then time. All methods work in the dtype and on the device of what they
    get; values are (N, 1). "uniform" are points of the unit cube.
    """

    num_space: int
    label: str  # for titles
    degenerate: str = ""  # why results on this equation mean little, shown in every output; empty: they do not
    uses_gradient_square: bool = False  # whether `residual` reads u.gradient_square

    def sample(self, uniform: Tensor) -> Tensor:
        """Interior points of the law of the equation, (N, num_space + 1), from uniform ones of the same shape."""
        raise NotImplementedError

    def conditions(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Points of initial and boundary conditions, or labelled points, and the values of the solution there."""
        raise NotImplementedError

    def residual(self, points: Tensor, u: Derivatives, source: Tensor) -> Tensor:
        """Left side minus right side of the equation for the function whose derivatives at the points are `u`."""
        raise NotImplementedError

    def source(self, points: Tensor) -> Tensor:
        """The part of the right side that depends on the points alone; computed once for each set of points."""
        return torch.zeros_like(points[:, :1])

    def lift(self, points: Tensor) -> tuple[Derivatives, Derivatives] | None:
        """Derivatives of a and b, where u = a + b N meets the conditions for every network N; None: not offered.

        With several spatial columns b may depend on time only (see `compose`).
        """
        return None

    def exact(self, points: Tensor) -> Tensor:
        """The solution."""
        raise NotImplementedError

    def test_points(self) -> dict[str, Tensor]:
        """Sets of points where errors are measured, float64, by name; the first is the main one."""
        raise NotImplementedError

    def reference(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The sets of `test_points` with the solution there, (points, values) by name."""
        return {name: (points, self.exact(points)) for name, points in self.test_points().items()}

    def predictors(self) -> dict[str, Predictor]:
        """Trivial rivals, by name: functions of points that any useful network must beat."""
        return {"zero": lambda points: torch.zeros_like(points[:, :1])}

    def grid(self) -> tuple[Tensor, Tensor] | None:
        """Coordinates x (nx) and t (nt) of the fields that are drawn, with one space dimension; None: none."""
        return None


def compose(a: Derivatives, b: Derivatives, network: Derivatives, num_space: int) -> Derivatives:
    """Derivatives of u = a + b N by the product rule.

    Lap u = Lap a + N Lap b + 2 grad b . grad N + b Lap N. The five derivatives hold grad b . grad N only for one
    spatial column (b_x N_x), or where b depends on time alone (0); `load_equation` checks this. For several columns
    |grad u|^2 would need grad a . grad N and is NaN.
    """
    gradient_sum = a.gradient_sum + b.gradient_sum * network.value + b.value * network.gradient_sum
    return Derivatives(
        value=a.value + b.value * network.value,
        time=a.time + b.time * network.value + b.value * network.time,
        gradient_sum=gradient_sum,
        laplacian=a.laplacian
        + b.laplacian * network.value
        + 2 * b.gradient_sum * network.gradient_sum
        + b.value * network.laplacian,
        gradient_square=gradient_sum.square() if num_space == 1 else torch.full_like(network.value, torch.nan),
    )


def load_equation(name: str, options: Mapping[str, Any], folder: str | Path) -> Equation:
    """The equation that a configuration asks for.

    Args:
        name: a key of `experiments.burgers.EQUATIONS`, or the path of a Python file that defines exactly one subclass
            of `Equation`; a relative path starts at `folder`.
        options: keyword arguments of its constructor.
        folder: where the configuration's file is.

    Raises:
        ValueError: no such equation, a file that does not define one, or options that it does not take; one sentence.
    """
    from experiments.burgers import EQUATIONS  # imports this module

    if name.endswith(".py"):
        chosen = _equation_in(Path(folder) / name)
    elif name in EQUATIONS:
        chosen = EQUATIONS[name]
    else:
        raise ValueError(f"equation must be one of {', '.join(EQUATIONS)}, or the path of a .py file, got {name!r}")
    parameters = inspect.signature(chosen).parameters
    valid = f"{chosen.__name__} takes {', '.join(parameters) or 'none'}"
    for option in options:
        if option not in parameters:
            raise ValueError(f"unknown option {option!r} of the equation; {valid}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"the option {option!r} of the equation is missing; {valid}")
    required = REQUIRED if chosen.exact is Equation.exact else (*REQUIRED, "test_points")
    for method in required:
        if getattr(chosen, method) is getattr(Equation, method):
            raise ValueError(f"equation {chosen.__name__} does not define {method}")
    equation = chosen(**options)
    for attribute in ("num_space", "label"):
        if not hasattr(equation, attribute):
            raise ValueError(f"equation {chosen.__name__} does not set {attribute}")
    _check(equation)
    return equation


def _equation_in(path: Path) -> type[Equation]:
    """The one subclass of `Equation` that the file defines."""
    if not path.is_file():
        raise ValueError(f"equation: {path} is not a file")
    name = "equation_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"equation: {path} cannot be imported: {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Equation) and value.__module__ == name
    ]
    if len(found) != 1:
        names = ", ".join(value.__name__ for value in found) or "none"
        raise ValueError(f"equation: {path} must define exactly one subclass of Equation, it defines {names}")
    return found[0]


def _check(equation: Equation) -> None:
    """Shapes on three points, and what `compose` assumes, so that a mistake is named before training."""
    name, columns = type(equation).__name__, equation.num_space + 1
    uniform = 0.25 + 0.5 * torch.rand(3, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = equation.sample(uniform)
    condition_points, values = equation.conditions(uniform)
    u = Derivatives(*torch.ones(5, 3, 1, dtype=torch.float64))
    source = equation.source(points)
    residual = equation.residual(points, u, source)
    for method, found, shape in (
        ("sample", points, (3, columns)),
        ("points of conditions", condition_points, (len(condition_points), columns)),
        ("values of conditions", values, (len(condition_points), 1)),
        ("source", source, (3, 1)),
        ("residual", residual, (3, 1)),
    ):
        if tuple(found.shape) != shape:
            raise ValueError(f"equation {name}: the {method} must have shape {shape}, got {tuple(found.shape)}")
    if (lift := equation.lift(points)) is None or equation.num_space == 1:
        return
    if equation.uses_gradient_square or bool(lift[1].gradient_square.any()):
        raise ValueError(
            f"equation {name}: with {equation.num_space} spatial columns a lift needs a factor b that depends on time "
            "only, and a residual without gradient_square"
        )
