"""Decisions of Anderson acceleration: they apply the rules of `aadl.acceptance` and keep what the rules need.

All ranks that share a Gram matrix take the same branches. A decision that a device can carry out is carried out there;
the host reads it after the next optimizer step (`Decisions.settle`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aadl import acceptance, smoothing
from aadl.acceptance import Candidate, Cause, LossRecord, Pause, count
from aadl.candidate import coefficients_of
from aadl.deferred import Deferred, on_host
from aadl.history import KINDS, History
from aadl.mixing import host_tensor
from aadl.parameters import forget_curvature
from aadl.problem import MacroStep, Problem, problem_of
from aadl.settings import Settings
from aadl.statistics import Statistics, anderson_statistics
from aadl.trial_loss import LossTrials

MOST_MOVES = 65_521
"""Bound of `Decisions.moves`, so that its square, summed over any number of ranks, is exact in float64."""


@dataclass
class Decisions:
    """State of the decisions of one accelerator.

    Args:
        settings: the validated arguments.
    """

    settings: Settings
    statistics: Statistics = field(init=False)
    averaging: bool = False
    pause: Pause = field(default_factory=lambda: Pause(acceptance.LONGEST_PAUSE))
    """After predictions that failed."""
    direction_pause: Pause = field(default_factory=lambda: Pause(acceptance.LONGEST_DIRECTION_PAUSE))
    """While candidates keep pointing back."""
    accepted: Candidate | None = None
    """The last accepted candidate, until the residual of the macro-step that began at it judges it."""
    confirmed: Candidate | None = None
    """A candidate that this residual has confirmed, until the second look before the next attempt."""
    reach: float = acceptance.FIRST_REACH
    """Longest step of a candidate, in units of the way that the pairs behind it have made."""
    last_jump: dict[str, float] = field(default_factory=dict)
    """By kind of vector, the squared step of the last candidate, if its prediction held."""
    disturbed: bool = False
    """Whether the running macro-step starts elsewhere than the last one ended."""
    moves: int = 0
    """A number that tells which macro-steps since the last acceleration started elsewhere than the ones before had
    ended, on this rank; 0 for none."""
    deferred: list[tuple[Deferred, Callable[[list[float]], None]]] = field(default_factory=list)
    """Numbers on their way from the device, and what the host does with them."""

    def __post_init__(self) -> None:
        self.averaging = self.settings.average == "always"
        self.statistics = anderson_statistics(self.averaging)
        self.trials = LossTrials(self.settings, self.statistics)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, under the names that the format of saved states has."""
        return {
            "statistics": copy.deepcopy(self.statistics),
            "averaging": self.averaging,
            "pause": vars(self.pause),
            "refusals": vars(self.direction_pause),
            "pending": None if self.accepted is None else vars(self.accepted),
            "watched": None if self.confirmed is None else vars(self.confirmed),
            "disturbed": self.disturbed,
            "moves": self.moves,
            "reach": self.reach,
            "last_jump": self.last_jump,
            "record": vars(self.trials.record),
            "failed_trials": self.trials.failed,
        }

    @staticmethod
    def restored(settings: Settings, saved: dict[str, Any]) -> Decisions:
        """Decisions that continue from `state`; raises KeyError or TypeError if the saved values are damaged."""
        decisions = Decisions(settings)
        decisions.statistics = copy.deepcopy(saved["statistics"])
        record, failed = LossRecord(**saved["record"]), int(saved["failed_trials"])
        decisions.trials = LossTrials(settings, decisions.statistics, record, failed)
        decisions.disturbed, decisions.reach = bool(saved["disturbed"]), float(saved["reach"])
        decisions.last_jump, decisions.moves = dict(saved["last_jump"]), int(saved["moves"])
        if settings.average == "auto":
            decisions.averaging = bool(saved["averaging"])
        decisions.pause, decisions.direction_pause = Pause(**saved["pause"]), Pause(**saved["refusals"])
        decisions.accepted = None if saved["pending"] is None else Candidate(**saved["pending"])
        decisions.confirmed = None if saved["watched"] is None else Candidate(**saved["watched"])
        return decisions

    def settle(self) -> None:
        """Apply the decisions that the device has made."""
        while self.deferred:
            numbers, act = self.deferred.pop(0)
            act(numbers.values())

    def reset(self, cause: Cause, history: History | None) -> None:
        """Forget the pairs and count why."""
        count(self.statistics["resets"], cause)
        self.accepted, self.confirmed, self.last_jump = None, None, {}
        if history is not None:
            history.clear(wipe=cause is Cause.NON_FINITE)

    def forget_last(self, history: History, count: int) -> None:
        """Forget the newest columns and the pair, because somebody wrote within their macro-steps."""
        self.statistics["moved"] += 1
        self.accepted, self.disturbed = None, True
        history.forget_last(count)

    def start_elsewhere(self, history: History) -> None:
        """Note that the running macro-step starts where somebody has put the weights; such a start judges no candidate.

        Replicas may have been put in different places, or some of them only. Each keeps its candidates until the ranks
        exchange data, because all of them must take part in the same sums.
        """
        self.disturbed = True
        if history.replicas and history.has_pair:
            self.moves = (self.moves * 31 + self.statistics["macro_steps"]) % MOST_MOVES + 1
        else:
            self.accepted = self.confirmed = None

    def is_paused(self) -> bool:
        """Whether acceleration pauses now; counts it."""
        paused = self.statistics["macro_steps"] < max(self.pause.until, self.direction_pause.until)
        self.statistics["suspended"] += paused
        return paused

    # ---- the last candidate ----------------------------------------------------------------------------------------

    def judge(self, step: MacroStep, candidate: Candidate) -> None:
        """Judge the accepted candidate by the residual of the macro-step that began at it.

        The plain iterate returns where `acceptance.must_revert` says so.
        """
        numbers, sums = step.history.measurements_with([float(step.doubtful), float(self.moves > 0)])
        weights = numbers.new_zeros(len(KINDS)) if not on_host(numbers) else host_tensor([0.0] * len(KINDS))
        for place, kind in enumerate(KINDS):
            weights[place] = candidate.weights.get(kind, 0.0)
        square, along = weights @ numbers[:, 0], numbers[0, 3]
        if on_host(numbers):
            doubts, moves = sums.tolist()
            self._note_jump(step.history, dict(zip(KINDS, numbers[:, 2].tolist(), strict=True)))
            if not moves:
                self._stays(step, candidate, float(square), float(along), doubts >= step.quorum)
            return
        stays = (square <= acceptance.revert_bound(candidate)) & (along >= acceptance.overshoot_bound(candidate))
        step.history.put_back(~stays & (sums[0] < step.quorum) & (sums[1] == 0), step.tensors)
        self.defer(
            torch.cat([torch.stack([square, along]), sums, numbers[:, 2]]),
            lambda values: self._judged_on_device(step, candidate, *values),
        )

    def _judged_on_device(
        self,
        step: MacroStep,
        candidate: Candidate,
        square: float,
        along: float,
        doubts: float,
        moves: float,
        *jump: float,
    ) -> None:
        """Note what the device has decided about the accepted candidate."""
        self._note_jump(step.history, dict(zip(KINDS, jump, strict=True)))
        if moves:
            return
        doubtful = doubts >= step.quorum
        step.history.start_from(kept=acceptance.must_revert(square, along, candidate) and not doubtful)
        self._note_judgment(step, candidate, square, along, doubtful)

    def _stays(self, step: MacroStep, candidate: Candidate, square: float, along: float, doubtful: bool) -> bool:
        """Judge the accepted candidate on the host; return whether it stays."""
        reverts = acceptance.must_revert(square, along, candidate)
        step.history.take(reverts and not doubtful, step.tensors)
        self._note_judgment(step, candidate, square, along, doubtful)
        return not reverts

    def _note_judgment(
        self, step: MacroStep, candidate: Candidate, square: float, along: float, doubtful: bool
    ) -> None:
        """Count a judgment, change the reach, and pause acceleration where the prediction failed."""
        self.statistics["trust_ratio"] = ratio = acceptance.trust_ratio(square, candidate)
        reverts = acceptance.must_revert(square, along, candidate)
        if ratio > acceptance.PAUSE_ABOVE or reverts:
            self._pause()
        else:
            self.pause.shorten()
        overshot = reverts or (along < 0 and math.isfinite(candidate.advance))
        self.change_reach(ratio, overshot)
        held = ratio <= acceptance.PAUSE_ABOVE and not overshot
        self.last_jump = step.history.columns[-1].jump if held and step.history.columns else {}
        if reverts and doubtful:
            self.forget_last(step.history, 1)
        elif reverts:
            self._note_revert(step)
        else:
            self.confirmed = candidate
        if not math.isfinite(square):
            self.reset(Cause.NON_FINITE, step.history)

    def _look_again(self, step: MacroStep, doubtful: bool) -> None:
        """Put back the plain iterate before a confirmed candidate that the updates since then undo."""
        self._pause()
        self.change_reach(math.inf, overshot=True)
        self.last_jump = {}
        if doubtful:
            self.forget_last(step.history, 1)
        else:
            step.history.take(True, step.tensors)
            self._note_revert(step)

    def change_reach(self, ratio: float, overshot: bool) -> None:
        """Allow longer steps after a prediction that held, and shorter ones after one that failed."""
        if overshot and self.reach == acceptance.SHORTEST_REACH:
            self._stop()
            return
        factor = 0.25 if overshot else 2.0 if ratio <= acceptance.PAUSE_ABOVE else 0.5
        self.reach = min(acceptance.LONGEST_REACH, max(acceptance.SHORTEST_REACH, factor * self.reach))

    def _pause(self) -> None:
        self.pause.extend(self.statistics["macro_steps"])
        self.statistics["suspensions"] += 1

    def _stop(self) -> None:
        """Leave the training alone until it is twice as long: harm can come back a logarithmic number of times."""
        self.statistics["stops"] += 1
        self.pause.until = 2 * self.statistics["macro_steps"]
        self.reach, self.trials.record = acceptance.FIRST_REACH, LossRecord()

    def _note_revert(self, step: MacroStep) -> None:
        """Note that the plain iterate was put back."""
        self.statistics["reverted"] += 1
        self.disturbed = True
        forget_curvature(step.optimizer)

    def note_jump(self, history: History) -> None:
        """Note the jump inside the newest column, where neither a judgment nor an attempt does."""
        if history.columns:
            column = history.columns[-1]
            self.defer(
                history.measurements()[:, 2],
                lambda values: setattr(column, "jump", dict(zip(KINDS, values, strict=True))),
            )

    def _note_jump(self, history: History, jump: dict[str, float]) -> None:
        if history.columns:
            history.columns[-1].jump = jump

    # ---- the next candidate ----------------------------------------------------------------------------------------

    def accelerate(self, step: MacroStep, accepted: Candidate | None) -> None:
        """Judge the last candidate and make the next one, from one Gram matrix; an acceleration is due.

        With local SGD every rank has a Gram matrix of its own, and all ranks take part in the vote.

        Args:
            step: the macro-step that has ended.
            accepted: the candidate at which it began, at the present learning rate, if any.
        """
        local_sgd, history = self.settings.local_sgd, step.history
        if self.moves:
            accepted = self.confirmed = None
        if local_sgd and step.closure is not None:  # nothing was predicted for an average
            accepted = None
        problem = problem_of(step, accepted, self.moves)
        if self.confirmed is None:
            self._note_jump(history, problem.jump)
        confirmed = None if self.confirmed is None else self.confirmed.at(step.rate)
        self.confirmed, self.moves = None, 0
        if problem.is_written:
            self.forget_last(history, sum(column.macro_step > step.since for column in history.columns))
            return
        square = problem.square if problem.is_finite else math.inf
        ready = accepted is None or self._stays(step, accepted, square, problem.along, problem.is_doubtful)
        undone = confirmed is not None and acceptance.points_back_too_far(problem.along, confirmed)
        if ready and undone and problem.is_finite:
            self._look_again(step, problem.is_doubtful)
            ready = False
        if ready and (local_sgd or accepted is not None):
            ready = not self.is_paused()
        made = self._attempt(step, problem) if ready and history.columns else None
        if local_sgd:
            self._vote(step, made)
        elif made is not None:
            self._decide(step, *made)

    def _attempt(self, step: MacroStep, problem: Problem) -> tuple[Candidate, Tensor | None] | None:
        """Solve the mixing problem and write a candidate beside the parameters.

        Returns:
            The candidate, and on the device how far it goes along the update (None where nobody tests that); or None
            where there is no candidate, with the cause counted.
        """
        statistics, settings, history, gram = self.statistics, self.settings, step.history, problem.gram
        statistics["attempts"] += 1
        if not problem.is_finite:
            self._reject(Cause.NON_FINITE)
            self.reset(Cause.NON_FINITE, history)
            return None
        consecutive = [column.consecutive for column in history.columns]
        self._switch_averaging(smoothing.relative_standard_deviation(gram, consecutive))
        if settings.acceleration_type == "identity" and not self.averaging:
            self._reject(Cause.AVERAGING_OFF)
            return None
        factors = [step.rate / column.learning_rate for column in history.columns]
        coefficients = coefficients_of(
            gram,
            factors=factors,
            changes=[column.earlier_rate / step.rate - 1 for column in history.columns],
            jumps=[_length(column.jump, problem.weights) for column in history.columns],
            last_jump=_length(self.last_jump, problem.weights),
            reach=self.reach,
            ages=[statistics["macro_steps"] - column.macro_step for column in history.columns],
            averaging=self.averaging,
            settings=settings,
        )
        solution = coefficients.mixing
        statistics["numerical_rank"] = solution.numerical_rank
        statistics["condition_number"] = solution.condition_number
        statistics["coefficient_norm"] = solution.coefficient_norm
        if coefficients.rejected is not None:
            self._reject(coefficients.rejected)
            return None
        statistics["gain"] = math.sqrt(coefficients.predicted / gram.square) if gram.square > 0 else math.nan
        beta = settings.relaxation
        scaled = host_tensor(factors) * solution.gamma
        checked = settings.safeguard and settings.acceleration_type != "identity"
        self.confirmed = None  # the candidate takes the place of the iterate that could be put back
        advance = history.combine(
            solution.gamma,
            (scaled - solution.gamma) - (1 - beta) * scaled,
            1 - beta,
            solution.mean if checked else None,
            problem.fused,
        )
        noise = smoothing.noise_square(gram, consecutive) if self.averaging else 0.0
        macro_step = statistics["macro_steps"]
        candidate = Candidate(
            coefficients.predicted, gram.square, noise, problem.weights, rate=step.rate, macro_step=macro_step
        )
        return candidate, advance

    def _switch_averaging(self, deviation: float) -> None:
        """Switch the moving average on or off by the relative standard deviation of the updates."""
        self.statistics["relative_standard_deviation"] = deviation
        if self.settings.average == "auto":
            self.averaging = smoothing.switch(self.averaging, deviation, self.settings.average_tolerance)
        self.statistics["averaging"] = self.averaging

    def _decide(self, step: MacroStep, candidate: Candidate, advance: Tensor | None) -> None:
        """Accept or reject a candidate, the same on all ranks; the plain iterate stays where it is rejected."""
        at_once = isinstance(step.optimizer, torch.optim.LBFGS)  # whose state changes with the decision
        if advance is not None and not on_host(advance) and step.closure is None and not at_once:
            step.history.take(advance >= 0, step.tensors)
            self.defer(advance, lambda values: self._conclude_direction(step, candidate, values[0]))
            return
        if advance is not None:
            candidate.advance = float(advance)
            if acceptance.points_back(candidate.advance):
                step.history.continue_from_mapped()
                self._conclude(step, candidate, Cause.BACKWARD)
                return
        if step.closure is not None:
            self._conclude(step, candidate, self._cause_of_loss(step, step.closure))
        else:
            step.history.take(True, step.tensors)
            self._conclude(step, candidate, None)

    def _conclude_direction(self, step: MacroStep, candidate: Candidate, advance: float) -> None:
        """Note what the device has decided about a candidate by its direction."""
        candidate.advance = advance
        self._conclude(step, candidate, Cause.BACKWARD if acceptance.points_back(advance) else None)

    def _vote(self, step: MacroStep, made: tuple[Candidate, Tensor | None] | None) -> None:
        """Decide together with ranks whose weights differ.

        By the residual: the ranks vote, and where more than half of them have a candidate to go to, these go to theirs.
        By the loss: the candidates are averaged over the ranks (a rank without one brings its plain iterate), and all
        ranks go to the average where its mean loss is below that of the averaged plain iterates.
        """
        candidate, advance = made or (None, None)
        willing = candidate is not None and (advance is None or not acceptance.points_back(float(advance)))
        if step.closure is not None:
            step.history.average(willing, step.ranks, step.tensors)
            self.statistics["attempts"] += candidate is None
            self._conclude(step, None, self._cause_of_loss(step, step.closure))
            return
        votes = float(step.ranks.total(host_tensor(float(willing))))
        agreed = willing and 2 * votes > step.ranks.size
        if candidate is not None:
            step.history.take(agreed, step.tensors)
            self._conclude(step, candidate, None if agreed else Cause.VOTE if willing else Cause.BACKWARD)

    def _cause_of_loss(self, step: MacroStep, closure: Callable[[], Any]) -> Cause | None:
        """Place the candidate; where the loss rejects it, put the plain iterate back and return why."""
        cause: Cause | None = Cause.CLOSURE
        try:
            cause = self.trials.cause_of_rejection(
                closure, step.optimizer, lambda: step.history.take(True, step.tensors), step.loss_weight, step.ranks
            )
        except BaseException:
            self._reject(Cause.CLOSURE)
            raise
        finally:
            if cause is not None:
                step.history.write_mapped(step.tensors)
                step.history.continue_from_mapped()
        if cause is Cause.STOPPED:
            self._stop()
        return cause

    def _conclude(self, step: MacroStep, candidate: Candidate | None, cause: Cause | None) -> None:
        """Count a decision.

        Args:
            step: the macro-step that has ended.
            candidate: the candidate, or None for an average over the ranks, of which nothing is predicted.
            cause: why it was rejected; None where it was accepted.
        """
        if cause is not None:
            self._reject(cause)
            if cause is Cause.BACKWARD:
                self.direction_pause.extend(self.statistics["macro_steps"], self.settings.period)
            return
        self.direction_pause.length = 0
        self.statistics["accepted"] += 1
        self.disturbed = True
        self.accepted = candidate if self.settings.safeguard else None
        forget_curvature(step.optimizer)

    def defer(self, numbers: Tensor, act: Callable[[list[float]], None]) -> None:
        """Call `act` with numbers of the device as soon as the host needs them."""
        self.deferred.append((Deferred(numbers), act))

    def _reject(self, cause: Cause) -> None:
        count(self.statistics["rejected"], cause)


def _length(squares: dict[str, float], weights: dict[str, float]) -> float:
    """Length of a vector in the norm of the mixing problem, from the squares of its parts."""
    return math.sqrt(sum(weights.get(kind, 0.0) * square for kind, square in squares.items()))
