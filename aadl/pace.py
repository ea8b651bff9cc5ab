"""The period of nonlinear GMRES: steps between two accelerations, and whether momentum survives an acceleration."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHORTEST = 2
"""Steps: one step more often costs twice as much and gains nothing (docs/method.md)."""
MOST_DOUBLINGS = 4
"""Of the period, where points are learned by heart."""
HARM = 3.0
"""Growth of the sum of squares over an acceleration and the steps behind it from which the next one comes sooner."""
JUMP, NO_JUMP = 1.5, 1.2
"""Growth of the mean square at a change of points above which the old points count as learned by heart, and below
which they do not."""
NORMALIZED = ("muon", "lion", "sign")
"""Parts of names of optimizers whose steps are as long whatever the momentum buffer holds."""


@dataclass
class Pace:
    """The period of the accelerations.

    Steps of the optimizer can undo what an acceleration has gained, and more: where a rate is stable at the weights
    before a candidate, it may not be at those after it. Then the next acceleration has to come sooner. Points that are
    soon exchanged can be learned by heart, by the optimizer or by the accelerations: the mean square on the new points
    tells. Then a better fit of the present ones is worth little, and accelerations become rare.

    Args:
        usual: steps between two accelerations at the start, >= 1.
        adapts: whether the period changes at all.
        due: after this step the next acceleration falls.
    """

    usual: int
    adapts: bool
    due: int
    period: int = 0
    before: float = math.nan
    """Sum of squares where the last acceleration fell; nan where the points have changed since."""

    def __post_init__(self) -> None:
        self.period = self.period or self.usual

    def note_square(self, square: float, normalized: bool) -> None:
        """Compare the sum of squares before an acceleration with that before the last one.

        Args:
            square: ||r_k||^2.
            normalized: whether the optimizer normalizes its steps, which undo gains without being unstable.
        """
        if self.adapts and not normalized and self.period <= self.usual and square > HARM * self.before:
            self.period = max(min(SHORTEST, self.usual), self.period // 2)
        self.before = square

    def note_jump(self, jump: float) -> None:
        """Adapt to the mean square on new points over that on the old ones, at about the same weights; 0: no change."""
        if not self.adapts or jump == 0:
            return
        if jump > JUMP:
            longest = 2**MOST_DOUBLINGS * self.usual
            self.period = min(2 * self.period, longest) if self.period >= self.usual else self.usual
        elif jump < NO_JUMP and self.period > self.usual:
            self.period = max(self.period // 2, self.usual)

    def go_on(self, step: int) -> None:
        """Note that an acceleration was made at this step; the next one is due a period later."""
        self.due = step + self.period

    @property
    def is_fast(self) -> bool:
        """Whether accelerations come more often than at the start."""
        return self.period < self.usual


def is_normalized(optimizer: object) -> bool:
    """Whether the length of an optimizer's steps does not depend on its momentum buffer."""
    name = type(optimizer).__name__.lower()
    return any(part in name for part in NORMALIZED)


def clears_momentum(setting: str, pace: Pace, optimizer: object) -> bool:
    """Whether momentum buffers are cleared when a candidate is accepted.

    Args:
        setting: "keep", "zero" or "auto": "zero" while accelerations are frequent, unless the optimizer normalizes.
        pace: of the accelerations.
        optimizer: whose steps are accelerated.
    """
    return setting == "zero" or (setting == "auto" and pace.is_fast and not is_normalized(optimizer))
