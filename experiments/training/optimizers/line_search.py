"""A line search for the strong Wolfe conditions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

ARMIJO = 1e-4
"""Of the first Wolfe condition: loss at t <= loss at 0 + ARMIJO t (slope at 0)."""


class LinePoint(NamedTuple):
    """A step length, and loss, slope and gradient of the line there."""

    step: float
    loss: float
    slope: float
    gradient: Tensor


def wolfe_point(
    evaluate: Callable[[float], LinePoint], start: LinePoint, step: float, curvature: float, max_evaluations: int
) -> tuple[LinePoint, int]:
    """A point that meets the strong Wolfe conditions, and the number of evaluations.

    The search interpolates by cubics within a bracket, and extrapolates while there is none. After `max_evaluations` it
    returns the lowest point that meets the first condition, or the start.

    Source: Nocedal and Wright, Numerical Optimization, algorithms 3.5 and 3.6.
    """
    low, high = start, None
    for count in range(1, max_evaluations + 1):
        trial = evaluate(step)
        previous = low
        if not trial.loss <= start.loss + ARMIJO * step * start.slope or trial.loss >= low.loss:
            high = trial
        elif abs(trial.slope) <= -curvature * start.slope:
            return trial, count
        else:
            if trial.slope * ((math.inf if high is None else high.step) - trial.step) >= 0:
                high = previous
            low = trial
        if high is None:
            step = min(max(_cubic_minimum(previous, low), 1.1 * low.step), 10 * low.step)
        else:
            step = _within(_cubic_minimum(low, high), low, high)
            if step in (low.step, high.step):
                return low, count  # no digit is left between them
    return low, max_evaluations


def _within(step: float, first: LinePoint, second: LinePoint) -> float:
    """The step, moved away from the ends of the bracket by at least a tenth of its length."""
    left, right = sorted((first.step, second.step))
    margin = (right - left) / 10
    return min(max(step, left + margin), right - margin)


def _cubic_minimum(first: LinePoint, second: LinePoint) -> float:
    """Minimum of the cubic through both points: the middle where there is none, inf for a straight line."""
    width = second.step - first.step
    mean = first.slope + second.slope - 3 * (first.loss - second.loss) / -width
    root = mean * mean - first.slope * second.slope
    if not 0 <= root < math.inf:  # NaN too
        return first.step + width / 2
    root = math.copysign(math.sqrt(root), width)
    below = second.slope - first.slope + 2 * root
    return second.step - width * (second.slope + root - mean) / below if below else math.inf
