"""StepVote: all ranks learn the same stop, save and finite flags of a step, so that all act at the same step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiments.distributed.departure import RanksDisagree, control_group
from experiments.distributed.ranks import Ranks

LARGEST = 1 << 46
"""Votes carry numbers below this one. Each number is combined with its rank, which is below RANKS, in one int64."""
RANKS = 1 << 17


class Tally(NamedTuple):
    """The result of a vote, the same on every rank; it covers what happened since the previous vote.

    Attributes:
        step: the number of the step at which the vote was cast.
        stop: whether any rank must stop.
        finite: whether the values of all ranks were finite.
        save: whether it is time to save on any rank.
    """

    step: int
    stop: bool
    finite: bool
    save: bool = False


class StepVote:
    """All-reduces the stop, save and finite flags once per optimizer step.

    Within a step, `result()` comes before `cast()`: it returns the vote of the previous step, which has traveled in the
    meantime, so the ranks stop one step after a flag was set. A vote is an all-reduce of int64 numbers on the CPU whose
    size never changes. Ranks that have lost each other therefore find out here by an error that all of them get, and
    not by a hang or an abort in a collective of the training. It reduces flags and not values, because a maximum loses
    NaN. The extremes of step and fingerprint carry the rank that sent them, because a rank that skipped a step is at
    another place of the program when it reads the same vote.

    Cost: gloo reduces around a ring, which takes about 2 (W - 1) messages of 10 to 50 us, 30 to 150 ms at 1,536 ranks.
    It costs nothing where a step takes longer.

    All ranks make their StepVote together; `timeout_seconds` is how late the vote of another rank may be.
    """

    def __init__(self, ranks: Ranks, *, timeout_seconds: float = 600.0) -> None:
        self._ranks, self._timeout_seconds = ranks, timeout_seconds
        self._group = control_group(ranks) if ranks.world_size > 1 else None
        self._step: int | None = None  # of the vote that is traveling
        self._numbers = torch.empty(0)
        self._work: Any = None

    def cast(self, step: int, stop: bool, finite: bool, fingerprint: int = 0, *, save: bool = False) -> None:
        """Starts to send the flags of this rank.

        Args:
            step: number of the step, in [0, 2^46).
            stop: whether this rank must stop.
            finite: whether the values of this rank are finite.
            fingerprint: a number that must be the same on all ranks, as a count of decisions, taken modulo 2^46; not
                Python's hash() of a text, which differs between processes.
            save: whether it is time to save.

        Raises:
            RanksDisagree: a rank is gone.
        """
        if self._step is not None:
            raise RuntimeError("a vote was cast before the result of the previous one was read")
        # The maximum of -x is the negative minimum of x.
        own = [value * RANKS + self._ranks.rank for value in (step, fingerprint % LARGEST)]
        numbers = [stop, not finite, save, *own, *(-number for number in own)]
        self._step = step
        self._numbers = torch.tensor([int(number) for number in numbers], dtype=torch.int64)
        if self._group is not None:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # torch itself assigns it in this way
            # The timeout of the group is longer, because it allows for checkpoints.
            options.timeout = timedelta(seconds=self._timeout_seconds)
            try:
                self._work = self._group.allreduce([self._numbers], options)
            except RuntimeError as error:
                raise self._lost(step, error) from error

    def result(self) -> Tally | None:
        """Waits for the vote that was cast last and returns its result; None if no vote was cast since the last call.

        Raises:
            RanksDisagree: steps or fingerprints differ, and the message names the ranks; or a rank is gone or hangs.
        """
        if self._step is None:
            return None
        step, self._step = self._step, None
        work, self._work = self._work, None
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self._lost(step, error) from error
        stop, not_finite, save, *extremes = self._numbers.tolist()
        (last, last_rank), (largest, largest_rank) = (divmod(number, RANKS) for number in extremes[:2])
        (first, first_rank), (smallest, smallest_rank) = (divmod(-number, RANKS) for number in extremes[2:])
        if first != last:
            text = f"rank {first_rank} at step {first}, rank {last_rank} at step {last}"
            raise RanksDisagree(f"the ranks are at different steps: {text}")
        if smallest != largest:
            pair = "{} and {}".format(*sorted((smallest_rank, largest_rank)))
            raise RanksDisagree(f"the ranks have taken different decisions at step {step}: ranks {pair} differ")
        return Tally(step, bool(stop), not not_finite, bool(save))

    def vote_now(self, step: int, stop: bool, finite: bool, fingerprint: int = 0, *, save: bool = False) -> Tally:
        """Votes and waits for the result; arguments as in `cast`."""
        self.cast(step, stop, finite, fingerprint, save=save)
        tally = self.result()
        assert tally is not None
        return tally

    def _lost(self, step: int, error: RuntimeError) -> RanksDisagree:
        """Says when a rank was missing; `end_on_failure` finds out which one, because this rank cannot know."""
        text = str(error).strip().splitlines()[0][:200]
        what = f"did not vote within {self._timeout_seconds:g} s" if "timed out" in text.lower() else "was lost"
        return RanksDisagree(f"a rank {what} at step {step} ({text})")
