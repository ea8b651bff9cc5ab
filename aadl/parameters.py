"""What of an optimizer is extrapolated, and what its steps tell."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.ranks import shards_of

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
LOOPS = ("lightning", "pytorch_lightning", "lightning_fabric")
"""Top packages of frameworks whose loops make closures of their own."""
MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")
"""First-moment buffers of torch.optim; second moments are never extrapolated, they must stay positive."""


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trainable_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters that require a gradient, in the order of the groups; refuses what cannot be extrapolated."""
    parameters = [p for p in all_parameters(optimizer) if p.requires_grad]
    for p in parameters:
        if p.dtype not in DTYPES:
            raise ValueError(
                f"parameter of shape {tuple(p.shape)} has dtype {p.dtype}: its rounding is coarser than the updates "
                f"that are extrapolated; keep float32 (master) parameters and use autocast"
            )
        if p.layout != torch.strided or p.device.type == "meta":
            raise ValueError(f"parameter of shape {tuple(p.shape)} is {p.layout} on {p.device}: only dense ones work")
        shards_of(p)
    return parameters


def momentum_of(state: Any, p: Tensor) -> Tensor | None:
    for key in MOMENTUM_KEYS:
        buffer = state.get(key) if state else None
        if isinstance(buffer, Tensor) and buffer.shape == p.shape and buffer.dtype == p.dtype:
            return buffer
    return None


def makes_momentum(optimizer: Optimizer) -> bool:
    """Whether the optimizer has momentum buffers, or its groups say that its first step will make some."""
    if any(momentum_of(optimizer.state.get(p), p) is not None for p in all_parameters(optimizer)):
        return True
    if any(optimizer.state.values()):
        return False
    known = type(optimizer).__module__.startswith("torch.optim")
    return known and any(group.get("momentum") or "betas" in group for group in optimizer.param_groups)


def grouped(parameters: Sequence[Tensor]) -> list[list[tuple[int, Tensor]]]:
    """(position, parameter), put together where dtype, device and number of shards agree."""
    groups: dict[tuple[torch.dtype, torch.device, int], list[tuple[int, Tensor]]] = {}
    for position, p in enumerate(parameters):
        groups.setdefault((p.dtype, p.device, shards_of(p)), []).append((position, p))
    return list(groups.values())


def identity_of(parameters: list[Tensor]) -> list[tuple[Any, ...]]:
    """Changes when parameters come, go, or get another shape, type or device."""
    return [(id(p), p.shape, p.dtype, p.device) for p in parameters]


def closure_of(args: Any, kwargs: Any) -> Callable[[], Any] | None:
    """The closure among the arguments of a step hook, of which the first is the optimizer."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def belongs_to_a_loop(closure: Any) -> bool:
    """Whether a closure is made by a framework whose loop trains, counts and logs in it, not by the user.

    Lightning hands every closure on inside one of its own. The package of the module of its code tells whose a callable
    is, also behind functools.partial, bound methods and decorators (`__wrapped__`).
    """
    for _ in range(16):  # more layers are a circle
        for code in (closure, type(closure).__call__):
            if str(getattr(code, "__module__", None)).partition(".")[0] in LOOPS:
                return True
        if isinstance(closure, functools.partial):
            closure = closure.func
        elif isinstance(closure, types.MethodType):
            closure = closure.__func__
        elif hasattr(closure, "__wrapped__"):
            closure = closure.__wrapped__
        else:
            break
    return False


class Rates:
    """Learning rates as numbers; a rate on a device is fetched again only after somebody wrote to it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, float]] = {}

    def of(self, groups: Sequence[dict[str, Any]]) -> list[float]:
        """The rate of every group, 0 where it has none."""
        return [self._number(i, group.get("lr")) for i, group in enumerate(groups)]

    def _number(self, place: int, rate: Any) -> float:
        if rate is None:
            return 0.0
        if not isinstance(rate, Tensor) or rate.device.type == "cpu":
            return float(rate)
        tensor, version, number = self._known.get(place, (None, -1, 0.0))
        if tensor is not rate or version != rate._version:
            number = float(rate)
            self._known[place] = rate, rate._version, number
        return number


def maximizes(optimizer: Optimizer) -> bool:
    return all(group.get("maximize", False) for group in optimizer.param_groups)


def is_dry_step(optimizer: Optimizer) -> bool:
    """Whether the step was a dry one (distributed checkpoints make such steps to create state)."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(rate is None or (isinstance(rate, Tensor) and rate.is_cuda) for rate in rates):
        return False
    return bool(rates) and all(rate == 0 for rate in rates)


def forget_curvature(optimizer: Optimizer) -> None:
    """Restart L-BFGS after its parameters were moved: its last gradient belongs to another point.

    Its count of iterations goes on, since callers stop by it. A last step of length zero gives no pair of curvature,
    and the next direction is scaled as that of a first iteration is, by the sum of the gradient's magnitudes.
    """
    for state in optimizer.state.values():
        gradient = state.get("prev_flat_grad") if isinstance(state, dict) else None
        if isinstance(gradient, Tensor) and "old_dirs" in state:
            state |= {"d": torch.zeros_like(gradient), "t": 0.0, "old_dirs": [], "old_stps": [], "ro": []}
            state["H_diag"] = 1 / gradient.abs().sum().clamp(min=1)


def inner_optimizer(optimizer: Any) -> tuple[Optimizer, str]:
    """The optimizer whose steps are accelerated, and how the given one wraps it.

    "" for an optimizer itself, "partitioned" inside a ZeroRedundancyOptimizer (every rank steps its part of the
    parameters), "averaged" inside a PostLocalSGDOptimizer (every rank steps its own copy of all).

    Raises:
        ValueError: a wrapper that never calls its inner step.
    """
    package: Any = sys.modules.get("torch.distributed.optim")
    if package is None:  # nobody can have made one
        return optimizer, ""
    if isinstance(optimizer, getattr(package, "ZeroRedundancyOptimizer", ())):
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise ValueError("ZeroRedundancyOptimizer with overlap_with_ddp=True calls no step() to accelerate")
        return optimizer.__dict__["optim"], "partitioned"
    if isinstance(optimizer, getattr(package, "PostLocalSGDOptimizer", ())):
        return optimizer.__dict__["optim"], "averaged"
    return optimizer, ""
