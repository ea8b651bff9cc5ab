"""When a run must stop early: signals and the time limit set a flag, and all ranks agree on it once per step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiments.distributed.departure import RanksDisagree, absent_ranks, control_group
from experiments.distributed.launch import Ranks

__all__ = [
    "EXIT_RESUME",
    "SIGNALS",
    "Agreement",
    "Interruption",
    "RanksDisagree",
    "Word",
]

EXIT_RESUME = 75  # of a process that stopped early, has saved its state, and wants to be started again

# USR1 and USR2 announce a time limit (Slurm --signal, LSF), TERM a preemption or a cancellation.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

# Seconds since the epoch at which the job ends; the first one that is set counts.
END_TIME_VARIABLES = ("AADL_END_TIME", "SLURM_JOB_END_TIME")


class Interruption:
    """While entered, signals and the time limit do nothing but give a reason to stop.

    A second signal changes nothing. In a thread other than the main one Python allows no signal handlers, and the time
    limit alone counts. Schedulers signal every process of a step, workers too: see `data_loaders.workers`.

    Attributes:
        margin_seconds: so long before the end of the job the run must stop; may be changed at any time, as when a
            checkpoint turns out to take long.
    """

    def __init__(
        self,
        *,
        deadline_seconds: float | None = None,
        margin_seconds: float = 60.0,
        include_interrupt: bool = False,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args:
            deadline_seconds: time limit from now on, > 0; None for that of the environment alone. The earlier counts.
            margin_seconds: see above, >= 0.
            include_interrupt: whether SIGINT (Ctrl-C) is a reason to stop as well, and raises no KeyboardInterrupt.
            environment: with AADL_END_TIME or SLURM_JOB_END_TIME, in seconds since the epoch.
            clock: seconds since the epoch.

        Raises:
            ValueError: a time is not a number, or out of its range.
        """
        if deadline_seconds is not None and not deadline_seconds > 0:
            raise ValueError(f"deadline_seconds must be > 0, got {deadline_seconds}")
        if not margin_seconds >= 0:
            raise ValueError(f"margin_seconds must be >= 0, got {margin_seconds}")
        ends = [_end_time(environment)]
        if deadline_seconds is not None:
            ends.append(clock() + deadline_seconds)
        self.end_time: float | None = min((end for end in ends if end is not None), default=None)
        self.margin_seconds = margin_seconds
        self._clock = clock
        self._signals = (*SIGNALS, signal.SIGINT) if include_interrupt else SIGNALS
        self._previous: dict[signal.Signals, Any] = {}
        self._reason = ""

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: it was not set by Python, and Python cannot bring it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    @property
    def reason(self) -> str:
        """Why the run must stop ("SIGUSR1", "time limit"): the first reason stays; "" for none."""
        if not self._reason and self.seconds_left <= 0:
            self._reason = "time limit"
        return self._reason

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit less the margin, infinite without a limit."""
        return float("inf") if self.end_time is None else self.end_time - self.margin_seconds - self._clock()


def _end_time(environment: Mapping[str, str]) -> float | None:
    for name in END_TIME_VARIABLES:
        text = environment.get(name, "")
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"environment variable {name} must be a time in seconds since the epoch, got {text!r}")
        return value
    return None


LARGEST = 1 << 46
"""Above the numbers that a word can carry; each goes with the rank that says it, below RANKS, in an int64."""
RANKS = 1 << 17


class Word(NamedTuple):
    """What all ranks said of one step, the same on every rank.

    Attributes:
        step: number of the step.
        stop: whether any rank must stop.
        finite: whether the values of all ranks were finite, since the word before.
        save: whether any rank finds it is time to save.
    """

    step: int
    stop: bool
    finite: bool
    save: bool = False


class _Kept(NamedTuple):
    """What one rank says of the steps since the last word."""

    stop: bool
    finite: bool
    save: bool
    fingerprint: int

    def merged(self, later: _Kept) -> _Kept:
        """Both in one; two ranks whose fingerprints differ in either have different ones here."""
        fingerprint = (self.fingerprint * 1_000_003 + later.fingerprint) % LARGEST
        return _Kept(self.stop or later.stop, self.finite and later.finite, self.save or later.save, fingerprint)


class Agreement:
    """One small word over all ranks per optimizer step, or per `every` of them.

    Within a step, `read()` comes before `post()`: it returns the word of the step before, which has traveled meanwhile,

        for step in ...:
            word = agreement.read()             # None at the first step
            if word is not None and word.stop:
                break                           # on all ranks in the same step
            ...
            agreement.post(step, bool(interruption.reason), finite, fingerprint)
        word = agreement.read()                 # of the last step

    The ranks then stop one step after the flag was set. The word is an all-reduce of int64 numbers on the CPU whose
    size never changes, so ranks that have lost each other find out here, by an error that is the same on all of them,
    and not by a hang or an abort in a collective of the training. Flags, not values, are reduced: a maximum loses NaN.
    The extremes of step and fingerprint come with the ranks that sent them, for the ranks cannot ask each other later:
    one that skipped a step is elsewhere than the others when it reads the same word.

    Cost. Gloo reduces around a ring: a word takes about 2 (W - 1) messages one after the other with W ranks, of some
    10 to 50 us each between nodes, so at 1,536 ranks 30 to 150 ms. It travels while the step computes, so it costs
    nothing as long as a step takes longer than that, and the difference where it is shorter. With `every` = n only the
    steps that n divides send a word, and each waits a n-th as often; the price is that the ranks stop, save, or find
    out that they disagree up to n steps later. Choose n such that n steps take several times as long as a word.
    """

    def __init__(self, ranks: Ranks, *, timeout_seconds: float = 600.0, every: int = 1) -> None:
        """Made by all ranks together.

        Args:
            ranks: this process.
            timeout_seconds: for so long the others may be late with their word, > 0.
            every: only the steps that this divides send a word, >= 1; the others keep theirs until then.
        """
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be > 0, got {timeout_seconds}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}")
        self._ranks, self._timeout_seconds, self._every = ranks, timeout_seconds, every
        self._group = control_group(ranks) if ranks.world_size > 1 else None
        self._kept: _Kept | None = None  # of the steps since the last word
        self._posted: int | None = None  # step
        self._values = torch.empty(0)
        self._work: Any = None

    def post(self, step: int, stop: bool, finite: bool, fingerprint: int = 0, *, save: bool = False) -> None:
        """Starts to send the word of this rank, or keeps it for the next step that `every` divides.

        Args:
            step: number of the step, in [0, 2^46).
            stop: whether this rank must stop.
            finite: whether its values were finite.
            fingerprint: a number that must be the same on all ranks, as of what was decided; taken modulo 2^46. Not
                Python's hash() of a text, which differs between processes.
            save: whether it is time to save.
        """
        self._post(step, _Kept(stop, finite, save, fingerprint % LARGEST), now=step % self._every == 0)

    def _post(self, step: int, word: _Kept, *, now: bool) -> None:
        if self._posted is not None:
            raise RuntimeError("a word was posted before the last one was read")
        if self._kept is not None:
            word = self._kept.merged(word)
        self._kept = None if now else word
        if not now:
            return
        # The maximum of -x is the negative minimum of x.
        own = [value * RANKS + self._ranks.rank for value in (step, word.fingerprint)]
        numbers = [word.stop, not word.finite, word.save, *own, *(-number for number in own)]
        self._posted = step
        self._values = torch.tensor([int(number) for number in numbers], dtype=torch.int64)
        if self._group is not None:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # as torch itself does
            options.timeout = timedelta(seconds=self._timeout_seconds)  # that of the group allows for checkpoints
            try:
                self._work = self._group.allreduce([self._values], options)
            except RuntimeError as error:
                raise self._lost(step, error) from error

    def read(self) -> Word | None:
        """Waits for the word that was sent last, and returns it; None where none was sent since.

        Raises:
            RanksDisagree: steps or fingerprints differ, or a rank is gone or hangs; the message names the ranks.
        """
        if self._posted is None:
            return None
        step, self._posted = self._posted, None
        work, self._work = self._work, None
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self._lost(step, error) from error
        stop, not_finite, save, *extremes = self._values.tolist()
        (last, last_rank), (largest, largest_rank) = (divmod(number, RANKS) for number in extremes[:2])
        (first, first_rank), (smallest, smallest_rank) = (divmod(-number, RANKS) for number in extremes[2:])
        if first != last:
            text = f"rank {first_rank} at step {first}, rank {last_rank} at step {last}"
            raise RanksDisagree(f"the ranks are at different steps: {text}")
        if smallest != largest:
            pair = "{} and {}".format(*sorted((smallest_rank, largest_rank)))
            raise RanksDisagree(f"the ranks have taken different decisions at step {step}: ranks {pair} differ")
        return Word(step, bool(stop), not not_finite, bool(save))

    def agree_now(self, step: int, stop: bool, finite: bool, fingerprint: int = 0, *, save: bool = False) -> Word:
        """Sends a word, and what was kept, at any step, and waits for it."""
        self._post(step, _Kept(stop, finite, save, fingerprint % LARGEST), now=True)
        word = self.read()
        assert word is not None
        return word

    def _lost(self, step: int, error: RuntimeError) -> RanksDisagree:
        """Finds out who is missing, by a roll call in the store, for the connections of the group are broken now.

        A lost connection is noticed by the neighbors of a dead rank alone: the others wait, and answer by a thread.
        After a timeout all ranks come here but the one that hangs.
        """
        text = str(error).strip().splitlines()[0][:200]
        hung = "timed out" in text.lower()
        what = f"gave no word within {self._timeout_seconds:g} s" if hung else "was lost"
        missing = None if hung else absent_ranks()
        if missing is None:
            missing = self._roll_call(step)
        who = _few([f"rank {rank}" for rank in missing]) if missing else "a rank"
        return RanksDisagree(f"{who} {what} at step {step} ({text})")

    def _roll_call(self, step: int, wait_seconds: float = 2.0) -> list[int]:
        """The ranks that did not come here as well; [] where nobody can tell."""
        try:
            store = dist.distributed_c10d.PrefixStore(
                f"aadl-roll-call-{step}", dist.distributed_c10d._get_default_store()
            )
            store.set(str(self._ranks.rank), "here")
            end = time.monotonic() + wait_seconds
            missing = list(range(self._ranks.world_size))
            while missing and time.monotonic() < end:
                missing = [rank for rank in missing if not store.check([str(rank)])]
                time.sleep(0.05)
            return missing if self._ranks.rank not in missing else []
        except (RuntimeError, ValueError) as error:  # the store went down with the rank that kept it
            print(f"the ranks cannot be called up: {error}", file=sys.stderr, flush=True)
            return []


def _few(texts: list[str], limit: int = 8) -> str:
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
