"""Judging a candidate: by the training loss before it is taken, by the next residual after it was taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

SUSPEND_ABOVE = 1.2
"""Trust ratio from which the linear model is not believed and acceleration pauses."""
REVERT_ABOVE = 2.0
"""Growth of the residual norm over an accelerated step from which the step is taken back."""
OVERSHOOT = 0.5
"""Of the slope along an accelerated step that may be left behind it with the other sign."""
FIRST_REACH, SHORTEST_REACH, LONGEST_REACH = 0.5, 1 / 64, 1.0
"""Of a candidate: its longest step in units of the way that the pairs behind it have made. Kept promises double it."""
LOSSES = 5
"""Whose mean tells the way of the training from the noise of batches."""
LONGEST_PAUSE = 64
"""Macro-steps; pauses after a broken promise double up to this."""
LONGEST_REFUSAL = 4
"""Periods; candidates that keep pointing back are tried this rarely."""
MOST_FAILURES = 3
"""Trials in a row that may fail before candidates are judged by the residual alone."""


@dataclass
class Pending:
    """What an accepted candidate promised: squares of residual norms, in the norm of the mixing problem."""

    predicted: float
    before: float
    noise: float
    weights: dict[str, float]
    advance: float = math.inf
    """How far the candidate goes along the last update, <x+ - g_k, f_k>; inf where nobody asks."""
    rate: float = 1.0
    """Factor of the learning rate that these belong to."""
    macro_step: int = 0
    """After which the candidate was taken."""

    def at(self, rate: float) -> Pending:
        """The same promise at another learning rate."""
        factor = rate / self.rate
        square = factor**2
        return replace(
            self, predicted=square * self.predicted, before=square * self.before, noise=square * self.noise,
            advance=factor * self.advance, rate=rate,
        )  # fmt: skip


@dataclass
class Pause:
    """Back-off: pauses double up to `longest` with every failure."""

    longest: int
    length: int = 0
    until: int = 0

    def extend(self, macro_step: int, unit: int = 1) -> None:
        """Double the pause, counted in `unit` macro-steps from the present one on."""
        self.length = min(self.longest, max(1, 2 * self.length))
        self.until = max(self.until, macro_step + self.length * unit)

    def shorten(self) -> None:
        """A kept promise halves the next pause."""
        self.length //= 2


@dataclass
class LossRecord:
    """Training losses at plain iterates, as trials have seen them: whether the training has gone back on the whole."""

    recent: list[float] = field(default_factory=list)
    lowest: float = math.inf
    """Of the means over LOSSES losses."""
    highest: float = -math.inf

    def note(self, loss: float) -> bool:
        """Whether the mean of the last LOSSES losses has risen from its lowest value by as much as that value is.

        Near zero that is next to nothing, so that the rise must also be a tenth of what the means have covered.
        """
        self.recent = [*self.recent, loss][-LOSSES:]
        mean = sum(self.recent) / len(self.recent)
        if len(self.recent) < LOSSES or not math.isfinite(mean):
            return False
        self.lowest, self.highest = min(self.lowest, mean), max(self.highest, mean)
        return mean > self.lowest + max(abs(self.lowest), 0.1 * (self.highest - self.lowest))


def trust_ratio(square: float, pending: Pending) -> float:
    """q = ||f_{k+1}|| / sqrt(predicted ||r||^2 + noise); near or below 1 where the linear model holds."""
    expected = pending.predicted + pending.noise
    if not math.isfinite(square):
        return math.inf
    return math.sqrt(square / expected) if expected > 0 else (math.inf if square > 0 else 0.0)


def revert_bound(pending: Pending) -> float:
    """The largest square of the residual norm that is put up with."""
    return REVERT_ABOVE**2 * (pending.before + pending.noise)


def overshoot_bound(pending: Pending) -> float:
    """The least <f_{k+1}, x+ - g_k> that is put up with: an update of this much back takes the step for too long."""
    return -OVERSHOOT * pending.advance


def must_revert(square: float, along: float, pending: Pending) -> bool:
    """Whether the residual grew so much (or is not finite), or points back so much, that the plain iterate returns."""
    return not (square <= revert_bound(pending) and along >= overshoot_bound(pending))
