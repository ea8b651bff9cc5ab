"""What becomes of a candidate: when one is made, who judges it, what is remembered of the verdict.

Ranks that share a Gram matrix take the same branches. Verdicts that a device can carry out are carried out there; the
host reads them after the next optimizer step (`settle`).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl import mixing, safeguard, smoothing, trial_loss
from aadl.deferred import Deferred
from aadl.history import KINDS, History, Tensors
from aadl.mixing import Gram, host_tensor
from aadl.parameters import all_parameters, belongs_to_a_loop, forget_curvature, maximizes
from aadl.proposal import propose
from aadl.ranks import Ranks
from aadl.safeguard import LossRecord, Pause, Pending
from aadl.settings import Settings

COUNTERS = (
    "steps", "skipped_steps", "macro_steps", "attempts", "accepted", "reverted", "suspensions", "suspended",
    "closure_evaluations", "moved", "stops",
)  # fmt: skip
LAST_VALUES = ("relative_standard_deviation", "gain", "trust_ratio", "condition_number", "coefficient_norm")
MOST_MOVES = 65_521
"""So that the square of `Decisions.moves`, summed over any number of ranks, is exact in float64."""
MIXING_VALUES = ("numerical_rank", "condition_number", "coefficient_norm")


class Step(NamedTuple):
    """The end of a macro-step, its pair stored."""

    optimizer: Optimizer
    history: History
    tensors: list[Tensors]
    closure: Callable[[], Any] | None
    """Given where candidates are judged by the loss."""
    ranks: Ranks
    """Those that decide together."""
    loss_weight: float
    rate: float
    """Factor of the learning rate."""
    written: bool = False
    """Whether this rank saw that somebody wrote to the tensors within a macro-step since the last acceleration."""
    doubtful: bool = False
    """Whether this macro-step's residual may be such a write, so that nothing is put back because of it."""
    since: int = 0
    """The macro-step of the last acceleration, accepted or not."""


class Candidate(NamedTuple):
    """A candidate in the history: what it promises, and how far it goes along the update (None: nobody asks)."""

    promise: Pending | None
    advance: Tensor | None


@dataclass
class Decisions:
    """State of the decisions of one accelerator.

    Args:
        settings: the validated arguments.
    """

    settings: Settings
    statistics: dict[str, Any] = field(default_factory=dict)
    averaging: bool = False
    pause: Pause = field(default_factory=lambda: Pause(safeguard.LONGEST_PAUSE))
    refusals: Pause = field(default_factory=lambda: Pause(safeguard.LONGEST_REFUSAL))
    pending: Pending | None = None
    """What the last accepted candidate promised; judged when the macro-step that it began is over."""
    reach: float = safeguard.FIRST_REACH
    """Longest step of a candidate, in units of the way that the pairs behind it have made."""
    last_jump: dict[str, float] = field(default_factory=dict)
    """By kind, the squared step of the last candidate, where it kept its promise."""
    watched: Pending | None = None
    """What a candidate promised that was judged well, and is looked at once more before the next one."""
    disturbed: bool = False
    """Whether the running macro-step starts elsewhere than the last one ended."""
    record: LossRecord = field(default_factory=LossRecord)
    """Of the training losses that trials have seen."""
    failed_trials: int = 0
    """Trials in a row that gave no loss; from MOST_FAILURES on there are no more."""
    fused: bool = True
    """Whether all ranks have compiled kernels (or none needs them)."""
    moves: int = 0
    """Which macro-steps since the last acceleration started elsewhere than the ones before had ended, on this rank, as
    one number; 0 for none."""
    words: list[tuple[Deferred, Callable[[list[float]], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.averaging = self.settings.average == "always"
        self.statistics = dict.fromkeys(COUNTERS, 0) | dict.fromkeys(LAST_VALUES, math.nan)
        self.statistics |= {"numerical_rank": 0, "averaging": self.averaging, "rejected": {}, "resets": {}}

    # ---- state -----------------------------------------------------------------------------------------------------

    def books(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "statistics": copy.deepcopy(self.statistics),
            "averaging": self.averaging,
            "pause": vars(self.pause),
            "refusals": vars(self.refusals),
            "pending": None if self.pending is None else vars(self.pending),
            "watched": None if self.watched is None else vars(self.watched),
            "disturbed": self.disturbed,
            "moves": self.moves,
            "reach": self.reach,
            "last_jump": self.last_jump,
            "record": vars(self.record),
            "failed_trials": self.failed_trials,
        }

    @staticmethod
    def restored(settings: Settings, books: dict[str, Any]) -> Decisions:
        """From `books`; raises KeyError or TypeError where they are damaged."""
        decisions = Decisions(settings)
        decisions.statistics = copy.deepcopy(books["statistics"])
        decisions.disturbed, decisions.reach = bool(books["disturbed"]), float(books["reach"])
        decisions.last_jump, decisions.moves = dict(books["last_jump"]), int(books["moves"])
        decisions.failed_trials, decisions.record = int(books["failed_trials"]), LossRecord(**books["record"])
        if settings.average == "auto":
            decisions.averaging = bool(books["averaging"])
        decisions.pause, decisions.refusals = Pause(**books["pause"]), Pause(**books["refusals"])
        decisions.pending = None if books["pending"] is None else Pending(**books["pending"])
        decisions.watched = None if books["watched"] is None else Pending(**books["watched"])
        return decisions

    def settle(self) -> None:
        """Take note of what was decided on the device."""
        while self.words:
            word, act = self.words.pop(0)
            act(word.values())

    def reset(self, cause: str, history: History | None) -> None:
        """Forget the pairs, for a reason that is counted."""
        count(self.statistics["resets"], cause)
        self.pending, self.watched, self.last_jump = None, None, {}
        if history is not None:
            history.clear(wipe=cause == "non_finite")

    def forget_last(self, history: History, count: int) -> None:
        """Forget the newest columns and the pair: somebody wrote within their macro-steps."""
        self.statistics["moved"] += 1
        self.pending, self.disturbed = None, True
        history.forget_last(count)

    def start_elsewhere(self, history: History) -> None:
        """Note that the running macro-step starts where somebody has put the weights: that judges no candidate.

        Replicas may have been put in different places, or some of them only. They keep what is to be judged until they
        speak with each other, since all of them must come to the same words.
        """
        self.disturbed = True
        if history.replicas and history.has_pair:
            self.moves = (self.moves * 31 + self.statistics["macro_steps"]) % MOST_MOVES + 1
        else:
            self.pending = self.watched = None

    def is_suspended(self) -> bool:
        """Whether acceleration pauses now; counted."""
        suspended = self.statistics["macro_steps"] < max(self.pause.until, self.refusals.until)
        self.statistics["suspended"] += suspended
        return suspended

    # ---- the last candidate ----------------------------------------------------------------------------------------

    def judge(self, step: Step, pending: Pending) -> None:
        """Judge the last accepted candidate by the residual of the macro-step it began; put the plain iterate back."""
        numbers, words = step.history.measurements_with([float(step.doubtful), float(self.moves > 0)])
        weights = numbers.new_zeros(len(KINDS)) if not on_host(numbers) else host_tensor([0.0] * len(KINDS))
        for place, kind in enumerate(KINDS):
            weights[place] = pending.weights.get(kind, 0.0)
        square, along = weights @ numbers[:, 0], numbers[0, 3]
        if on_host(numbers):
            doubts, moves = words.tolist()
            self._note_jump(step.history, dict(zip(KINDS, numbers[:, 2].tolist(), strict=True)))
            if not moves:
                self._keeps_promise(step, pending, float(square), float(along), doubts >= self._quorum(step))
        else:
            breaks = ~((square <= safeguard.revert_bound(pending)) & (along >= safeguard.overshoot_bound(pending)))
            step.history.put_back(breaks & (words[0] < self._quorum(step)) & (words[1] == 0), step.tensors)
            self._defer(
                torch.cat([torch.stack([square, along]), words, numbers[:, 2]]),
                lambda values: self._judged(step, pending, *values),
            )

    def _judged(
        self, step: Step, pending: Pending, square: float, along: float, doubts: float, moves: float, *jump: float
    ) -> None:
        """Note what the device has decided."""
        self._note_jump(step.history, dict(zip(KINDS, jump, strict=True)))
        if moves:
            return
        doubtful = doubts >= self._quorum(step)
        step.history.start_from(kept=safeguard.must_revert(square, along, pending) and not doubtful)
        self._note_promise(step, pending, square, along, doubtful)

    def _keeps_promise(self, step: Step, pending: Pending, square: float, along: float, doubtful: bool) -> bool:
        """False where the plain iterate was put back, or might have been."""
        breaks = safeguard.must_revert(square, along, pending)
        step.history.take(breaks and not doubtful, step.tensors)
        self._note_promise(step, pending, square, along, doubtful)
        return not breaks

    def note_jump(self, history: History) -> None:
        """Note the jump inside the newest column where no judgment and no mixing does."""
        if history.columns:
            column = history.columns[-1]
            self._defer(
                history.measurements()[:, 2],
                lambda values: setattr(column, "jump", dict(zip(KINDS, values, strict=True))),
            )

    def _note_jump(self, history: History, jump: dict[str, float]) -> None:
        if history.columns:
            history.columns[-1].jump = jump

    def _quorum(self, step: Step) -> int:
        """How many ranks must have seen a write. Of whole replicas all: what fewer saw was put back."""
        whole = not step.history.partial or self.settings.shard_history
        return step.history.ranks.size if whole else 1

    def _note_promise(self, step: Step, pending: Pending, square: float, along: float, doubtful: bool) -> None:
        """Count, and pause acceleration where the promise was not kept."""
        self.statistics["trust_ratio"] = ratio = safeguard.trust_ratio(square, pending)
        reverts = safeguard.must_revert(square, along, pending)
        if ratio > safeguard.SUSPEND_ABOVE or reverts:
            self._suspend()
        else:
            self.pause.shorten()
        overshot = reverts or (along < 0 and math.isfinite(pending.advance))
        self._change_reach(ratio, overshot)
        kept = ratio <= safeguard.SUSPEND_ABOVE and not overshot
        self.last_jump = step.history.columns[-1].jump if kept and step.history.columns else {}
        if reverts and doubtful:
            self.forget_last(step.history, 1)
        elif reverts:
            self._take_back(step)
        else:
            self.watched = pending
        if not math.isfinite(square):
            self.reset("non_finite", step.history)

    def _stop(self) -> None:
        """Leave the training alone until it is twice as long: harm can come again a logarithmic number of times."""
        self.statistics["stops"] += 1
        self.pause.until = 2 * self.statistics["macro_steps"]
        self.reach, self.record = safeguard.FIRST_REACH, LossRecord()

    def _change_reach(self, ratio: float, overshot: bool) -> None:
        """Have the next candidates make longer steps after a kept promise, shorter ones after a broken one."""
        if overshot and self.reach == safeguard.SHORTEST_REACH:
            self._stop()
            return
        factor = 0.25 if overshot else 2.0 if ratio <= safeguard.SUSPEND_ABOVE else 0.5
        self.reach = min(safeguard.LONGEST_REACH, max(safeguard.SHORTEST_REACH, factor * self.reach))

    def _look_back(self, step: Step, doubtful: bool) -> bool:
        """Put back the plain iterate before the last candidate, which updates since then undo: False."""
        self._suspend()
        self._change_reach(math.inf, overshot=True)
        self.last_jump = {}
        if doubtful:
            self.forget_last(step.history, 1)
        else:
            step.history.take(True, step.tensors)
            self._take_back(step)
        return False

    def _suspend(self) -> None:
        """Pause acceleration."""
        self.pause.extend(self.statistics["macro_steps"])
        self.statistics["suspensions"] += 1

    def _take_back(self, step: Step) -> None:
        """Note that the plain iterate was put back."""
        self.statistics["reverted"] += 1
        self.disturbed = True
        forget_curvature(step.optimizer)

    # ---- the next candidate ----------------------------------------------------------------------------------------

    def accelerate(self, step: Step, pending: Pending | None) -> None:
        """The macro-step after which acceleration is due: one Gram matrix judges the last candidate and makes the next.

        With local SGD every rank has a Gram matrix of its own, and all come to the vote.
        """
        local_sgd, columns, ranks = self.settings.local_sgd, step.history.columns, step.history.ranks
        moves = float(self.moves)
        if self.moves:
            pending = self.watched = None
        if local_sgd and step.closure is not None:  # averages are promised nothing
            pending = None
        parts, words = step.history.gram_with([float(step.written), float(step.doubtful), moves, moves**2])
        weights = mixing.balancing_weights(parts)
        gram = mixing.joined(parts, weights, [step.rate / column.learning_rate for column in columns])
        square = sum(pending.weights[kind] * part.square for kind, part in parts.items()) if pending else 0.0
        along, watched = parts["parameters"].along, self.watched
        if watched is None:
            self._note_jump(step.history, {kind: part.jump for kind, part in parts.items()})
        watched = None if watched is None else watched.at(step.rate)
        self.fused, self.watched, self.moves = True, None, 0
        if step.history.replicas and not step.history.sums:
            # they made the same numbers; a mean over them makes sure that all decide alike
            others = [square, along, weights.get("momentum", 1.0), float(step.history.fused)]
            word = ranks.total(mixing.packed(gram, [*others, *words]))
            words = word[-len(words) :].tolist()
            gram, (square, along, weight, fused, *_) = mixing.unpacked(word / ranks.size, len(columns))
            weights = {kind: 1.0 if kind == "parameters" else weight for kind in weights}
            self.fused = fused == 1  # else some rank has no compiler, and they would round differently
        written, doubts, moves, squares = words
        if written >= self._quorum(step) or ranks.size * squares != moves**2:  # somebody wrote, to all or only to some
            self.forget_last(step.history, sum(column.macro_step > step.since for column in columns))
            return
        doubtful = doubts >= self._quorum(step)
        finite = math.isfinite(gram.square + square + float(gram.matrix.sum()))
        square = square if finite else math.inf
        ready = pending is None or self._keeps_promise(step, pending, square, along, doubtful)
        if ready and watched is not None and finite and along < safeguard.overshoot_bound(watched):
            ready = self._look_back(step, doubtful)
        if ready and (local_sgd or pending is not None):
            ready = not self.is_suspended()
        candidate = self._propose(step, gram, weights, finite) if ready and step.history.columns else None
        if local_sgd:
            self._vote(step, candidate)
        elif candidate is not None:
            self._decide(step, candidate)

    def _propose(self, step: Step, gram: Gram, weights: dict[str, float], finite: bool) -> Candidate | None:
        """Mix and build a candidate beside the parameters; None, counted by cause, where there is none to consider."""
        statistics, settings, history = self.statistics, self.settings, step.history
        statistics["attempts"] += 1
        if not finite:
            self._reject("non_finite")
            self.reset("non_finite", history)
            return None
        consecutive = [column.consecutive for column in history.columns]
        statistics["relative_standard_deviation"] = smoothing.relative_standard_deviation(gram, consecutive)
        if settings.average == "auto":
            deviation = statistics["relative_standard_deviation"]
            self.averaging = smoothing.switch(self.averaging, deviation, settings.average_tolerance)
        statistics["averaging"] = self.averaging
        if settings.acceleration_type == "identity" and not self.averaging:
            self._reject("averaging_off")
            return None
        ages = [statistics["macro_steps"] - column.macro_step for column in history.columns]
        stored = settings.history_dtype or torch.float32
        factors = [step.rate / column.learning_rate for column in history.columns]
        solution, predicted, refused = propose(
            gram,
            factors,
            [column.earlier_rate / step.rate - 1 for column in history.columns],
            _jumps(history, weights),
            _length(self.last_jump, weights),
            self.reach,
            ages,
            self.averaging,
            settings,
            stored,
        )
        statistics |= {name: getattr(solution, name) for name in MIXING_VALUES}
        if refused:
            self._reject(refused)
            return None
        statistics["gain"] = math.sqrt(predicted / gram.square) if gram.square > 0 else math.nan
        beta = settings.relaxation
        scaled = host_tensor(factors) * solution.gamma
        checked = settings.safeguard and settings.acceleration_type != "identity"
        self.watched = None  # the candidate takes the place of the iterate that could be put back
        advance = history.combine(
            solution.gamma,
            (scaled - solution.gamma) - (1 - beta) * scaled,
            1 - beta,
            solution.mean if checked else None,
            self.fused,
        )
        promise = None
        if settings.safeguard:
            noise = smoothing.noise_square(gram, consecutive) if self.averaging else 0.0
            promise = Pending(
                predicted, gram.square, noise, weights, rate=step.rate, macro_step=statistics["macro_steps"]
            )
        return Candidate(promise, advance)

    def _decide(self, step: Step, candidate: Candidate) -> None:
        """Let the safeguard decide; the plain iterate stays where it says no. The same on all ranks."""
        advance, at_once = candidate.advance, isinstance(step.optimizer, torch.optim.LBFGS)  # it must know at once
        if advance is not None and not on_host(advance) and step.closure is None and not at_once:
            step.history.take(advance >= 0, step.tensors)
            self._defer(advance, lambda values: self._conclude_direction(step, values[0], candidate))
            return
        if advance is not None and candidate.promise is not None:
            candidate.promise.advance = float(advance)
        if advance is not None and not float(advance) >= 0:
            step.history.continue_from_mapped()
            self._conclude(step, False, "backward", candidate)
        elif step.closure is not None:
            self._conclude(step, *self._improves(step, step.closure), candidate)
        else:
            step.history.take(True, step.tensors)
            self._conclude(step, True, "", candidate)

    def _conclude_direction(self, step: Step, advance: float, candidate: Candidate) -> None:
        if candidate.promise is not None:
            candidate.promise.advance = advance
        self._conclude(step, advance >= 0, "backward", candidate)

    def _vote(self, step: Step, candidate: Candidate | None) -> None:
        """Decide with ranks whose weights differ.

        By the residual: ranks vote, and where more than half of them have a candidate to go to, these go. By the loss:
        the candidates are averaged over the ranks (a rank without one brings its plain iterate), and all go to their
        average where its mean loss is below that of the averaged plain iterates; else all stay where they are.
        """
        willing = candidate is not None and (candidate.advance is None or float(candidate.advance) >= 0)
        if step.closure is not None:
            step.history.average(willing, step.ranks, step.tensors)
            self.statistics["attempts"] += candidate is None
            self._conclude(step, *self._improves(step, step.closure), None)
            return
        votes = float(step.ranks.total(host_tensor(float(willing))))
        agreed = willing and 2 * votes > step.ranks.size
        if candidate is not None:
            step.history.take(agreed, step.tensors)
            self._conclude(step, agreed, "vote" if willing else "backward", candidate)

    def _conclude(self, step: Step, accepted: bool, cause: str, candidate: Candidate | None) -> None:
        """Count a verdict and note what it promises."""
        if not accepted:
            self._reject(cause)
            if cause == "backward":
                self.refusals.extend(self.statistics["macro_steps"], self.settings.period)
            return
        self.refusals.length = 0
        self.statistics["accepted"] += 1
        self.disturbed = True
        self.pending = None if candidate is None else candidate.promise
        forget_curvature(step.optimizer)

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def trial_closure(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """The closure by whose loss candidates are judged, or None where the residual judges."""
        asked, failing = self.settings.safeguard, self.failed_trials >= safeguard.MOST_FAILURES
        if asked == "loss":
            return closure
        return None if asked is not True or failing or belongs_to_a_loop(closure) else closure

    def _improves(self, step: Step, closure: Callable[[], Any]) -> tuple[bool, str]:
        """Put the candidate in place; take it out again where the training loss does not improve, and say why."""
        losses, weight = (math.nan, math.nan), step.loss_weight
        better, cause = False, "loss"
        failure: Exception | None = None
        try:
            try:
                losses = trial_loss.trial_losses(
                    self._counted(closure),
                    all_parameters(step.optimizer),
                    lambda: step.history.take(True, step.tensors),
                    together=step.ranks.size > 1,
                )
            except trial_loss.NoLossError as error:
                failure, weight = error, math.inf  # which tells the others
            except Exception as error:  # the closure cannot be evaluated for its value alone, or not now
                failure, weight = error, math.nan
            plain, candidate, weight = trial_loss.mean_over_ranks(*losses, weight, step.ranks)
            cause = "loss" if math.isfinite(weight) else "closure"
            better = candidate > plain if maximizes(step.optimizer) else candidate < plain
            if self.record.note(-plain if maximizes(step.optimizer) else plain):
                self._stop()  # better losses on single batches have led back on the whole: this one is not believed
                better, cause = False, "stopped"
            if failure is not None and self.settings.safeguard == "loss":
                raise failure
        except BaseException:
            self._reject(cause)
            raise
        finally:
            if not better:
                step.history.write_mapped(step.tensors)
                step.history.continue_from_mapped()
        self._note_failure(weight, failure)
        return better, cause

    def _counted(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, its calls counted."""

        def evaluate() -> Any:
            self.statistics["closure_evaluations"] += 1
            return closure()

        return evaluate

    def _note_failure(self, weight: float, failure: Exception | None) -> None:
        """Give trials up where the closure returns no loss, or failed again and again; the same on all ranks.

        Args:
            weight: of the losses; inf where a closure returned none, nan where one raised an error.
            failure: what happened on this rank, if it was here.
        """
        if math.isfinite(weight):
            self.failed_trials = 0
            return
        self.failed_trials = safeguard.MOST_FAILURES if math.isinf(weight) else self.failed_trials + 1
        if self.failed_trials < safeguard.MOST_FAILURES or self.settings.safeguard == "loss":
            return
        reason = "it failed on another rank" if failure is None else f"{type(failure).__name__}: {failure}"
        with suppress(Warning):  # where warnings are errors, a notice must not end a step halfway
            warnings.warn(
                f"aadl judges candidates by the residual from now on, since the closure given to step cannot be "
                f"evaluated for its loss ({reason}); return the loss from the closure, as one number that takes no "
                f"gradients to compute, or pass safeguard='residual'",
                stacklevel=2,
            )

    # ---- bookkeeping -----------------------------------------------------------------------------------------------

    def _defer(self, numbers: Tensor, act: Callable[[list[float]], None]) -> None:
        """Have `act` called with numbers of the device when the host needs to know them."""
        self.words.append((Deferred(numbers), act))

    def _reject(self, cause: str) -> None:
        count(self.statistics["rejected"], cause)


def _jumps(history: History, weights: dict[str, float]) -> list[float]:
    """Length of the jump inside every column, in the norm of the mixing problem."""
    return [_length(column.jump, weights) for column in history.columns]


def _length(squares: dict[str, float], weights: dict[str, float]) -> float:
    return math.sqrt(sum(weights.get(kind, 0.0) * square for kind, square in squares.items()))


def on_host(number: Tensor) -> bool:
    """Whether reading it costs nothing."""
    return number.device.type == "cpu"


def count(counts: dict[str, int], cause: str) -> None:
    """One more of them."""
    counts[cause] = counts.get(cause, 0) + 1
