"""The mixing problem of an acceleration: what the ranks know together when one is due."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

from aadl import mixing
from aadl.acceptance import Candidate
from aadl.block import Tensors
from aadl.history import Column, History
from aadl.mixing import Gram
from aadl.ranks import Ranks
from aadl.spare import Spare


class MacroStep(NamedTuple):
    """A macro-step that has ended and whose pair is stored."""

    optimizer: Optimizer
    history: History
    tensors: Sequence[Tensors]
    closure: Callable[[], Any] | None
    """Given where the loss judges candidates."""
    ranks: Ranks
    """Those that decide together."""
    quorum: int
    """How many ranks must have seen a write: of whole replicas all, because what fewer saw was put back."""
    loss_weight: float
    """Weight of this rank's losses in their mean over the ranks."""
    rate: float
    """Factor of the learning rate."""
    written: bool = False
    """Whether this rank saw somebody write to the tensors within a macro-step since the last acceleration."""
    doubtful: bool = False
    """Whether this macro-step's residual may be such a write, so that no iterate is put back because of it."""
    since: int = 0
    """Number of the macro-step of the last acceleration, accepted or not."""
    spare: Spare = Spare()
    """The rest of the optimizer's state as it was before the steps after the last candidate."""


class Problem(NamedTuple):
    """What the ranks know together."""

    gram: Gram
    """Inner products in the weighted norm, at the present learning rate."""
    weights: dict[str, float]
    """Weight of each kind of vector in that norm."""
    square: float
    """||f||^2 of the newest residual in the norm of the candidate that it judges; 0 without one."""
    along: float
    """<f, s> over the parameters, with the jump s that led to the start of the newest pair; nan where the losses of the
    training have risen since."""
    jump: dict[str, float]
    """||s||^2 by kind, on this rank."""
    here: int
    """Number of the newest columns that describe the map here and now, see `columns_here` and `columns_now`."""
    is_written: bool
    """Whether somebody wrote to the tensors of at least `quorum` ranks, or moved the starts of some ranks only."""
    is_doubtful: bool
    """Whether at least `quorum` ranks doubt the newest residual."""
    is_finite: bool
    """Whether all products, and the losses since the candidate, are finite."""
    is_warm_up: bool
    """Whether the macro-step belongs to a warm-up on any rank."""
    fused: bool
    """Whether all ranks have compiled kernels (or none needs them)."""


def problem_of(step: MacroStep, accepted: Candidate | None, moves: int) -> Problem:
    """Set up the mixing problem; replicas agree upon it, so that all of them decide alike.

    Args:
        step: the macro-step that has ended.
        accepted: the candidate that its residual judges, if any.
        moves: `Judgments.moves` of this rank.
    """
    history, ranks = step.history, step.history.ranks
    warm_up = bool(history.columns) and history.columns[-1].warm_up
    own = [float(step.written), float(step.doubtful), float(moves), float(moves) ** 2, float(warm_up)]
    parts, sums = history.gram_with(own)
    scales = [step.rate / column.learning_rate for column in history.columns]
    here = columns_here(
        mixing.joined({"parameters": parts["parameters"]}, {"parameters": 1.0}, scales), history.columns
    )
    here = min(here, columns_now(history.columns))
    weights = mixing.balancing_weights({kind: mixing.newest(part, here) for kind, part in parts.items()})
    gram = mixing.joined(parts, weights, scales)
    square = sum(accepted.weights[kind] * part.square for kind, part in parts.items()) if accepted else 0.0
    along, fused = parts["parameters"].along, 1.0
    if history.replicas and not history.sums:
        # they made the same numbers; a mean over them makes sure that all decide alike
        behind = len(history.columns) - here
        others = [square, along, weights.get("momentum", 1.0), float(behind), float(history.fused)]
        message = ranks.total(mixing.packed(gram, [*others, *sums]))
        sums = message[-len(sums) :].tolist()
        columns = len(history.columns)
        gram, (square, along, weight, mean, fused, *_) = mixing.unpacked(message / ranks.size, columns)
        here = columns - math.ceil(mean)  # as on the rank that leaves out most, if they differ by one
        weights = {kind: 1.0 if kind == "parameters" else weight for kind in weights}
    written, doubts, sum_of_moves, squares_of_moves, warm_ups, rise = sums
    differ = ranks.size * squares_of_moves != sum_of_moves**2  # unless all ranks have the same number
    return Problem(
        gram,
        weights,
        square,
        math.nan if rise > 0 else along,
        {kind: part.jump for kind, part in parts.items()},
        here,
        is_written=written >= step.quorum or differ,
        is_doubtful=doubts >= step.quorum,
        is_finite=math.isfinite(gram.square + square + float(gram.matrix.sum())) and not math.isnan(rise),
        is_warm_up=warm_ups > 0,
        fused=fused == 1,  # else some rank has no compiler, and compiled kernels would round differently
    )


def columns_here(gram: Gram, columns: list[Column]) -> int:
    """Number of the newest columns that describe the region of the newest pair.

    Those before a change from outside do not, if it leads farther than all of the way before it: mixing with them would
    lead back there, or by slopes of another region. A candidate makes no such jump (`candidate.step_fraction`). Where
    an update may contain such a change, neither column with it counts.

    Args:
        gram: inner products over the parameters alone.
        columns: oldest first; the jump inside the newest one may be known to `gram` alone.
    """
    if not any(column.moved or column.written is not None for column in columns):
        return len(columns)
    lengths = list(map(math.sqrt, mixing.residual_squares(gram)))
    squares = [column.jump.get("parameters", 0.0) for column in columns]
    if columns[-1].moved and not columns[-1].jump:
        squares[-1] = gram.jump
    first, way = 0, 0.0
    for place, (column, square) in enumerate(zip(columns, squares, strict=True)):
        jump, written = math.sqrt(square), column.written
        if place >= first:
            way += lengths[place]
        if written is not None and max(written, lengths[place + 1]) > way:
            first = place + 2
        if not column.moved:
            way += jump
        elif jump > way:
            first = max(first, place + 1)
    return max(0, len(columns) - first)


def columns_now(columns: list[Column]) -> int:
    """Number of the newest columns since a warm-up: the older update of the oldest one may be the last of it.

    Over several steps an update is not proportional to the learning rate. In a warm-up that sets the slopes, so that
    candidates would go far astray.
    """
    return next((age for age, column in enumerate(reversed(columns)) if column.warm_up), len(columns))


def leads_far(gram: Gram, newest: int) -> bool:
    """Whether an update of the newest columns, which may contain a change from outside, exceeds the way before them."""
    lengths = list(map(math.sqrt, mixing.residual_squares(gram)))
    return newest > 0 and max(lengths[-newest:]) > sum(lengths[:-newest])
