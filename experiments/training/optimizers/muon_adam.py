"""Muon for the matrices, Adam for the other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from experiments.training.optimizers.evaluation import loss_of


class MuonAdam(torch.optim.Optimizer):
    """Applies torch's Muon to the matrices and torch's Adam to biases and matrices of one row or column.

    `lr` and `momentum` are those of Muon, in torch's Nesterov form, `adam_lr` and `betas` those of Adam; a scheduler
    multiplies both rates. ValueError for what torch refuses, and for parameters in groups.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        adam_lr: float = 1e-2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        parameters = list(params)
        if not all(isinstance(p, Tensor) for p in parameters):
            raise ValueError("params must be parameters, not groups of them")
        matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) > 1]
        others = [p for p in parameters if not (p.ndim == 2 and min(p.shape) > 1)]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=momentum))
        if others:
            self._parts.append(torch.optim.Adam(others, lr=adam_lr, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_parts": self._parts}  # for copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Gives the parts the groups and the state of this optimizer."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = loss_of(closure)
        for part in self._parts:
            part.step()
        return loss
