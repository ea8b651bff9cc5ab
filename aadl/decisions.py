"""Decisions of Anderson acceleration: when an acceleration is due, and how its candidate is made, judged and taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aadl import acceptance, smoothing
from aadl.acceptance import Candidate, Cause
from aadl.candidate import coefficients_of
from aadl.deferred import on_host
from aadl.judgments import Judgments, taking
from aadl.mixing import host_tensor
from aadl.parameters import forget_curvature
from aadl.problem import MacroStep, Problem, leads_far, problem_of


class Decisions(Judgments):
    """The decisions of one accelerator, which apply the rules of `aadl.acceptance`."""

    def accelerate(self, step: MacroStep, accepted: Candidate | None) -> None:
        """Judge the last candidate and make the next one, from one Gram matrix; an acceleration is due.

        With local SGD every rank has a Gram matrix of its own, and all ranks take part in the vote.

        Args:
            step: the macro-step that has ended.
            accepted: the candidate at which it began, at the present learning rate, if any.
        """
        local_sgd, history = self.settings.local_sgd, step.history
        if self.moves:
            accepted, self.confirmed, self.last_jump = None, None, {}
        if local_sgd and step.closure is not None:  # nothing was predicted for an average
            accepted = None
        problem = problem_of(step, accepted, self.moves)
        if self.confirmed is None:
            self._note_jump(history, problem.jump)
        confirmed = None if self.confirmed is None else self.confirmed.at(step.rate)
        self.confirmed, self.moves = None, 0
        if problem.is_written:
            newest = sum(column.macro_step > step.since for column in history.columns)
            far = problem.here <= newest or leads_far(problem.gram, newest)
            self.forget_last(history, len(history.columns) if far else newest)
            return
        square = problem.square if problem.is_finite else math.inf
        ready = accepted is None or self._stays(
            step, accepted, taking(step, square), square, problem.along, problem.is_doubtful
        )
        finite = problem.is_finite
        if ready and confirmed is not None:
            if not finite or acceptance.points_back_too_far(problem.along, confirmed):
                self._look_again(step, problem.is_doubtful, finite)
                ready = False
            if not finite:
                self.reset(Cause.NON_FINITE, history)
        if ready and (local_sgd or accepted is not None):
            ready = not self.is_paused()
        made = self._attempt(step, problem) if ready and history.columns and not problem.is_warm_up else None
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
        first = len(history.columns) - problem.here
        consecutive = [column.consecutive and place >= first for place, column in enumerate(history.columns)]
        self._switch_averaging(smoothing.relative_standard_deviation(gram, consecutive))
        if settings.acceleration_type == "identity" and not self.averaging:
            self._reject(Cause.AVERAGING_OFF)
            return None
        macro_step = statistics["macro_steps"]
        coefficients = coefficients_of(
            step,
            problem,
            macro_step=macro_step,
            averaging=self.averaging,
            reach=self.reach,
            last_jump=self.last_jump,
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
        checked = settings.safeguard and settings.acceleration_type != "identity"
        self.confirmed = None  # the candidate takes the place of the iterate that could be put back
        advance = history.combine(
            solution.gamma,
            coefficients.residual,
            coefficients.residual_factor,
            solution.mean if checked else None,
            problem.fused,
        )
        noise = smoothing.noise_square(gram, consecutive) if self.averaging else 0.0
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
