"""Parameters and momentum buffers of an optimizer, and the closures given to its steps."""

from __future__ import annotations

import functools
import types
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.ranks import PLAIN, is_sharded, shards_of

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
LOOPS = ("lightning", "pytorch_lightning", "lightning_fabric")
"""Top packages of frameworks whose loops make closures of their own."""
MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")
"""First-moment buffers of torch.optim; second moments are never extrapolated, they must stay positive."""


NO_STATE: Mapping[str, Any] = {}
_TENSOR: Any = Tensor
_PLAIN_DISPATCH = _TENSOR.__torch_dispatch__


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The tensors of the groups in their order; other entries (names, None) are left out."""
    return [p for group in optimizer.param_groups for p in group.get("params", ()) if isinstance(p, Tensor)]


def trainable_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters that require a gradient, in the order of the groups.

    Raises:
        ValueError: one that cannot be extrapolated.
    """
    parameters = [p for p in all_parameters(optimizer) if p.requires_grad]
    for p in parameters:
        reason = "" if type(p) in PLAIN and p.dtype in DTYPES and p.layout == torch.strided else _obstacle(p)
        if reason or p.device.type == "meta" or getattr(p, "_fsdp_flattened", False):
            raise ValueError(reason or _obstacle(p))
        shards_of(p)
    return parameters


def _obstacle(p: Tensor) -> str:
    """Why a parameter cannot be extrapolated; "" if it can."""
    if torch.nn.parameter.is_lazy(p):
        return f"a parameter is an {type(p).__name__} without a shape: run the model once, then make the optimizer"
    name = f"parameter of shape {tuple(p.shape)}"
    if getattr(p, "_fsdp_flattened", False):  # marks flat parameters and the views of them (use_orig_params)
        return (
            f"{name} belongs to torch.distributed.fsdp.FullyShardedDataParallel, whose shards look like "
            f"whole parameters: use torch.distributed.fsdp.fully_shard"
        )
    if p.dtype not in DTYPES:
        return (
            f"{name} has dtype {p.dtype}: its rounding is coarser than the updates that are extrapolated; keep float32 "
            f"(master) parameters and use autocast"
        )
    if p.layout != torch.strided or p.device.type == "meta":
        return f"{name} is {p.layout} on {p.device}: only dense ones work"
    kind: Any = type(p)
    if not is_sharded(p) and kind.__torch_dispatch__ is not _PLAIN_DISPATCH:
        return (
            f"{name} is a {type(p).__name__}, which keeps its numbers elsewhere (as a quantized one does): only plain "
            f"tensors and DTensors can be extrapolated"
        )
    return ""


def states_of(optimizer: Optimizer) -> Mapping[Tensor, Any]:
    """State by parameter: that of the optimizer, or where it keeps none, of the optimizers inside it."""
    if optimizer.state:
        return optimizer.state
    inside = [value for value in vars(optimizer).values() if isinstance(value, Optimizer) and value is not optimizer]
    return _Inside(*[other.state for other in inside]) if inside else optimizer.state


class _Inside(ChainMap[Tensor, Any]):
    """States of several optimizers, which make an entry for whatever they are indexed with."""

    def get(self, key: Tensor, default: Any = None) -> Any:
        return next((state[key] for state in self.maps if key in state), default)


def state_of(optimizer: Optimizer, p: Tensor) -> Mapping[str, Any]:
    """State of the optimizer for a parameter; empty if there is none, or it is no dictionary."""
    state = states_of(optimizer).get(p)
    return state if isinstance(state, Mapping) else NO_STATE


def momentum_of(state: Any, p: Tensor) -> Tensor | None:
    """The first moment among the state of a parameter, if it can be extrapolated with it.

    None for a buffer of another shape, dtype or place (factored, quantized, bfloat16, on the host).
    """
    for key in MOMENTUM_KEYS:
        buffer = state.get(key) if isinstance(state, Mapping) else None
        if (
            isinstance(buffer, Tensor)
            and (type(buffer) in PLAIN or is_sharded(p))
            and is_sharded(buffer) == is_sharded(p)
            and buffer.shape == p.shape
            and buffer.dtype == p.dtype
            and buffer.device == p.device
            and buffer.layout == torch.strided
        ):
            return buffer
    return None


def makes_momentum(optimizer: Optimizer) -> bool:
    """Whether the optimizer has momentum buffers, or its groups say that its first step will make some."""
    parameters = all_parameters(optimizer)
    states = [state_of(optimizer, p) for p in parameters]
    if any(momentum_of(state, p) is not None for state, p in zip(states, parameters, strict=True)):
        return True
    if any(states):
        return False
    known = type(optimizer).__module__.startswith("torch.optim")
    return known and any(group.get("momentum") or "betas" in group for group in optimizer.param_groups)


def is_gradient_descent(optimizer: Optimizer) -> bool:
    """Whether this is known to be gradient descent without any state."""
    return type(optimizer) is torch.optim.SGD and not any(group.get("momentum") for group in optimizer.param_groups)


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


def tensors_are_fake() -> bool:
    """Whether tensors made now have no values, as in torch's FakeTensorMode."""
    return type(torch.empty(0, device="cpu")).__name__ == "FakeTensor"


def maximizes(optimizer: Optimizer) -> bool | None:
    """Whether the optimizer maximizes the loss; None where only some of its groups do, which seek a saddle point."""
    sides = {bool(group.get("maximize", False)) for group in optimizer.param_groups}
    return None if len(sides) == 2 else sides == {True}


def forget_curvature(optimizer: Optimizer, pairs: bool = True) -> None:
    """Restart L-BFGS after its parameters were moved: its last gradient belongs to another point.

    Its count of iterations goes on, since callers stop by it. A last step of length zero gives no pair of curvature,
    and the next direction, without pairs, is scaled as that of a first iteration is, by the sum of the gradient's
    magnitudes.

    Args:
        optimizer: any; others than L-BFGS are left alone.
        pairs: whether the pairs of curvature are forgotten too. They stay true where the parameters were moved.
    """
    for state in optimizer.state.values():
        gradient = state.get("prev_flat_grad") if isinstance(state, dict) else None
        if isinstance(gradient, Tensor) and "old_dirs" in state:
            state |= {"d": torch.zeros_like(gradient), "t": 0.0}
            if pairs:
                state |= {"old_dirs": [], "old_stps": [], "ro": [], "H_diag": 1 / gradient.abs().sum().clamp(min=1)}
