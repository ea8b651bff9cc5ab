"""The published scheme (the ORNL/AADL package), as the baseline that the paper's figures are reproduced with.

It differs from `aadl` in what it stores: a window of iterates alone. After an accepted point the difference of two
neighbors of the window is no residual any more, which is what the comparison shows. Own implementation of the formulas.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from experiments.settings.run_config import PublishedConfig

CHUNK = 1 << 16
"""Weights that are averaged at a time."""


def extrapolate(window: Tensor, relaxation: float, regularization: float) -> Tensor:
    """Anderson point (num_parameters,) of a window of iterates, each taken as the image of the one before.

    With columns `X = [x_1 .. x_n]`, first differences `R = DX` (n - 1 columns) and second differences `DR` (n - 2):

        gamma  = argmin ||R_last - DR gamma||^2 + reg ||gamma||^2
        mean   = x_{n-1} - DX_{:-1} gamma
        result = mean + relaxation (R_last - DR gamma)

    so that `relaxation = 1` gives `x_n - DX_{1:} gamma`. `reg` is absolute, as published. The result is NaN where
    differences of the window are not finite.

    Args:
        window: iterates in columns, (num_parameters, n), oldest first, n >= 3.
        relaxation: in (0, 1]; 1 takes the mapped combination.
        regularization: Tikhonov factor >= 0.
    """
    first = window.diff(dim=1)
    second = first.diff(dim=1)
    if not bool(second.isfinite().all() & first.isfinite().all()):
        return torch.full_like(window[:, -1], math.nan)
    matrix, right = second, first[:, -1]
    if regularization > 0:
        ridge = math.sqrt(regularization) * torch.eye(second.shape[1], dtype=window.dtype, device=window.device)
        matrix = torch.cat([matrix, ridge])
        right = torch.cat([right, right.new_zeros(second.shape[1])])
    # The default driver on a CPU, gelsy, does not repeat its own results to the last bit.
    driver = "gels" if matrix.is_cuda else "gelsd"
    gamma = torch.linalg.lstsq(matrix, right.unsqueeze(1), driver=driver).solution.squeeze(1)
    mean = window[:, -2] - first[:, :-1] @ gamma
    return mean + relaxation * (first[:, -1] - second @ gamma)


class PublishedScheme:
    """The scheme on one optimizer, attached by a step hook.

    After each step of the optimizer:

    1. with `average`, the mean of the last `history_depth` raw weights is written over the live weights whenever
       `max_i std_i / max_i |mean_i|` of that window exceeds `average_tolerance` (the published criterion, which
       compares different coordinates and takes drift for noise);
    2. every `store_each_nth` steps the weights enter the window;
    3. every `frequency` steps after `wait_iterations`, with at least three stored, the extrapolated point replaces the
       weights and the newest row of the window. With `safeguard` only if the closure's loss falls by it.

    Momentum is left as it is, and every parameter group is extrapolated alone. Ranks that hold copies of one model take
    the same points: those of rank 0, judged by the mean of the ranks' losses. (The package lets each rank judge by its
    own loss, whereupon the copies differ for good.)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: PublishedConfig) -> None:
        self.settings = settings
        self.windows: list[deque[Tensor]] = [deque(maxlen=settings.history_depth) for _ in optimizer.param_groups]
        self.raw: list[deque[Tensor]] = [deque(maxlen=settings.history_depth) for _ in optimizer.param_groups]
        self.since_store = self.since_acceleration = 0
        self.statistics: dict[str, Any] = {
            "steps": 0,
            "attempts": 0,
            "accepted": 0,
            "rejected": {"loss": 0, "non_finite": 0},
            "closure_evaluations": 0,
            "averaging": False,
            "relative_standard_deviation": math.nan,
        }
        self._groups = optimizer.param_groups
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        closures = [value for value in (*args, *kwargs.values()) if callable(value) and value is not optimizer]
        self.statistics["steps"] += 1
        with torch.no_grad():
            if self.settings.average:
                self._average(optimizer)
            self.since_store += 1
            if self.since_store >= self.settings.store_each_nth:
                self.since_store = 0
                for window, vector in zip(self.windows, _vectors(optimizer), strict=True):
                    window.append(vector)
        self.since_acceleration += 1
        due = self.statistics["steps"] > self.settings.wait_iterations
        if due and self.since_acceleration >= self.settings.frequency and len(self.windows[0]) >= 3:
            self.since_acceleration = 0
            self._accelerate(optimizer, closures[0] if closures else None)

    def _average(self, optimizer: torch.optim.Optimizer) -> None:
        largest_std = largest_mean = 0.0
        means = []
        for raw, vector in zip(self.raw, _vectors(optimizer), strict=True):
            raw.append(vector)
            mean = torch.empty_like(raw[-1])
            size = max(1, len(mean)) if mean.is_cuda else CHUNK  # parts that stay in the cache of a CPU
            for part in range(0, len(mean), size):
                stacked = torch.stack([vector[part : part + size] for vector in raw])
                own = torch.mean(stacked, dim=0, out=mean[part : part + size])
                if len(raw) > 1:
                    variance = stacked.sub_(own).square_().sum(dim=0) / (len(raw) - 1)
                    largest_std = max(largest_std, math.sqrt(float(variance.max())))
                    largest_mean = max(largest_mean, float(own.abs().max()))
            means.append(mean)
        relative = largest_std / largest_mean if largest_mean > 0 else math.nan
        self.statistics["relative_standard_deviation"] = relative
        self.statistics["averaging"] = relative > self.settings.average_tolerance
        if self.statistics["averaging"]:
            _write(optimizer, means)

    def _accelerate(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor] | None) -> None:
        self.statistics["attempts"] += 1
        plain = _vectors(optimizer)
        with torch.no_grad():
            candidates = [
                extrapolate(torch.stack(list(window), dim=1), self.settings.relaxation, self.settings.reg_acc)
                for window in self.windows
            ]
        if self._num_ranks() > 1:
            for candidate in candidates:  # the last digits of a solver may differ between machines
                dist.broadcast(candidate, src=0)
        # The package itself writes a non-finite candidate; here it would only end the run, so it is rejected.
        if not all(bool(candidate.isfinite().all()) for candidate in candidates):
            self.statistics["rejected"]["non_finite"] += 1
            return
        judge = closure if self.settings.safeguard else None
        plain_loss = self._loss(judge) if judge is not None else math.inf
        _write(optimizer, candidates)
        if judge is not None and not self._loss(judge) < plain_loss:
            _write(optimizer, plain)
            self.statistics["rejected"]["loss"] += 1
            return
        self.statistics["accepted"] += 1
        for window, candidate in zip(self.windows, candidates, strict=True):
            window[-1] = candidate.clone()

    def _loss(self, closure: Callable[[], Tensor]) -> float:
        self.statistics["closure_evaluations"] += 1
        with torch.enable_grad():
            loss = closure().detach().clone()
        if self._num_ranks() > 1:
            dist.all_reduce(loss)
            loss /= self._num_ranks()
        return float(loss)

    @staticmethod
    def _num_ranks() -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "windows": [list(window) for window in self.windows],
            "raw": [list(raw) for raw in self.raw],
            "since_store": self.since_store,
            "since_acceleration": self.since_acceleration,
            "statistics": {**self.statistics, "rejected": dict(self.statistics["rejected"])},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("windows", "raw"):
            for own, saved, group in zip(getattr(self, name), state[name], self._groups, strict=True):
                own.clear()
                own.extend(tensor.to(group["params"][0].device, copy=True) for tensor in saved)
        self.since_store, self.since_acceleration = state["since_store"], state["since_acceleration"]
        self.statistics = {**state["statistics"], "rejected": dict(state["statistics"]["rejected"])}


def _vectors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameters_to_vector(group["params"]).detach() for group in optimizer.param_groups]


@torch.no_grad()
def _write(optimizer: torch.optim.Optimizer, vectors: list[Tensor]) -> None:
    for vector, group in zip(vectors, optimizer.param_groups, strict=True):
        vector_to_parameters(vector.clone(), group["params"])  # which become views of it
