"""How many steps lie between two accelerations by residuals, and whether momentum survives them."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHORTEST = 2
"""Steps: one step more often costs twice as much and gains nothing (docs/method.md)."""
HARM = 3.0
"""Growth of the sum of squares over an acceleration and the steps behind it from which the next one comes sooner."""
JUMP = 1.5
"""Growth of the mean square at a change of points from which the old points count as learned by heart."""
NORMALIZED = ("muon", "lion", "sign")
"""Parts of names of optimizers whose steps are as long whatever the momentum buffer holds."""


@dataclass
class Pace:
    """The period of the accelerations.

    Steps of the optimizer can undo what an acceleration has gained, and more: where a rate is stable at the weights
    before a candidate, it may not be at those after it. Then the next acceleration has to come sooner. Frequent
    accelerations on points that are soon exchanged learn these by heart: the mean square on the new points tells, and
    the period is the longest again.

    Args:
        longest: steps between two accelerations at the start, >= 1.
        adapts: whether the period changes at all.
        due: after this step the next acceleration falls.
    """

    longest: int
    adapts: bool
    due: int
    period: int = 0
    before: float = math.nan
    """Sum of squares where the last acceleration fell; nan where the points have changed since."""

    def __post_init__(self) -> None:
        self.period = self.period or self.longest

    def note_square(self, square: float) -> None:
        """Compare the sum of squares before an acceleration with that before the last one."""
        if self.adapts and square > HARM * self.before:
            self.period = max(min(SHORTEST, self.longest), self.period // 2)
        self.before = square

    def note_jump(self, jump: float) -> None:
        """Take note of the mean square on new points over that on the old ones, at about the same weights."""
        if self.adapts and jump > JUMP:
            self.period = self.longest

    def go_on(self, step: int) -> None:
        """An acceleration is due at this step; the next one a period later."""
        self.due = step + self.period

    @property
    def is_fast(self) -> bool:
        """Whether accelerations come more often than at the start."""
        return self.period < self.longest


def lets_go_of_momentum(setting: str, pace: Pace, optimizer: object) -> bool:
    """Whether momentum buffers are cleared where a candidate is accepted.

    Args:
        setting: "keep", "zero" or "auto": "zero" while accelerations are frequent, unless the optimizer normalizes.
        pace: of the accelerations.
        optimizer: whose steps are accelerated.
    """
    if setting != "auto":
        return setting == "zero"
    name = type(optimizer).__name__.lower()
    return pace.is_fast and not any(part in name for part in NORMALIZED)
