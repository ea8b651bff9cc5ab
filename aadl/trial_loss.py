"""The training loss as a judge: the closure is evaluated at the plain iterate and at a candidate, without a trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.acceptance import MOST_FAILED_TRIALS, Cause, LossRecord, cause_of_losses
from aadl.parameters import all_parameters, belongs_to_a_loop, maximizes
from aadl.ranks import Ranks
from aadl.settings import Settings
from aadl.statistics import Statistics
from aadl.trial import without_trace
from aadl.watch import versions_of


class NoLossError(ValueError):
    """The closure returned something else than one number."""


@dataclass
class LossTrials:
    """The trials of one accelerator: which closures are tried, and what the losses have shown so far."""

    settings: Settings
    statistics: Statistics
    record: LossRecord = field(default_factory=LossRecord)
    failed: int = 0
    """Trials in a row that gave no loss; from MOST_FAILED_TRIALS on there are no more trials."""

    def closure_for(self, closure: Callable[[], Any] | None, optimizer: Optimizer) -> Callable[[], Any] | None:
        """The closure whose loss judges candidates, or None where the residual judges them."""
        asked = self.settings.safeguard
        if maximizes(optimizer) is None:  # a saddle point has neither the lowest loss nor the highest
            return None
        if asked == "loss":
            return closure
        failing = self.failed >= MOST_FAILED_TRIALS
        return None if asked is not True or failing or belongs_to_a_loop(closure) else closure

    def cause_of_rejection(
        self,
        closure: Callable[[], Any],
        optimizer: Optimizer,
        place_candidate: Callable[[], None],
        weight: float,
        ranks: Ranks,
    ) -> Cause | None:
        """Evaluate both losses; return why they reject the candidate, or None where the loss improves.

        The weights hold the candidate afterwards, or the plain iterate where the closure failed early.

        Args:
            closure: as for `optimizer.step`.
            optimizer: whose parameters the candidate is for.
            place_candidate: writes the candidate into the parameters.
            weight: of the losses of this rank in their mean over the ranks, > 0.
            ranks: those that decide together.

        Raises:
            Exception: with safeguard="loss", whatever the closure raised; `NoLossError` where it returned no loss.
        """
        losses = math.nan, math.nan
        failure: Exception | None = None
        try:
            losses = trial_losses(
                self._counted(closure), all_parameters(optimizer), place_candidate, together=ranks.size > 1
            )
        except NoLossError as error:
            failure, weight = error, math.inf  # the weight tells the other ranks
        except Exception as error:  # the closure cannot be evaluated for its value alone, or not now
            failure, weight = error, math.nan
        plain, candidate, weight = mean_over_ranks(*losses, weight, ranks)
        maximize = bool(maximizes(optimizer))
        cause = cause_of_losses(plain, candidate, maximize, weight)
        if self.record.note(-plain if maximize else plain):
            cause = Cause.STOPPED  # better losses on single batches have led back on the whole: do not believe this one
        if failure is not None and self.settings.safeguard == "loss":
            raise failure
        self._note_failure(weight, failure)
        return cause

    def _counted(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with its calls counted."""

        def evaluate() -> Any:
            self.statistics["closure_evaluations"] += 1
            return closure()

        return evaluate

    def _note_failure(self, weight: float, failure: Exception | None) -> None:
        """Give trials up where the closure returns no loss, or failed again and again; the same on all ranks.

        Args:
            weight: of the losses; inf where a closure returned none, nan where one raised an error.
            failure: the error, if it was raised on this rank.
        """
        if math.isfinite(weight):
            self.failed = 0
            return
        self.failed = MOST_FAILED_TRIALS if math.isinf(weight) else self.failed + 1
        if self.failed < MOST_FAILED_TRIALS or self.settings.safeguard == "loss":
            return
        reason = "it failed on another rank" if failure is None else f"{type(failure).__name__}: {failure}"
        with suppress(Warning):  # where warnings are errors, a warning must not end a step halfway
            warnings.warn(
                f"aadl judges candidates by the residual from now on, since the closure given to step cannot be "
                f"evaluated for its loss ({reason}); return the loss from the closure, as one number that takes no "
                f"gradients to compute, or pass safeguard='residual'",
                stacklevel=2,
            )


def trial_losses(
    closure: Callable[[], Any],
    parameters: Sequence[Tensor],
    place_candidate: Callable[[], None],
    together: bool = False,
) -> tuple[float, float]:
    """Return the loss at the present parameters and at the candidate, both on the same random numbers.

    The candidate stays in place.

    Args:
        closure: as for `optimizer.step`.
        parameters: parameters of the optimizer. After a skipped backward pass their gradients are zeros.
        place_candidate: writes the candidate into the parameters.
        together: whether other ranks make the same two evaluations. A closure may exchange data with them in both, so
            one that fails is called a second time too.

    Raises:
        NoLossError: the closure returned no loss. Errors of the closure are passed on.
    """
    with without_trace(parameters, is_closure=True) as rewind:
        try:
            plain = _value(closure())
        except Exception:
            place_candidate()
            if together:
                rewind()
                with suppress(Exception):
                    closure()
            raise
        rewind()
        place_candidate()
        placed = versions_of(list(parameters))
        candidate = _value(closure())
    if versions_of(list(parameters)) != placed:  # a closure may project weights; it does so in the next step too
        place_candidate()
    return plain, candidate


def mean_over_ranks(plain: float, candidate: float, weight: float, ranks: Ranks) -> tuple[float, float, float]:
    """Return the weighted means of both losses, sum of weight * loss over sum of weight, and that sum.

    One all-reduce of three numbers. A rank without a finite loss makes the means non-finite, so that all ranks reject
    together. A rank without any loss has a weight that is not finite: inf where the closure returned none, nan where it
    failed. Nan prevails over inf.
    """
    if ranks.size == 1:
        return plain, candidate, weight
    message = torch.tensor([weight * plain, weight * candidate, weight], dtype=torch.float64, device="cpu")
    plain, candidate, weight = ranks.total(message).tolist()
    return plain / weight, candidate / weight, weight


def _value(loss: Any) -> float:
    """The loss as a number."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not (loss.is_complex() or loss.dtype == torch.bool):
        return float(loss.detach())
    try:
        if not isinstance(loss, Tensor | str | bytes | bool):
            return float(loss)
    except (TypeError, ValueError):
        pass
    kind = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        kind = f"a tensor of shape {tuple(loss.shape)} and type {loss.dtype}"
    raise NoLossError(f"the closure must return the training loss, got {'None' if loss is None else kind}")
