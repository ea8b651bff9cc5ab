"""What a user can do where no candidate is accepted: one warning, made from the counters."""

from __future__ import annotations

import warnings
from contextlib import suppress

from aadl.acceptance import Cause
from aadl.statistics import Statistics

EVENTS = 20
"""Fewest periods without an accepted candidate before the warning."""
STEPS = 400
"""Fewest steps before it: the first candidates of a good run are often rejected, also where periods are short."""

CURES: dict[str, str] = {
    Cause.BACKWARD: "the updates of a macro-step are dominated by noise or have no common direction: try larger "
    "batches, a larger store_each_nth (an epoch), or a smaller learning rate",
    Cause.LOSS: "candidates do not lower the loss of the closure (nothing lowers one that is not finite or does not "
    "depend on the weights): try a larger store_each_nth, or relaxation below 1",
    Cause.STOPPED: "the training loss has risen on the whole: look at the training first",
    Cause.CLOSURE: "the closure gives no loss in a trial: return the loss from it, or pass safeguard='residual'",
    Cause.RANK: "the updates are constant or zero up to rounding: short ones rise above it with a larger "
    "store_each_nth (10 by default) or parameters in float64, in others there is nothing to extrapolate",
    Cause.COEFFICIENTS: "the columns of the history are nearly dependent: try a smaller history_depth or a larger "
    "reg_acc",
    Cause.NON_FINITE: "updates are not finite: look at the training first",
    Cause.AVERAGING_OFF: "the updates oscillate too little for an average: pass average='always' to have it all the "
    "same",
    Cause.VOTE: "the ranks do not agree: see local_sgd",
    Cause.LEARNING_RATE: "the learning rates of the parameter groups change by different factors, or by more than "
    "fourfold at once: the history starts again each time",
    Cause.PARAMETERS_CHANGED: "the parameters of the optimizer come and go: the history starts again each time",
    Cause.AVERAGED: "the weights are averaged over the ranks before the history is long enough: try a smaller "
    "frequency",
    Cause.USER: "aadl.reset_history is called before the history is long enough",
    Cause.RESIDUALS: "candidates raise the sum of squares: try a larger reg_acc, or a smaller frequency",
    Cause.CHECK: "candidates fit the residuals and not those of check: hand over more residuals, or a larger reg_acc",
    Cause.STEPS: "the optimizer normalizes its steps, which are too long to keep what candidates gain: acceleration "
    "begins where the learning rate has fallen",
    Cause.POINTS: "the residuals differ where the weights are the same: take points that stay (residuals=fn), "
    "call aadl.reset_history when the points change, and have no dropout in them",
    Cause.RESUMED: "the pairs of another rank or depth were loaded: the history starts again each time",
    Cause.MOVED: "the weights are written to between steps: the history starts again each time, or, with observed "
    "residuals, nothing tells whether the points stay (pass residuals=fn), or, on several ranks, step is called "
    "where it writes nothing",
}
"""What to do about each cause."""


def main_cause(statistics: Statistics) -> str:
    """The cause with the largest count among rejections, resets and changes from outside; "" if all counts are zero."""
    counts = {**statistics["resets"], **statistics["rejected"], Cause.MOVED.value: statistics.get("moved", 0)}
    cause = max(counts, key=lambda name: counts[name])
    return cause if counts[cause] else ""


def warn_of_idleness(statistics: Statistics, periods: int = EVENTS) -> None:
    """Warn once, and name the main cause and its cure. Where warnings are errors, this must not end a step halfway.

    Args:
        statistics: the counters.
        periods: that have passed.
    """
    cause = main_cause(statistics)
    counts = f"{statistics['attempts']} attempts, rejected {statistics['rejected']}, resets {statistics['resets']}"
    with suppress(Warning):
        warnings.warn(
            f"aadl has accepted no candidate in {periods} periods ({counts}): "
            f"{CURES.get(cause, 'the history is too short for an attempt: try a smaller store_each_nth')}; "
            f"aadl.remove_acceleration(optimizer) saves the cost",
            stacklevel=2,
        )
