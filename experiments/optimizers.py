"""Optimizers that torch does not have: Levenberg-Marquardt, Muon beside Adam, Adam with frozen moments, LARS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

ACCEPT_FAST, ACCEPT_SLOW = 0.75, 0.25
"""Gain ratios above which the damping falls to a third, and below which it doubles."""
LARGEST_DAMPING = 1e12


class LevenbergMarquardt(torch.optim.Optimizer):
    """Minimizes L(w) = sum_i r_i(w)^2 by damped Gauss-Newton steps,

        (J'J + damping I) d = -J' r,        w <- w + d,

    and d = -J' (J J' + damping I)^-1 r, the same, where there are fewer residuals than parameters. With the gain ratio
    q = (L(w) - L(w + d)) / (predicted decrease), the damping falls to a third for q > 3/4, doubles for q < 1/4, and is
    multiplied by 4 until L falls. The damping is kept in the parameter group, and so in `state_dict`.

    A step costs one Jacobian, one trial or more, rows * parameters * min(rows, parameters) multiplications and a
    Cholesky factor of the smaller size.

    Args:
        params: parameters of one dtype, in the order of the Jacobian's columns.
        damping: > 0, the first one.
        max_trials: >= 1; a step without a decrease after so many trials leaves the parameters as they are, and the next
            one goes on with the larger damping, or begins again with `damping` where no digit of them moved.

    Raises:
        ValueError: an argument out of its range.

    Source: Levenberg 1944, Marquardt 1963; damping rule as in Nocedal and Wright, Numerical Optimization, ch. 10 and 4.
    """

    needs_residuals = True

    def __init__(self, params: Iterable[Any], damping: float = 1e-2, max_trials: int = 20) -> None:
        if isinstance(damping, bool) or not 0 < damping < math.inf:
            raise ValueError(f"damping must be a finite number > 0, got {damping}")
        if isinstance(max_trials, bool) or not isinstance(max_trials, int) or max_trials < 1:
            raise ValueError(f"max_trials must be an integer >= 1, got {max_trials!r}")
        super().__init__(params, {"damping": damping, "max_trials": max_trials})
        if len(self.param_groups) != 1:
            raise ValueError(f"params must be one group, got {len(self.param_groups)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: object with `linearize() -> (r (rows,), J (rows, parameters))` and `residuals() -> r`.

        Returns:
            The loss before the step.
        """
        group = self.param_groups[0]
        parameters = group["params"]
        with torch.enable_grad():
            residuals, jacobian = closure.linearize()
        loss = residuals.square().sum()
        if not bool(loss.isfinite()):
            return loss
        solve = _Damped(residuals, jacobian)
        start = parameters_to_vector(parameters)
        for _ in range(group["max_trials"]):
            damping, exhausted = group["damping"], False
            solution = solve(damping)
            if solution is not None:
                update, predicted = solution
                vector_to_parameters(start + update, parameters)
                decrease = float(loss - closure.residuals().square().sum())
                if decrease > 0:
                    ratio = decrease / predicted if predicted > 0 else math.inf
                    factor = 1 / 3 if ratio > ACCEPT_FAST else 2.0 if ratio < ACCEPT_SLOW else 1.0
                    group["damping"] = max(damping * factor, torch.finfo(start.dtype).tiny)
                    return loss
                exhausted = bool((start + update == start).all())
            if exhausted or damping >= LARGEST_DAMPING:
                group["damping"] = self.defaults["damping"]  # other points, or other weights, may go better
                break
            group["damping"] = 4 * damping
        vector_to_parameters(start, parameters)
        return loss


class _Damped:
    """Solves one linearized problem for several dampings."""

    def __init__(self, residuals: Tensor, jacobian: Tensor) -> None:
        self._jacobian, self._residuals = jacobian, residuals
        rows, columns = jacobian.shape
        self._is_wide = rows < columns
        self._gram = jacobian @ jacobian.T if self._is_wide else jacobian.T @ jacobian
        self._right = residuals if self._is_wide else jacobian.T @ residuals

    def __call__(self, damping: float) -> tuple[Tensor, float] | None:
        """The step d and the decrease r'r - |r + J d|^2 that the linear model predicts; None without a factor."""
        damped = self._gram.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            return None
        solution = torch.cholesky_solve(self._right.unsqueeze(1), factor).squeeze(1)
        update = -(self._jacobian.T @ solution) if self._is_wide else -solution
        # r'r - |r + J d|^2 = -r'J d + damping d'd, since J'(r + J d) = -damping d
        predicted = damping * update.square().sum() - self._residuals @ (self._jacobian @ update)
        return (update, float(predicted)) if bool(update.isfinite().all()) else None


class MuonAdam(torch.optim.Optimizer):
    """Muon for the matrices, Adam for biases and matrices of one row or column: torch's, under one roof.

    Args:
        params: an iterable of parameters.
        lr: of Muon.
        adam_lr: of Adam; a scheduler multiplies both.
        momentum: of Muon, whose Nesterov form and learning-rate adjustment are torch's defaults.
        betas: of Adam.

    Raises:
        ValueError: what torch refuses; parameters in groups.

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made, for no part would step the new parameters."""
        if len(self.param_groups) == len(self._parts):
            raise ValueError("MuonAdam takes all parameters when it is made, and no further groups")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_parts": self._parts}  # for copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Lets the parts work on the groups and the state that everybody else sees."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; returns what the closure returns."""
        loss = _loss_of(closure)
        for part in self._parts:
            part.step()
        return loss


class FrozenAdam(torch.optim.Optimizer):
    """Adam whose second moments v stand still after `freeze_after` steps: from then on a fixed map,

        m <- beta1 m + (1 - beta1) grad,        w <- w - lr m_hat / (sqrt(v_hat) + eps),

    gradient descent with momentum and a constant diagonal preconditioner, as the theory of Anderson acceleration wants.

    Args:
        params, lr, betas, eps: as of torch.optim.Adam.
        freeze_after: >= 1 steps of Adam before.

    Raises:
        ValueError: a `freeze_after` out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        freeze_after: int = 1000,
    ) -> None:
        if isinstance(freeze_after, bool) or not isinstance(freeze_after, int) or freeze_after < 1:
            raise ValueError(f"freeze_after must be an integer >= 1, got {freeze_after!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "freeze_after": freeze_after})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returns."""
        loss = _loss_of(closure)
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


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a rate of its own for each tensor,

        d = grad + weight_decay w,      b <- momentum b + ratio d,      w <- w - lr b,
        ratio = trust |w| / (|grad| + weight_decay |w| + eps),

    and ratio = 1 for tensors of less than two dimensions (BatchNorm, biases) and where |w| or |grad| is zero. As in
    torch's SGD, and unlike in the paper, the rate multiplies the update and not what goes into the momentum.

    Args:
        params: parameters or groups of them.
        lr: > 0.
        momentum: in [0, 1).
        weight_decay: >= 0.
        trust: > 0.
        eps: >= 0.

    Raises:
        ValueError: an argument out of its range.

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
        allowed = {
            "lr": ("> 0", 0 < lr < math.inf),
            "momentum": ("in [0, 1)", 0 <= momentum < 1),
            "weight_decay": (">= 0", 0 <= weight_decay < math.inf),
            "trust": ("> 0", 0 < trust < math.inf),
            "eps": (">= 0", 0 <= eps < math.inf),
        }
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        for name, (text, is_allowed) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} must be a number {text}, got {values[name]}")
        super().__init__(params, values)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returns. The host does not wait for the device."""
        loss = _loss_of(closure)
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


def _loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure returns, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
