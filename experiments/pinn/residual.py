"""The residual of an equation at points of this rank: what is prepared once, and what a network makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.models.mlp import MLP, Derivatives, chunks
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
        num_interior: interior points of all ranks.
        num_conditions: condition points of all ranks.
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
    dtype, is_hard = getattr(torch, config.dtype), config.conditions == "hard"
    interior, conditions = interior.to(device), conditions.to(device)
    return Points(
        interior=interior.to(dtype),
        source=equation.source(interior).to(dtype),
        lift=cast(equation.lift(interior), dtype) if is_hard else None,
        conditions=conditions.to(dtype),
        values=values.to(device, dtype),
        condition_lift=cast(equation.lift(conditions), dtype) if is_hard else None,
        num_interior=len(interior),
        num_conditions=len(conditions),
    )


def residual_of(equation: Equation, u: Derivatives, points: Points, rows: slice) -> Tensor:
    """The residual (rows, 1) of the network whose derivatives at some of the points are `u`."""
    u = composed(u, points.lift, rows, equation.num_space)
    return equation.residual(points.interior[rows], u, points.source[rows])


def residual_at(equation: Equation, network: nn.Module, points: Points, chunk: int | None) -> Tensor:
    """The residual (N, 1) at all interior points."""
    parts = [
        equation.residual(points.interior[rows], u, points.source[rows])
        for rows, u in derivatives_at(network, points, equation.num_space, chunk, equation.uses_gradient_square)
    ]
    return torch.cat(parts) if parts else points.interior[:, :1]


def derivatives_at(
    network: nn.Module, points: Points, num_space: int, chunk: int | None, gradient_square: bool
) -> Iterator[tuple[slice, Derivatives]]:
    """Slices of the interior points, and the derivatives of the solution there."""
    assert isinstance(network, MLP)
    directions = network.directions() if num_space > 1 else None
    for rows in chunks(len(points.interior), chunk or network.default_chunk(gradient_square)):
        u = network.derivatives(points.interior[rows], directions, gradient_square=gradient_square)
        yield rows, composed(u, points.lift, rows, num_space)


def composed(u: Derivatives, lift: Lift | None, rows: slice, num_space: int) -> Derivatives:
    """Derivatives of a + b N at some of the points, given those of the network N."""
    own = rows_of(lift, rows)
    return u if own is None else compose(*own, u, num_space)


def lifted(value: Tensor, lift: Lift | None) -> Tensor:
    """a + b N."""
    return value if lift is None else lift[0].value + lift[1].value * value


def rows_of(lift: Lift | None, rows: slice) -> Lift | None:
    """The lift at some of the points."""
    if lift is None:
        return None
    a, b = lift
    return Derivatives(*(each[rows] for each in a)), Derivatives(*(each[rows] for each in b))


def cast(lift: Lift | None, dtype: torch.dtype) -> Lift:
    """The lift of hard conditions, in the dtype of the network."""
    assert lift is not None  # checked with the configuration
    a, b = lift
    return Derivatives(*(each.to(dtype) for each in a)), Derivatives(*(each.to(dtype) for each in b))
