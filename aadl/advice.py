"""What a user can do where nothing is accepted: one warning, from the counters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

EVENTS = 20
"""Times that acceleration was due, none of them with an accepted candidate, before the warning."""

CURES = {
    "backward": "the updates of a macro-step are dominated by noise or have no common direction: try larger batches, a "
    "larger store_each_nth (an epoch), or a smaller learning rate",
    "loss": "candidates raise the loss of the closure: try a larger store_each_nth, or relaxation below 1",
    "stopped": "the training loss has risen on the whole: look at the training first",
    "closure": "the closure gives no loss in a trial: return the loss from it, or pass safeguard='residual'",
    "rank": "the updates are constant or zero up to rounding: there is nothing to extrapolate",
    "coefficients": "the columns of the history are nearly dependent: try a smaller history_depth or a larger reg_acc",
    "non_finite": "updates are not finite: look at the training first",
    "averaging_off": "the updates oscillate too little for an average: pass average='always' to have it all the same",
    "vote": "the ranks do not agree: see local_sgd",
    "learning_rate": "the learning rates of the parameter groups change by different factors, or by more than fourfold "
    "at once: the history starts again each time",
    "parameters_changed": "the parameters of the optimizer come and go: the history starts again each time",
    "averaged": "the weights are averaged over the ranks before the history is long enough: try a smaller frequency",
    "user": "aadl.reset_history is called before the history is long enough",
    "residuals": "candidates raise the sum of squares: try a larger reg_acc, or a smaller frequency",
    "check": "candidates fit the residuals and not those of check: hand over more residuals, or a larger reg_acc",
    "points": "the residuals differ where the weights are the same: take points that stay (residuals=fn), "
    "call aadl.reset_history when the points change, and have no dropout in them",
    "resumed": "the pairs of another rank or depth were loaded: the history starts again each time",
    "moved": "the weights are written to between steps: the history starts again each time",
}
"""By cause, as the counters name it."""


def main_cause(statistics: Mapping[str, Any]) -> str:
    """The cause with the largest count among rejections, resets and changes from outside; "" where nothing counts."""
    counts = {**statistics["resets"], **statistics["rejected"]} | {"moved": statistics.get("moved", 0)}
    cause = max(counts, key=lambda name: counts[name])
    return cause if counts[cause] else ""


def warn_of_idleness(statistics: Mapping[str, Any]) -> None:
    """One warning that names the cause and the cure; where warnings are errors, it must not end a step halfway."""
    cause = main_cause(statistics)
    counts = f"{statistics['attempts']} attempts, rejected {statistics['rejected']}, resets {statistics['resets']}"
    with suppress(Warning):
        warnings.warn(
            f"aadl has accepted no candidate in {EVENTS} periods ({counts}): "
            f"{CURES.get(cause, 'the history is too short for an attempt: try a smaller store_each_nth')}; "
            f"aadl.remove_acceleration(optimizer) saves the cost",
            stacklevel=2,
        )
