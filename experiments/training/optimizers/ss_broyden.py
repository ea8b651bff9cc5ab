"""SSBroyden: a quasi-Newton method with a dense inverse Hessian that scales itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from experiments.settings.schema import read_settings
from experiments.training.optimizers.evaluation import loss_of
from experiments.training.optimizers.line_search import ARMIJO, LinePoint, wolfe_point


class SSBroyden(torch.optim.Optimizer):
    """Self-scaled Broyden method: a dense inverse Hessian H, steps s = -t H g with t by a strong-Wolfe line search, and

        H <- (H - H y y'H / y'Hy + phi y'Hy v v') / tau + s s' / y's,      v = s / y's - H y / y'Hy,

    with y the difference of the gradients; see `self_scaled_update` for phi and tau. H starts from I.

    A call of `step` makes up to `max_iter` of these iterations, as torch's LBFGS does, and keeps H for the next call.
    The method needs float64, one loss (no batches that change), and memory for parameters^2 numbers.

    Args:
        params: parameters of one dtype on one device, in one group.
        max_iter: >= 1 iterations in a call of `step`.
        max_eval: >= 1 evaluations of the closure in a call of `step`; None: 5/4 of `max_iter`, but at least 25.
        curvature: in (0, 1), of the second Wolfe condition |slope at t| <= curvature |slope at 0|.

    Raises:
        ValueError: an argument out of its range.

    Source: Al-Baali and Khalfan 2005; Urban, Stefanou and Pons, J. Comput. Phys. 113656, 2025; Kiyani et al., arXiv
    2501.16371.
    """

    def __init__(
        self, params: Iterable[Any], max_iter: int = 20, max_eval: int | None = None, curvature: float = 0.9
    ) -> None:
        max_eval = max(25, max_iter * 5 // 4) if max_eval is None else max_eval
        for name, count in {"max_iter": max_iter, "max_eval": max_eval}.items():
            read_settings(PositiveInt, count, name)
        read_settings(Annotated[float, Field(gt=ARMIJO, lt=1)], curvature, "curvature")
        super().__init__(params, {"max_iter": max_iter, "max_eval": max_eval, "curvature": curvature})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Up to `max_iter` iterations; returns what the closure returned before them."""
        group = self.param_groups[0]
        state, left = self.state[group["params"][0]], group["max_eval"] - 1
        before = loss_of(closure)
        point = LinePoint(0.0, float(before), math.nan, self._gradient())
        for _ in range(group["max_iter"]):
            inverse = state.get("inverse_hessian")
            direction = -point.gradient if inverse is None else -(inverse @ point.gradient)
            slope = float(direction @ point.gradient)
            start, found = parameters_to_vector(group["params"]), None
            if -math.inf < slope < 0 and left > 0:
                first = 1.0 if inverse is not None else min(1.0, 1 / float(point.gradient.abs().sum()))
                origin = point._replace(step=0.0, slope=slope)
                evaluate = partial(self._evaluate, closure, start, direction)
                found, count = wolfe_point(evaluate, origin, first, group["curvature"], min(left, 25))
                left -= count
                self._set(start + found.step * direction)
            if found is None or found.step == 0:
                if inverse is None or left <= 0:
                    break
                del state["inverse_hessian"]  # the approximation gives no descent: steepest descent follows
                continue
            s, y = found.step * direction, found.gradient - point.gradient
            if float(y @ s) > torch.finfo(y.dtype).eps * float(y.norm() * s.norm()):
                if inverse is None:
                    state["inverse_hessian"] = inverse = torch.eye(len(s), dtype=s.dtype, device=s.device)
                self_scaled_update(inverse, s, y, -found.step * float(s @ point.gradient))
            point = found
        return before

    def _evaluate(self, closure: Callable[[], Any], start: Tensor, direction: Tensor, step: float) -> LinePoint:
        self._set(start + step * direction)
        loss, gradient = float(loss_of(closure)), self._gradient()
        return LinePoint(step, loss, float(gradient @ direction), gradient)

    def _gradient(self) -> Tensor:
        """The gradients as one vector, which later ones do not overwrite."""
        parameters = self.param_groups[0]["params"]
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])

    def _set(self, vector: Tensor) -> None:
        parameters = self.param_groups[0]["params"]
        for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))


def self_scaled_update(inverse: Tensor, s: Tensor, y: Tensor, curvature: float) -> None:
    """The update of `SSBroyden`, in place. With b = s'H^-1 s / y's, h = y'Hy / y's and a = b h - 1,

        rho = min(1, h (1 - sqrt(a / (1 + a)))),       theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b)),
        sigma = 1 + a theta,      phi = (1 - theta) / sigma,      r = sigma^(-1 / (n - 1)),
        tau = min(1, 1 / b) min(r, 1 / theta) for theta > 0,      min(min(1, 1 / b) r, sigma) otherwise.

    Args:
        inverse: H, positive definite.
        s, y: the step and the difference of the gradients, y's > 0.
        curvature: s'H^-1 s.
    """
    image, product = inverse @ y, float(y @ s)
    scale = float(y @ image)  # y'Hy
    b, h = curvature / product, scale / product
    a = max(b * h - 1, torch.finfo(y.dtype).eps)  # >= 0 by Cauchy-Schwarz, but for rounding
    rho = min(1.0, h * (1 - math.sqrt(a / (1 + a))))
    theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
    sigma = 1 + a * theta
    root = sigma ** (-1 / max(len(s) - 1, 1))
    bound = min(1.0, 1 / b)
    tau = bound * min(root, 1 / theta) if theta > 0 else min(bound * root, sigma)
    rows = torch.stack([image, s / product - image / scale, s])
    weights = rows.new_tensor([-1 / (scale * tau), (1 - theta) / sigma * scale / tau, 1 / product])
    inverse.addmm_(rows.T * weights, rows, beta=1 / tau)
