"""Adam whose second moments stop moving."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from experiments.settings.schema import read_settings
from experiments.training.optimizers.evaluation import loss_of


class FrozenAdam(torch.optim.Optimizer):
    """Adam whose second moments v are frozen after `freeze_after` steps; from then on it is a fixed map,

        m <- beta1 m + (1 - beta1) grad,        w <- w - lr m_hat / (sqrt(v_hat) + eps),

    gradient descent with momentum and a constant diagonal preconditioner, which the theory of Anderson acceleration
    assumes. The other arguments are those of torch.optim.Adam. ValueError for `freeze_after` below 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        freeze_after: int = 1000,
    ) -> None:
        read_settings(PositiveInt, freeze_after, "freeze_after")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "freeze_after": freeze_after})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        if state["step"] <= group["freeze_after"]:
            state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        second = state["exp_avg_sq"] / (1 - beta2 ** min(state["step"], group["freeze_after"]))
        scale = group["lr"] / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], second.sqrt_().add_(group["eps"]), value=-scale)
