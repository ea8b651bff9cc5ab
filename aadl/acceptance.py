"""What becomes of a candidate: every cause for which one is rejected, and every rule that decides.

When an acceleration is due, the history makes one attempt at a candidate x+. The rules apply in this order:

1. The mixing problem must give a candidate: `NON_FINITE`, `AVERAGING_OFF`, `RANK`, `COEFFICIENTS`.
2. The candidate must not point back against the update (`points_back`): `BACKWARD`.
3. With a closure, the training loss must fall (`cause_of_losses`): `LOSS`, `CLOSURE`, `STOPPED`. With local SGD the
   ranks must agree: `VOTE`. A candidate that passes is accepted.
4. The residual of the macro-step that begins at the candidate judges it. Above PAUSE_ABOVE of what was predicted,
   acceleration pauses; where `must_revert` holds, the plain iterate is put back. Losses of the training that have risen
   since (`aadl.losses`) count as a residual that points back, and ones that are not finite as one that is not finite.
5. Before the next attempt, `points_back_too_far` looks once more at all updates since the candidate.

Nonlinear GMRES evaluates the residuals at its candidate (`cause_of_residuals`): `RESIDUALS`, `CHECK`, `NON_FINITE`,
`STEPS`; `CLOSURE` where that raises an error, which goes on to the user.

`aadl.decisions` (1 to 3) and `aadl.judgments` (4 and 5) apply these rules for Anderson acceleration,
`aadl.nonlinear_gmres` for nonlinear GMRES;
docs/method.md says why each rule is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

PAUSE_ABOVE = 1.2
"""Trust ratio above which the linear model is not believed and acceleration pauses."""
REVERT_ABOVE = 2.0
"""Growth of the residual norm over an accelerated step above which the step is taken back."""
OVERSHOOT = 0.5
"""Part of the slope along an accelerated step that may be left behind the step with the other sign."""
MAXIMAL_COEFFICIENT_NORM = 1e8
"""Largest length of the coefficients, in units of unit columns."""
FIRST_REACH, SHORTEST_REACH, LONGEST_REACH = 0.5, 1 / 64, 1.0
"""Longest step of a candidate, in units of the way that the pairs behind it have made: at the start, and its bounds."""
LOSSES = 5
"""Number of losses whose mean separates the course of the training from the noise of batches."""
LONGEST_PAUSE = 64
"""Macro-steps; pauses after a failed prediction double up to this."""
LONGEST_DIRECTION_PAUSE = 4
"""Periods; while candidates keep pointing back, attempts become as rare as this."""
MOST_FAILED_TRIALS = 3
"""Trials in a row that may fail before the residual alone judges candidates."""


class Cause(str, Enum):
    """Why an attempt was rejected, or why the history was forgotten.

    `statistics["rejected"]` counts the rejections and `statistics["resets"]` the resets, both by these words.
    `aadl.advice` has a cure for each.
    """

    # Rejections, both methods
    RANK = "rank"
    """No usable column is left, or the update itself is rounding: there is nothing to extrapolate."""
    NON_FINITE = "non_finite"
    """An inner product, or the sum of squares at the candidate, is inf or nan. As a reset: the history held such
    numbers and was forgotten."""

    # Rejections, Anderson acceleration
    COEFFICIENTS = "coefficients"
    """The coefficients are longer than MAXIMAL_COEFFICIENT_NORM: the columns are nearly dependent."""
    AVERAGING_OFF = "averaging_off"
    """acceleration_type "identity" only averages, and the moving average is off."""
    BACKWARD = "backward"
    """The candidate points back against the update, <x+ - g_k, f_k> < 0: noise dominates (`points_back`)."""
    LOSS = "loss"
    """The loss of the closure at the candidate is not below that at the plain iterate."""
    CLOSURE = "closure"
    """The closure raised an error or returned no loss, on this rank or on another one."""
    STOPPED = "stopped"
    """The training loss has risen on the whole (`LossRecord`): acceleration stops for a long time."""
    VOTE = "vote"
    """Local SGD: at most half of the ranks have a candidate of their own to go to."""

    # Rejections, nonlinear GMRES
    RESIDUALS = "residuals"
    """The sum of squares at the candidate is not below that at x_k."""
    CHECK = "check"
    """The sum of squares of `check` at the candidate is not below that at x_k."""
    STEPS = "steps"
    """The optimizer normalizes its steps, and the sum of squares falls by less than they change it, or was predicted
    badly of late."""

    # Resets
    USER = "user"
    """`aadl.reset_history` was called."""
    PARAMETERS_CHANGED = "parameters_changed"
    """Parameters came, went, or changed their shape, dtype or device."""
    LEARNING_RATE = "learning_rate"
    """The learning rates of the groups changed by different factors, or by more than fourfold at once."""
    AVERAGED = "averaged"
    """Local SGD: the weights were averaged over the ranks."""
    POINTS = "points"
    """Nonlinear GMRES: the residuals differ at the same weights, because they belong to other points."""
    RESUMED = "resumed"
    """Nonlinear GMRES: a state without the pairs of this rank was loaded."""

    # Neither
    MOVED = "moved"
    """Somebody wrote to the weights between two steps; `statistics["moved"]` counts these."""


def count(counts: dict[str, int], cause: Cause) -> None:
    """Add one to the count of a cause."""
    counts[cause.value] = counts.get(cause.value, 0) + 1


@dataclass
class Candidate:
    """What is known of a candidate when it is made: squares of residual norms, in the norm of the mixing problem."""

    predicted: float
    """||f_k - DF gamma||^2, the prediction for the next residual."""
    before: float
    """||f_k||^2."""
    noise: float
    """Variance of one update, where the moving average is on; else 0."""
    weights: dict[str, float]
    """Weight of each kind of vector (parameters, momentum) in the norm."""
    advance: float = math.inf
    """<x+ - g_k, f_k>, the way of the candidate along the last update; inf where the direction is not tested."""
    rate: float = 1.0
    """Factor of the learning rate that these numbers belong to."""
    macro_step: int = 0
    """Number of the macro-step after which the candidate was made."""

    def at(self, rate: float) -> Candidate:
        """The same candidate, its numbers brought to another learning rate."""
        factor = rate / self.rate
        square = factor**2
        return replace(
            self, predicted=square * self.predicted, before=square * self.before, noise=square * self.noise,
            advance=factor * self.advance, rate=rate,
        )  # fmt: skip


@dataclass
class Pause:
    """Back-off: every failure doubles the next pause, up to `longest`."""

    longest: int
    length: int = 0
    until: int = 0
    """Macro-step at which acceleration goes on."""

    def extend(self, macro_step: int, unit: int = 1) -> None:
        """Double the pause, counted in `unit` macro-steps from the present one on."""
        self.length = min(self.longest, max(1, 2 * self.length))
        self.until = max(self.until, macro_step + self.length * unit)

    def shorten(self) -> None:
        """Halve the next pause after a prediction that held."""
        self.length //= 2


@dataclass
class LossRecord:
    """Training losses at plain iterates, as trials have seen them: they tell whether the training has gone back."""

    recent: list[float] = field(default_factory=list)
    lowest: float = math.inf
    """Of the means over LOSSES losses."""
    highest: float = -math.inf

    def note(self, loss: float) -> bool:
        """Add a loss; return whether the mean of the last LOSSES ones has risen from its lowest value by that value.

        Near zero a rise by that value means nothing, so the rise must also be a tenth of the range of the means.
        """
        self.recent = [*self.recent, loss][-LOSSES:]
        mean = sum(self.recent) / len(self.recent)
        if len(self.recent) < LOSSES or not math.isfinite(mean):
            return False
        self.lowest, self.highest = min(self.lowest, mean), max(self.highest, mean)
        return mean > self.lowest + max(abs(self.lowest), 0.1 * (self.highest - self.lowest))


# ---- before a candidate is accepted --------------------------------------------------------------------------------


def points_back(advance: float) -> bool:
    """Whether a candidate goes back against the update: <x+ - g_k, f_k> is negative, or nan."""
    return not advance >= 0


def cause_of_losses(plain: float, candidate: float, maximize: bool, weight: float) -> Cause | None:
    """Why the losses of a trial reject the candidate; None where the loss improves.

    Args:
        plain: loss at the plain iterate, a mean over the ranks.
        candidate: loss at the candidate.
        maximize: whether the optimizer maximizes the loss.
        weight: of both losses; not finite where the closure gave none (`trial_loss.mean_over_ranks`).
    """
    better = candidate > plain if maximize else candidate < plain
    if better:
        return None
    return Cause.LOSS if math.isfinite(weight) else Cause.CLOSURE


def cause_of_residuals(before: float, after: float) -> Cause:
    """Why a candidate of nonlinear GMRES that was not accepted was rejected.

    Args:
        before: ||r_k||^2.
        after: ||r(x+)||^2.
    """
    if not math.isfinite(after):
        return Cause.NON_FINITE
    return Cause.CHECK if after < before else Cause.RESIDUALS


# ---- after a candidate was accepted --------------------------------------------------------------------------------


def trust_ratio(square: float, candidate: Candidate) -> float:
    """q = ||f_{k+1}|| / sqrt(predicted + noise), near or below 1 where the linear model holds.

    Args:
        square: ||f_{k+1}||^2.
        candidate: the one at which the macro-step began.
    """
    expected = candidate.predicted + candidate.noise
    if not math.isfinite(square):
        return math.inf
    return math.sqrt(square / expected) if expected > 0 else (math.inf if square > 0 else 0.0)


def revert_bound(candidate: Candidate) -> float:
    """The largest ||f_{k+1}||^2 at which the candidate stays."""
    return REVERT_ABOVE**2 * (candidate.before + candidate.noise)


def overshoot_bound(candidate: Candidate) -> float:
    """The smallest <f_{k+1}, x+ - g_k> at which the candidate stays."""
    return -OVERSHOOT * candidate.advance


def points_back_too_far(along: float, candidate: Candidate) -> bool:
    """Whether later updates undo the candidate: the slope along its step has turned by OVERSHOOT or more."""
    return not along >= overshoot_bound(candidate)


def must_revert(square: float, along: float, candidate: Candidate) -> bool:
    """Whether the plain iterate must return: the residual grew too much or is not finite, or points back too far.

    Args:
        square: ||f_{k+1}||^2.
        along: <f_{k+1}, x+ - g_k>; nan where the losses of the training have risen.
        candidate: the one at which the macro-step began.
    """
    return not (square <= revert_bound(candidate) and along >= overshoot_bound(candidate))
