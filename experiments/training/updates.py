"""How much consecutive updates of the weights differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


class Updates:
    """Relative standard deviation of consecutive updates u_k = x_{k+1} - x_k, pooled over an epoch.

    For two neighbors the variance over the squared mean is `||u_{k+1} - u_k||^2 / ||u_{k+1} + u_k||^2`; pooled,

        s^2 = sum_k ||u_{k+1} - u_k||^2 / sum_k ||u_{k+1} + u_k||^2.

    Aligned updates give 0, independent ones of zero mean 1, alternating ones more. Pairs reach across epochs, because
    an epoch of a single batch has no pair of its own.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._start: Tensor | None = None
        self._sums = [0.0, 0.0]

    def before(self, model: nn.Module) -> None:
        self._start = parameters_to_vector(model.parameters()).detach().clone()

    def after(self, model: nn.Module) -> None:
        assert self._start is not None  # before() was called
        update = parameters_to_vector(model.parameters()).detach() - self._start
        if self._last is not None:
            last = self._last.to(update.device)  # that of a saved run may be elsewhere
            self._sums[0] += float((update - last).double().square().sum())
            self._sums[1] += float((update + last).double().square().sum())
        self._last = update

    def relative_standard_deviation(self) -> float:
        difference, total = self._sums
        self._sums = [0.0, 0.0]
        return math.sqrt(difference / total) if total > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "sums": list(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last, self._sums = state["last"], list(state["sums"])
