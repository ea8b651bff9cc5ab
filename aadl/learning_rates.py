"""Learning rates of an optimizer: as numbers, as means over a macro-step, and as one factor if they change together."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.candidate import LEARNING_RATE_BAND
from aadl.parameters import is_gradient_descent
from aadl.settings import Settings

WARM_UP = 1.05
"""A mean rate of more than this times the highest one before belongs to a warm-up."""


class RateReader:
    """Reads learning rates as numbers; a rate on a device is fetched again only after somebody wrote to it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, float]] = {}

    def read(self, groups: Sequence[dict[str, Any]]) -> list[float]:
        """One rate for every group: 1 where there is no "lr" to read, or None because the optimizer finds its own."""
        rates = [group.get("lr") for group in groups]
        return [self._number(i, rate) if is_rate(rate) else 1.0 for i, rate in enumerate(rates)]

    def _number(self, place: int, rate: Any) -> float:
        if not isinstance(rate, Tensor):
            return float(rate)
        if rate.device.type == "cpu":
            return float(rate.detach())
        tensor, version, number = self._known.get(place, (None, -1, 0.0))
        if tensor is not rate or version != rate._version:
            number = float(rate.detach())
            self._known[place] = rate, rate._version, number
        return number


@dataclass
class LearningRates:
    """Mean learning rates of macro-steps, in units of those of the first macro-step of the history.

    A column of another rate is brought to the present one (`aadl.candidate`), as long as all groups change by one
    factor within LEARNING_RATE_BAND.
    """

    factor: float = 1.0
    """Rate of the present macro-step, in units of the first one."""
    pair_factor: float | None = None
    """The same of the newest pair; None before the first one."""
    means: list[float] | None = None
    """Mean rates of the last macro-step by group."""
    first: list[float | None] = field(default_factory=list)
    """Rates of the first step of the running macro-step; None for a rate on a device, of which the last one counts."""
    sums: list[float | None] = field(default_factory=list)
    """Sums over the steps of the running macro-step, once the rates change within it."""
    highest: list[float] = field(default_factory=list)
    """Highest mean rates of macro-steps by group."""

    def __post_init__(self) -> None:
        self._reader = RateReader()
        self._seen: list[Any] | None = None
        self.is_dry = False
        """Whether the running step changes nothing, because all rates are zero."""
        self._is_record = False

    def state(self) -> dict[str, Any]:
        """Plain values, from which `LearningRates(**state)` continues."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def restart(self) -> None:
        """Begin with new units, for a history without pairs."""
        self.factor, self.means = 1.0, None

    def see(self, optimizer: Optimizer) -> None:
        """Look at the learning rates of the step that begins; rates on a device are not read."""
        rates = [group.get("lr") for group in optimizer.param_groups]
        try:
            are_other = rates != self._seen
        except RuntimeError:  # a tensor of several numbers has come
            are_other = True
        if are_other:
            self.is_dry = is_dry_step(optimizer)
            self._seen = rates if all(type(rate) is float for rate in rates) else None

    def add_step(self, optimizer: Optimizer, in_macro_step: int) -> None:
        """Add the rates of a step that has ended to its macro-step, of which it is the `in_macro_step`-th one."""
        rates = self._seen
        if rates is None:
            given = [group.get("lr") for group in optimizer.param_groups]
            rates = [rate if isinstance(rate, float) else None for rate in given]
        if in_macro_step == 1 or len(self.first) != len(rates):
            self.first, self.sums = rates, []
        elif self.sums or rates != self.first:
            before = in_macro_step - 1
            sums = self.sums or [None if rate is None else rate * before for rate in self.first]
            self.sums = [
                None if total is None or rate is None else total + rate for total, rate in zip(sums, rates, strict=True)
            ]

    def end_macro_step(self, groups: Sequence[dict[str, Any]], moving: set[int] | None, steps: int) -> bool:
        """Follow the mean rates of the macro-step that ends.

        Args:
            groups: parameter groups of the optimizer.
            moving: identities of the extrapolated parameters, whose groups count; None for all groups.
            steps: in a macro-step.

        Returns:
            Whether the history must start again, because no factor relates the residuals of both macro-steps.
        """
        rates = [
            mean
            for group, mean in zip(groups, self._means(groups, steps), strict=True)
            if "lr" in group and (moving is None or any(id(p) in moving for p in group["params"]))
        ]
        before = self.highest if len(self.highest) == len(rates) else rates
        self._is_record = any(rate > WARM_UP * high for rate, high in zip(rates, before, strict=True))
        self.highest = [max(pair) for pair in zip(rates, before, strict=True)]
        last, self.means = self.means, rates
        if last is None or rates == last:
            return False
        ratios = [new / old if old else math.inf for new, old in zip(rates, last, strict=True) if new != old or new]
        uniform = all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios)
        if uniform and all(1 / LEARNING_RATE_BAND <= ratio <= LEARNING_RATE_BAND for ratio in ratios):
            self.factor *= ratios[0] if ratios else 1.0
            return False
        self.factor = self.pair_factor = 1.0
        return True

    def warm_up(self, optimizer: Optimizer, settings: Settings) -> bool:
        """Whether the macro-step that has ended belongs to a warm-up, whose updates lead candidates astray.

        Those of single steps, which are proportional to their rate, do not, nor do those of gradient descent.
        """
        is_asked = bool(settings.safeguard) and settings.store_each_nth > 1
        return self._is_record and is_asked and not is_gradient_descent(optimizer)

    def _means(self, groups: Sequence[dict[str, Any]], steps: int) -> list[float]:
        rates = self._reader.read(groups)
        if len(self.sums) != len(rates):
            return rates
        return [rate if total is None else total / steps for rate, total in zip(rates, self.sums, strict=True)]


def is_rate(rate: Any) -> bool:
    """Whether this is one number."""
    return type(rate) is float or isinstance(rate, numbers.Real) or (isinstance(rate, Tensor) and rate.numel() == 1)


def is_dry_step(optimizer: Optimizer) -> bool:
    """Whether a step changes nothing: all rates are zero, as distributed checkpoints set them to create state."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(not is_rate(rate) or (isinstance(rate, torch.Tensor) and rate.is_cuda) for rate in rates):
        return False
    return bool(rates) and all(rate == 0 for rate in rates)
