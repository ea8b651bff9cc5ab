"""Physics-informed networks: what an equation provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.models.mlp import Derivatives

Predictor = Callable[[Tensor], Tensor]


class Equation(ABC):
    """A partial differential equation with its points, conditions and, where known, its solution.

    A subclass sets `num_space` and `label` and defines the abstract methods, and `exact` together with `test_points`
    where the solution is known; its constructor takes the options of `problem.options`. Points are
    (N, num_space + 1): the spatial columns, then time. All methods work in the dtype and on the device of what they
    get; values are (N, 1). "uniform" are points of the unit cube.
    """

    num_space: int
    label: str  # for titles
    degenerate: str = ""  # why results on this equation mean little, shown in every output; empty: they do not
    uses_gradient_square: bool = False  # whether `residual` reads u.gradient_square

    @abstractmethod
    def sample(self, uniform: Tensor) -> Tensor:
        """Interior points of the law of the equation, (N, num_space + 1), from uniform ones of the same shape."""

    @abstractmethod
    def conditions(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Points of initial and boundary conditions, or labelled points, and the values of the solution there."""

    @abstractmethod
    def residual(self, points: Tensor, u: Derivatives, source: Tensor) -> Tensor:
        """Left side minus right side of the equation for the function whose derivatives at the points are `u`."""

    def source(self, points: Tensor) -> Tensor:
        """The part of the right side that depends on the points alone; computed once for each set of points."""
        return torch.zeros_like(points[:, :1])

    def lift(self, points: Tensor) -> tuple[Derivatives, Derivatives] | None:
        """Derivatives of a and b, where u = a + b N meets the conditions for every network N; None: not offered.

        With several spatial columns b may depend on time only (see `compose`).
        """
        return None

    def exact(self, points: Tensor) -> Tensor:
        """The solution; not to be defined where it is not known."""
        raise NotImplementedError

    def test_points(self) -> dict[str, Tensor]:
        """Sets of points where errors are measured, float64, by name; the first is the main one. Goes with `exact`."""
        raise NotImplementedError

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
