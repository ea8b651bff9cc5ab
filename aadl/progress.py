"""Counts where an accelerator stands between two steps, and warns where nothing is accelerated for long."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from aadl import advice
from aadl.attached import warn_once
from aadl.settings import Settings
from aadl.statistics import Statistics

ABANDONED = 10
"""Macro-steps abandoned in a row before a warning says so."""


@dataclass
class Progress:
    """Where an accelerator stands between two steps."""

    in_macro_step: int = 0
    """Steps of the running macro-step that have ended."""
    is_averaged: bool = False
    """Local SGD: the weights were averaged within the running macro-step, whose pair is no pair of the map."""
    abandoned_in_a_row: int = 0
    """Macro-steps that were abandoned since the last one that ended."""
    warned: bool = False
    """Whether a warning has named that."""
    accelerated_at: int = 0
    """Number of the macro-step of the last acceleration, accepted or not."""
    advised: bool = False
    """Whether the time for a first accepted candidate is over, and a warning was given if there was none."""
    moves_counters: bool = False
    """Whether the first step of a macro-step has moved a version counter of a parameter."""
    is_empty: bool = False
    """On several ranks, whether the steps of the running macro-step have written to no parameter."""
    unmarked_in_a_row: int = 0
    """First steps of macro-steps that wrote and moved no version counter, since the last one that did not write."""
    warmed_up: int = 0
    """Number of the last macro-step of a warm-up so far, within which nothing is attempted."""

    def warn_if_abandoned(self, optimizer: Optimizer) -> None:
        """Warn, once, where ABANDONED macro-steps in a row were abandoned."""
        if self.abandoned_in_a_row == ABANDONED and not self.warned:
            self.warned = True
            warn_once(
                f"the last {ABANDONED} macro-steps of this {type(optimizer).__name__} were abandoned, because its "
                f"parameters are written to between steps, neither after every step nor at equal distances: nothing is "
                f"accelerated that way; write at other times, or call aadl.accelerate with store_each_nth=1"
            )

    def advise(self, settings: Settings, statistics: Statistics, warm_up: bool) -> None:
        """Warn if none was accepted in advice.EVENTS periods of at least advice.STEPS, counted from a warm-up on."""
        if warm_up:
            self.warmed_up = statistics["macro_steps"]
        if self.advised:
            return
        waited = max(self.warmed_up, -(-settings.wait_iterations // settings.store_each_nth))
        periods = max(advice.EVENTS, -(-advice.STEPS // (settings.period * settings.store_each_nth)))
        if statistics["macro_steps"] - waited < periods * settings.period:
            return
        self.advised = True
        if not statistics["accepted"]:
            advice.warn_of_idleness(statistics, periods)
