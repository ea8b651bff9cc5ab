"""The losses of a training, as its own backward passes begin at them: what they say of the last candidate.

Nothing is evaluated for it. Without a closure these losses are all that is seen of a candidate that leads where
gradients look like those before: behind the boundary of a logarithm, or onto a plateau.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.parameters import all_parameters, maximizes
from aadl.passes import MOST, Number, Passes, joined

WINDOW = 10
"""Steps before a candidate with whose losses those after it are compared."""
FEWEST = 4
"""Steps after a candidate whose losses are compared."""
LAST = 2
"""Last steps after a candidate whose losses tell that it is not finite there."""
ROUNDING = 1e-5
"""Part of a loss by which it may rise because of rounding."""


@dataclass
class Losses:
    """The losses of one training.

    Args:
        recent: those of the last WINDOW steps, without those after candidates that were taken back.
        since: those of the steps since the last acceleration.
        plain: the recent ones at that time.
        bound: what the losses since then must exceed to have risen; inf where they cannot.
        sign: 1 where the training minimizes its loss, -1 where it maximizes it, 0 where a rise says nothing.
        reverted: how often a candidate has been taken back.
        num_before: number of those before the last acceleration, without those after candidates that were taken back.
        not_finite: number of those that were not finite among them.
        passes: the backward passes that the next step goes back to.
    """

    recent: list[Number] = field(default_factory=list)
    since: list[Number] = field(default_factory=list)
    plain: list[Number] = field(default_factory=list)
    bound: Number = math.inf
    sign: int = 0
    reverted: int = 0
    num_before: int = 0
    not_finite: Number = 0.0
    passes: Passes = field(default_factory=Passes)

    @classmethod
    def of(cls, optimizer: Optimizer, saved: dict[str, Any]) -> Losses:
        """The losses of the training with this optimizer, as they were when `state` was called; {} for none yet."""
        losses, parameters = cls.from_state(saved), all_parameters(optimizer)
        passes = losses.passes
        passes.sample = [parameters[place] for place in passes.places if place < len(parameters)]
        if not passes.sample:
            passes.choose(parameters)
        return losses

    @classmethod
    def from_state(cls, saved: dict[str, Any]) -> Losses:
        """Those of any training; raises TypeError for a state with unknown entries."""
        names = {entry.name for entry in fields(Passes)}
        passes = Passes(**{name: value for name, value in saved.items() if name in names})
        return cls(passes=passes, **{name: value for name, value in saved.items() if name not in names})

    def end_step(self, skipped: bool, reverted: int) -> bool:
        """Take over the loss of a step.

        Args:
            skipped: whether it was skipped.
            reverted: how often a candidate has been taken back so far.

        Returns:
            Whether no step is expected any more, see `Passes.end_step`.
        """
        self._forget_reverted(reverted)
        loss, is_stuck = self.passes.end_step(skipped)
        if loss is not None:
            self.recent = [*self.recent, loss][-WINDOW:]
            self.since.append(loss)
            del self.since[:-MOST]
        return is_stuck

    def _forget_reverted(self, reverted: int) -> None:
        """Forget the losses after a candidate that was taken back: the next one may lead to where they are as high."""
        if reverted != self.reverted:
            self.recent, self.since, self.reverted = self.plain, [], reverted

    def begin_trial(self, optimizer: Optimizer, judged: bool, reverted: int) -> None:
        """Note that a candidate may have been accepted.

        The losses have risen where each lies above the highest recent one, by more than these differ among each other:
        losses that rise all the time rise less.

        Args:
            optimizer: of the training.
            judged: whether a closure has judged the candidate.
            reverted: how often a candidate has been taken back so far.
        """
        self._forget_reverted(reverted)
        upward = None if judged else maximizes(optimizer)
        sign = 0 if upward is None else -1 if upward else 1
        if self.since:
            self.not_finite = joined(self.since).isfinite().logical_not().sum() + self.not_finite
            self.num_before += len(self.since)
        self.since, self.plain, self.bound, self.sign = [], self.recent, math.inf, sign
        if sign and len(self.recent) == WINDOW:
            values = sign * joined(self.recent)
            highest = torch.where(values.isfinite(), values, -math.inf).max()
            lowest = torch.where(values.isfinite(), values, math.inf).min()
            self.bound = 2 * highest - lowest + ROUNDING * highest.abs()

    def rise(self) -> Number:
        """How far the losses since the candidate lie above the bound: min(since) - (2 max(recent) - min(recent)).

        Positive, the candidate has led to where the loss is higher. It is 0 where there are fewer than FEWEST to
        compare, and nan where the candidate has led to where the loss is not finite. So it is where half of the losses
        since are not, or the last LAST of them; if that is more than twice their share before; and if one of the recent
        ones was finite. Batches whose loss is not finite anywhere come alone, or often.
        """
        if not self.since:
            return 0.0
        values = self.sign * joined(self.since)
        finite = values.isfinite()
        lost, ends = finite.logical_not().sum(), finite[-LAST:].logical_not().all()
        bound, known = _on(values, self.bound), _on(values, self.not_finite)
        rise = torch.where(finite, values, math.inf).min() - bound
        count = len(self.since)
        counts = rise.isfinite() & (count >= FEWEST)
        is_lost = (lost * max(self.num_before, 1) > 2 * known * count) & (ends | (2 * lost >= count))
        if self.plain:
            is_lost = is_lost & joined(self.plain).isfinite().any().to(is_lost.device)
        return torch.where(is_lost, math.nan, torch.where(counts, rise, 0.0))

    def state(self, optimizer: Optimizer | None) -> dict[str, Any]:
        """Plain values for a checkpoint.

        Args:
            optimizer: of the training; None if it no longer exists.
        """
        return {
            "recent": joined(self.recent).tolist(),
            "since": joined(self.since).tolist(),
            "plain": joined(self.plain).tolist(),
            "bound": float(self.bound),
            "sign": self.sign,
            "reverted": self.reverted,
            "num_before": self.num_before,
            "not_finite": float(self.not_finite),
        } | self.passes.state([] if optimizer is None else all_parameters(optimizer))


def _on(values: Tensor, number: Number) -> Tensor:
    """A number beside others, without a wait for their device."""
    return number.to(values) if isinstance(number, Tensor) else values.new_full((), number)
