"""The statistics of an accelerator: what it counts, and the last values that it saw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypedDict, cast


class CommonStatistics(TypedDict):
    """What all kinds of acceleration count. Last values are nan until there is one."""

    steps: int
    """Optimizer steps, without skipped and dry ones."""
    skipped_steps: int
    """Steps that a fused GradScaler skipped because of inf or nan, or that wrote to no parameter."""
    attempts: int
    """Mixing problems that were set up for a candidate."""
    accepted: int
    """Candidates that were accepted."""
    rejected: dict[str, int]
    """Attempts that changed nothing, by cause (`aadl.acceptance.Cause`)."""
    resets: dict[str, int]
    """How often the history was forgotten, by cause (`aadl.acceptance.Cause`)."""
    closure_evaluations: int
    """Calls of the closure for a trial."""
    gain: float
    """Anderson: predicted ||f_k - DF gamma|| / ||f_k||; nonlinear GMRES: predicted ||r_k - E gamma|| / ||r_k||."""
    trust_ratio: float
    """Anderson: ||f_{k+1}|| over the prediction, of the last candidate that was judged. Nonlinear GMRES: the decrease
    of ||r||^2 over the predicted one, of the last candidate."""
    condition_number: float
    """Of the columns scaled to unit length, in the last attempt."""
    numerical_rank: int
    """Eigenvalues that the last attempt kept."""
    coefficient_norm: float
    """Length of the coefficients in units of unit columns, in the last attempt."""


class Statistics(CommonStatistics, total=False):
    """`aadl.accelerator_of(optimizer).statistics`: plain numbers, counted from the start of the training.

    The first group of these keys belongs to Anderson acceleration and "identity", the second to "nonlinear_gmres".
    """

    # Anderson acceleration and "identity"
    macro_steps: int
    """Macro-steps that ended."""
    reverted: int
    """Accepted candidates that were taken back: the plain iterate returned."""
    suspensions: int
    """Pauses that began because a prediction failed."""
    suspended: int
    """Attempts that were left out because acceleration paused."""
    stops: int
    """Long pauses that began because the training as a whole was harmed."""
    moved: int
    """Macro-steps that began elsewhere than the last one ended, or were abandoned, because somebody wrote to the
    weights. Nonlinear GMRES has it as well: accelerations after which somebody wrote to the weights before the next
    step, whose residuals then do not tell whether the points have stayed."""
    relative_standard_deviation: float
    """Between consecutive updates, in the last attempt: 0 for parallel updates, 1 for independent ones."""
    averaging: bool
    """Whether the moving average was on in the last attempt."""

    # "nonlinear_gmres"
    residual_evaluations: int
    """Calls of `residuals` and `check`."""
    damping: float
    """Levenberg-Marquardt factor relative to unit columns."""
    period: float
    """Steps between two accelerations."""


COUNTERS = ("steps", "skipped_steps", "attempts", "accepted", "closure_evaluations")
LAST_VALUES = ("gain", "trust_ratio", "condition_number", "coefficient_norm")


def anderson_statistics(averaging: bool) -> Statistics:
    """Statistics of Anderson acceleration before the first step."""
    counters = "macro_steps", "reverted", "suspensions", "suspended", "moved", "stops"
    statistics = _statistics(counters, ("relative_standard_deviation",))
    statistics["averaging"] = averaging
    return statistics


def residual_statistics() -> Statistics:
    """Statistics of nonlinear GMRES before the first step."""
    return _statistics(("residual_evaluations", "moved"), ("damping", "period"))


def _statistics(counters: Iterable[str], last_values: Iterable[str]) -> Statistics:
    """The common statistics and some more, before the first step."""
    counts = dict.fromkeys((*COUNTERS, *counters), 0)
    values = dict.fromkeys((*LAST_VALUES, *last_values), math.nan)
    return cast("Statistics", {**counts, **values, "numerical_rank": 0, "rejected": {}, "resets": {}})
