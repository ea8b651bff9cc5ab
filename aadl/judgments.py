"""What becomes of the last candidate: it is judged by the residuals after it, and may be taken back.

All ranks that share a Gram matrix take the same branches. A decision that a device can carry out is carried out there;
the host reads it after the next optimizer step (`Judgments.settle`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl import acceptance
from aadl.acceptance import Candidate, Cause, LossRecord, Pause, count
from aadl.block import Tensors
from aadl.deferred import Deferred, handed, on_host
from aadl.history import KINDS, History
from aadl.mixing import host_tensor
from aadl.parameters import forget_curvature
from aadl.problem import MacroStep
from aadl.settings import Settings
from aadl.spare import Spare
from aadl.statistics import Statistics, anderson_statistics
from aadl.trial_loss import LossTrials

Place = Callable[[bool], None]
"""Called with whether the plain iterate returns; starts the next macro-step there, or at the mapped iterate."""
MOST_MOVES = 65_521
"""Bound of `Judgments.moves`, so that its square, summed over any number of ranks, is exact in float64."""


@dataclass
class Judgments:
    """What the decisions of one accelerator know, and what becomes of the last candidate.

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
    moved: bool = False
    """Whether it starts where somebody else has put the weights."""
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
        """Plain values for a checkpoint, which are those of this object as long as nobody copies them."""
        return {
            "statistics": self.statistics,
            "averaging": self.averaging,
            "pause": vars(self.pause),
            "direction_pause": vars(self.direction_pause),
            "accepted": None if self.accepted is None else vars(self.accepted),
            "confirmed": None if self.confirmed is None else vars(self.confirmed),
            "disturbed": self.disturbed,
            "moved": self.moved,
            "moves": self.moves,
            "reach": self.reach,
            "last_jump": self.last_jump,
            "record": vars(self.trials.record),
            "failed_trials": self.trials.failed,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from `state`; raises KeyError or TypeError if the saved values are damaged."""
        self.statistics = saved["statistics"]
        record, failed = LossRecord(**saved["record"]), int(saved["failed_trials"])
        self.trials = LossTrials(self.settings, self.statistics, record, failed)
        self.disturbed, self.reach = bool(saved["disturbed"]), float(saved["reach"])
        self.last_jump, self.moves = dict(saved["last_jump"]), int(saved["moves"])
        self.moved = bool(saved.get("moved"))
        if self.settings.average == "auto":
            self.averaging = bool(saved["averaging"])
        self.pause, self.direction_pause = Pause(**saved["pause"]), Pause(**saved["direction_pause"])
        self.accepted = None if saved["accepted"] is None else Candidate(**saved["accepted"])
        self.confirmed = None if saved["confirmed"] is None else Candidate(**saved["confirmed"])

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
        self.disturbed = self.moved = True
        if history.replicas and history.has_pair:
            self.moves = (self.moves * 31 + self.statistics["macro_steps"]) % MOST_MOVES + 1
        else:
            self.accepted, self.confirmed, self.last_jump = None, None, {}

    @property
    def is_on_trial(self) -> bool:
        """Whether a plain iterate may be put back, or the host does not know yet what a device has decided."""
        return self.accepted is not None or self.confirmed is not None or bool(self.deferred)

    def is_paused(self) -> bool:
        """Whether acceleration pauses now; counts it."""
        paused = self.statistics["macro_steps"] < max(self.pause.until, self.direction_pause.until)
        self.statistics["suspended"] += paused
        return paused

    # ---- the last candidate ----------------------------------------------------------------------------------------

    def judge(self, step: MacroStep, candidate: Candidate) -> None:
        """Judge the accepted candidate by the residual of the macro-step that began at it, and by its losses.

        The plain iterate returns where `acceptance.must_revert` says so.
        """
        numbers, sums = step.history.measurements_with([float(step.doubtful), float(self.moves > 0)])
        weights = handed(host_tensor([candidate.weights.get(kind, 0.0) for kind in KINDS]), numbers.device)
        square, along, rise = weights @ numbers[:, 0], numbers[0, 3], sums[2]
        square, along = torch.where(rise.isnan(), rise, square), torch.where(rise > 0, math.nan, along)
        if on_host(numbers):
            values = [float(square), float(along), *sums[:2].tolist(), *numbers[:, 2].tolist()]
            self._judged(step, candidate, taking(step, values[0]), values)
            return
        stays = (square <= acceptance.revert_bound(candidate)) & (along >= acceptance.overshoot_bound(candidate))
        returns = ~stays & (sums[0] < step.quorum) & (sums[1] == 0)
        step.history.put_back(returns, step.tensors)
        step.spare.put_back(returns & ~torch.isfinite(square))
        self.defer(
            torch.cat([torch.stack([square, along]), sums[:2], numbers[:, 2]]),
            lambda values: self._judged(step, candidate, step.history.start_from, values),
        )

    def _judged(self, step: MacroStep, candidate: Candidate, place: Place, values: list[float]) -> None:
        """Judge by ||f||^2, <f, s>, the ranks that doubt f, those with other starts, and ||s||^2 by kind."""
        square, along, doubts, moves, *jump = values
        self._note_jump(step.history, dict(zip(KINDS, jump, strict=True)))
        if not moves:
            self._stays(step, candidate, place, square, along, doubts >= step.quorum)

    def _stays(
        self, step: MacroStep, candidate: Candidate, place: Place, square: float, along: float, doubtful: bool
    ) -> bool:
        """Judge the accepted candidate by ||f||^2 and <f, s>; return whether it stays."""
        reverts = acceptance.must_revert(square, along, candidate)
        place(reverts and not doubtful)
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
            self._note_doubt(step.history)
        elif reverts:
            self._note_revert(step)
        else:
            self.confirmed = candidate
        if not math.isfinite(square):
            self.reset(Cause.NON_FINITE, step.history)

    def _look_again(self, step: MacroStep, doubtful: bool, is_finite: bool) -> None:
        """Put back the plain iterate before a confirmed candidate that the updates since then undo."""
        self._pause()
        self.change_reach(math.inf, overshot=True)
        self.last_jump = {}
        if doubtful:
            self._note_doubt(step.history)
        else:
            step.history.take(True, step.tensors)
            step.spare.put_back(not is_finite)
            self._note_revert(step)

    def leave(self, optimizer: Optimizer, history: History, tensors: Sequence[Tensors], spare: Spare | None) -> bool:
        """Put the plain iterate back amid the macro-step that began at a candidate; return whether one did.

        Args:
            spare: the rest of the optimizer's state from before that macro-step; None where it has not changed.
        """
        self.settle()
        if self.accepted is None:
            return False
        history.write_mapped(tensors)
        history.continue_from_mapped()
        if spare is not None:
            spare.put_back(True)
        self.accepted, self.disturbed, self.last_jump = None, False, {}
        self._pause()
        self.change_reach(math.inf, overshot=True)
        self.statistics["reverted"] += 1
        forget_curvature(optimizer)
        return True

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

    def _note_doubt(self, history: History) -> None:
        """Note that nothing was put back, because somebody may have written within the newest macro-step."""
        self.statistics["moved"] += 1
        for column in history.columns[-1:]:
            column.written = column.written or 0.0

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

    def defer(self, numbers: Tensor, act: Callable[[list[float]], None]) -> None:
        """Call `act` with numbers of the device as soon as the host needs them."""
        self.deferred.append((Deferred(numbers), act))

    def _reject(self, cause: Cause) -> None:
        count(self.statistics["rejected"], cause)


def taking(step: MacroStep, square: float) -> Place:
    """Puts the plain iterate into the tensors where it returns, and the spare state too where ||f||^2 is not finite."""

    def place(reverts: bool) -> None:
        step.history.take(reverts, step.tensors)
        step.spare.put_back(reverts and not math.isfinite(square))

    return place
