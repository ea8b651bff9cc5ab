"""Levenberg-Marquardt: damped Gauss-Newton steps on a sum of squares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from experiments.settings.schema import read_settings

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
        read_settings(PositiveFloat, damping, "damping")
        read_settings(PositiveInt, max_trials, "max_trials")
        super().__init__(params, {"damping": damping, "max_trials": max_trials})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One step by `closure.linearize() -> (r, J)` and `closure.residuals() -> r`; returns the loss before it."""
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
                _write(start + update, parameters)
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
        _write(start, parameters)
        return loss


def _write(vector: Tensor, parameters: list[Tensor]) -> None:
    """Writes into the parameters' own memory, which `vector_to_parameters` exchanges: hooks would see new tensors."""
    for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view_as(p))


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
