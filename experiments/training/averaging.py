"""Averages of the weights, which are evaluated in place of the trained ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage:
    """An average of the weights after each step beyond the interval `after`: the mean, or a `moving_average`."""

    def __init__(self, model: nn.Module, decay: float | None, after: int = 0) -> None:
        self._after = after
        self._average = AveragedModel(model)
        if decay is not None:
            update = moving_average(decay)
            # The counter that torch passes was sent to the device, and reading it would make the host wait.
            self._average.multi_avg_fn = lambda a, w, _: update(a, w, self._average.n_averaged)

    def covers(self, interval: int) -> bool:
        """Whether the steps of an interval, or 0 before the first, are averaged."""
        return interval > self._after

    @property
    def model(self) -> nn.Module:
        averaged: nn.Module = self._average.module
        return averaged

    def update(self, model: nn.Module) -> None:
        self._average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state)


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """`e <- d_n e + (1 - d_n) w` with `d_n = min(decay, (1 + n) / (10 + n))` after n averages.

    With a constant decay the random initial weights would weigh on the average for 1 / (1 - decay) steps and more, and
    the rival would look worse than it is.
    """

    def update(averages: Any, weights: Any, num_averaged: Any) -> None:
        count = float(num_averaged)
        torch._foreach_lerp_(averages, weights, 1.0 - min(decay, (1.0 + count) / (10.0 + count)))

    return update
