"""Optimizers that torch lacks: Levenberg-Marquardt, SSBroyden, Muon beside Adam, Adam with frozen moments, LARS."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

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


class SSBroyden(torch.optim.Optimizer):
    """Self-scaled Broyden method: a dense inverse Hessian H, steps s = -t H g with t by a strong-Wolfe line search, and

        H <- (H - H y y'H / y'Hy + phi y'Hy v v') / tau + s s' / y's,      v = s / y's - H y / y'Hy,

    with y the difference of the gradients; see `self_scaled_update` for phi and tau. H starts from I.

    A call of `step` makes up to `max_iter` of these iterations, as that of torch's LBFGS does, and keeps H for the next
    call. It wants float64, one loss (no batches that change), and memory for parameters^2 numbers.

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
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
        if not ARMIJO < curvature < 1:
            raise ValueError(f"curvature must be a number in ({ARMIJO:g}, 1), got {curvature}")
        super().__init__(params, {"max_iter": max_iter, "max_eval": max_eval, "curvature": curvature})
        if len(self.param_groups) != 1:
            raise ValueError(f"params must be one group, got {len(self.param_groups)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Up to `max_iter` iterations; returns what the closure returned before them."""
        group = self.param_groups[0]
        state, left = self.state[group["params"][0]], group["max_eval"] - 1
        before = _loss_of(closure)
        point = _Point(0.0, float(before), math.nan, self._gradient())
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
                del state["inverse_hessian"]  # the approximation is of no use here: steepest descent follows
                continue
            s, y = found.step * direction, found.gradient - point.gradient
            if float(y @ s) > torch.finfo(y.dtype).eps * float(y.norm() * s.norm()):
                if inverse is None:
                    state["inverse_hessian"] = inverse = torch.eye(len(s), dtype=s.dtype, device=s.device)
                self_scaled_update(inverse, s, y, -found.step * float(s @ point.gradient))
            point = found
        return before

    def _evaluate(self, closure: Callable[[], Any], start: Tensor, direction: Tensor, step: float) -> _Point:
        self._set(start + step * direction)
        loss, gradient = float(_loss_of(closure)), self._gradient()
        return _Point(step, loss, float(gradient @ direction), gradient)

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


ARMIJO = 1e-4
"""Of the first Wolfe condition: loss at t <= loss at 0 + ARMIJO t (slope at 0)."""


class _Point(NamedTuple):
    """A step length, and what the line has there."""

    step: float
    loss: float
    slope: float
    gradient: Tensor


def wolfe_point(
    evaluate: Callable[[float], _Point], start: _Point, step: float, curvature: float, max_evaluations: int
) -> tuple[_Point, int]:
    """A point that meets the strong Wolfe conditions, and how often it evaluated.

    It interpolates by cubics within a bracket, and beyond while there is none. After `max_evaluations` it is the lowest
    point that meets the first condition, or the start.

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


def _within(step: float, first: _Point, second: _Point) -> float:
    """The step, a tenth of the bracket away from its ends at least."""
    left, right = sorted((first.step, second.step))
    margin = (right - left) / 10
    return min(max(step, left + margin), right - margin)


def _cubic_minimum(first: _Point, second: _Point) -> float:
    """Where the cubic through both points has its minimum: the middle where it has none, inf for a straight line."""
    width = second.step - first.step
    mean = first.slope + second.slope - 3 * (first.loss - second.loss) / -width
    root = mean * mean - first.slope * second.slope
    if not 0 <= root < math.inf:  # NaN too
        return first.step + width / 2
    root = math.copysign(math.sqrt(root), width)
    below = second.slope - first.slope + 2 * root
    return second.step - width * (second.slope + root - mean) / below if below else math.inf


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


LINE_SEARCHES = (torch.optim.LBFGS, SSBroyden)
"""Optimizers that evaluate the closure several times in a step, at most `max_eval` of their group."""


@contextlib.contextmanager
def answering(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the parameters are those that the optimizer answers for.

    Schedule-Free takes gradients at other weights than the average that is its result, and swaps them in its methods
    `eval` and `train`.
    """
    swaps = is_schedule_free(optimizer)
    if swaps:
        optimizer.eval()  # type: ignore[attr-defined]
    yield
    if swaps:
        optimizer.train()  # type: ignore[attr-defined]


def is_schedule_free(optimizer: Any) -> bool:
    """Whether the optimizer, or its class, has weights to train at and others to evaluate."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")
