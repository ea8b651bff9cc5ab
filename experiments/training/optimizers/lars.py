"""LARS: SGD with a rate of its own for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from experiments.settings.schema import read_settings
from experiments.training.optimizers.evaluation import loss_of

ALLOWED: dict[str, Any] = {
    "lr": PositiveFloat,
    "momentum": Annotated[float, Field(ge=0, lt=1)],
    "weight_decay": NonNegativeFloat,
    "trust": PositiveFloat,
    "eps": NonNegativeFloat,
}


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a rate of its own for each tensor,

        d = grad + weight_decay w,      b <- momentum b + ratio d,      w <- w - lr b,
        ratio = trust |w| / (|grad| + weight_decay |w| + eps),

    and ratio = 1 for tensors of less than two dimensions (BatchNorm, biases) and where |w| or |grad| is zero. As in
    torch's SGD, and unlike in the paper, the rate multiplies the update and not what goes into the momentum.

    ValueError unless lr and trust are > 0, momentum is in [0, 1), and weight_decay and eps are >= 0.

    Source: You, Gitman, Ginsburg, "Large batch training of convolutional networks", arXiv 1708.03888, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        eps: float = 0.0,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        for name, value in values.items():
            read_settings(ALLOWED[name], value, name)
        super().__init__(params, values)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returns. The host does not wait for the device."""
        loss = loss_of(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        decay = group["weight_decay"]
        updates = torch._foreach_add(gradients, parameters, alpha=decay) if decay else torch._foreach_mul(gradients, 1)
        norms = zip(torch._foreach_norm(parameters), torch._foreach_norm(gradients), strict=True)
        ratios = []
        for p, (weight, gradient) in zip(parameters, norms, strict=True):
            ratio = group["trust"] * weight / (gradient + decay * weight + group["eps"])
            usable = (weight > 0) & (gradient > 0)
            ratios.append(torch.where(usable, ratio, torch.ones_like(ratio)) if p.ndim > 1 else torch.ones_like(ratio))
        torch._foreach_mul_(updates, ratios)
        buffers = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(parameters, buffers, alpha=-group["lr"])
