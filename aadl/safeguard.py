"""Judging a candidate: by the training loss before it is taken, by the next residual after it was taken."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from aadl.ranks import Ranks

SUSPEND_ABOVE = 1.2
"""Trust ratio from which the linear model is not believed and acceleration pauses."""
REVERT_ABOVE = 2.0
"""Growth of the residual norm over an accelerated step from which the step is taken back."""
OVERSHOOT = 0.5
"""Of the slope along an accelerated step that may be left behind it with the other sign."""
LONGEST_PAUSE = 64
"""Macro-steps; pauses after a broken promise double up to this."""
LONGEST_REFUSAL = 4
"""Periods; candidates that keep pointing back are tried this rarely."""


@dataclass
class Pending:
    """What an accepted candidate promised: squares of residual norms, in the norm of the mixing problem."""

    predicted: float
    before: float
    noise: float
    weights: dict[str, float]
    advance: float = 0.0
    """How far the candidate goes along the last update, <x+ - g_k, f_k>."""


@dataclass
class Pause:
    """Back-off: pauses double up to `longest` with every failure."""

    longest: int
    length: int = 0
    until: int = 0

    def extend(self, macro_step: int, unit: int = 1) -> None:
        """Double the pause, counted in `unit` macro-steps from the present one on."""
        self.length = min(self.longest, max(1, 2 * self.length))
        self.until = macro_step + self.length * unit

    def shorten(self) -> None:
        """A kept promise halves the next pause."""
        self.length //= 2


def trust_ratio(square: float, pending: Pending) -> float:
    """q = ||f_{k+1}|| / sqrt(predicted ||r||^2 + noise); near or below 1 where the linear model holds."""
    expected = pending.predicted + pending.noise
    if not math.isfinite(square):
        return math.inf
    return math.sqrt(square / expected) if expected > 0 else (math.inf if square > 0 else 0.0)


def revert_bound(pending: Pending) -> float:
    """The largest square of the residual norm that is put up with."""
    return REVERT_ABOVE**2 * (pending.before + pending.noise)


def overshoot_bound(pending: Pending) -> float:
    """The least <f_{k+1}, x+ - g_k> that is put up with: an update of this much back takes the step for too long."""
    return -OVERSHOOT * pending.advance


def must_revert(square: float, along: float, pending: Pending) -> bool:
    """Whether the residual grew so much (or is not finite), or points back so much, that the plain iterate returns."""
    return not (square <= revert_bound(pending) and along >= overshoot_bound(pending))


def trial_losses(
    closure: Callable[[], Any], parameters: Sequence[Tensor], place_candidate: Callable[[], None]
) -> tuple[float, float]:
    """Loss at the parameters as they are and at the candidate, both on the same random numbers.

    The candidate is left in place. Gradients, buffers of the modules that were called (BatchNorm statistics) and
    random number generators are afterwards as before. The closure may be PyTorch's (zero_grad, forward, backward):
    its calls of `Tensor.backward` and `zero_grad` are passed over, since only the value is wanted.
    """
    with _undisturbed(parameters) as rewind:
        try:
            plain = _value(closure())
        except Exception:
            place_candidate()  # as the other ranks do, which may have to talk to this one for it
            raise
        rewind()
        place_candidate()
        candidate = _value(closure())
    return plain, candidate


def mean_over_ranks(plain: float, candidate: float, weight: float, ranks: Ranks) -> tuple[float, float, float]:
    """Weighted means of both losses, sum of weight * loss over sum of weight, and the latter.

    One all-reduce of three numbers. A rank without a finite loss makes the means non-finite, so that all ranks reject
    together; one without a loss at all has weight nan.
    """
    if ranks.size == 1:
        return plain, candidate, weight
    word = torch.tensor([weight * plain, weight * candidate, weight], dtype=torch.float64, device="cpu")
    plain, candidate, weight = ranks.total(word).tolist()
    return plain / weight, candidate / weight, weight


@contextmanager
def _undisturbed(parameters: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Run closures without a trace. Yields a function that rewinds generators and buffers to the entry state."""
    gradients = [p.grad for p in parameters]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    buffers: list[tuple[torch.nn.Module, str, Tensor, Tensor]] = []
    seen: set[torch.nn.Module] = set()

    def keep_buffers(module: torch.nn.Module, arguments: Any) -> None:
        del arguments
        if module in seen:
            return
        for part in set(module.modules()) - seen:
            seen.add(part)
            buffers.extend((part, name, b, b.detach().clone()) for name, b in part._buffers.items() if b is not None)

    cpu_state = torch.get_rng_state()
    cuda_states = [torch.cuda.get_rng_state(device) for device in devices]

    def rewind() -> None:
        torch.set_rng_state(cpu_state)
        for device, state in zip(devices, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, device)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer
        for module in seen:
            reshard = getattr(module, "reshard", None)
            if callable(reshard):  # FSDP2: no backward pass drops the gathered weights
                reshard()

    for p in parameters:
        p.grad = None
    handle = register_module_forward_pre_hook(keep_buffers)
    try:
        with torch.enable_grad(), _values_only(parameters), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            yield rewind
    finally:
        handle.remove()
        rewind()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient


@contextmanager
def _values_only(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Silence `backward` and `zero_grad` in this thread: a trial evaluation needs the value of the loss only.

    A torch function mode would do the same for `backward` but makes compiled models compile once more.
    """
    thread = threading.get_ident()
    outer = _trials.get(thread)
    with _lock:
        if not _trials:
            for owner, name in _SILENCED:
                _originals[owner, name] = getattr(owner, name)
                setattr(owner, name, _silent(_originals[owner, name]))
        _trials[thread] = parameters
    try:
        yield
    finally:
        with _lock:
            if outer is None:
                del _trials[thread]
            else:
                _trials[thread] = outer
            if not _trials:
                for owner, name in _SILENCED:
                    setattr(owner, name, _originals.pop((owner, name)))


_SILENCED: tuple[tuple[type, str], ...] = (
    (torch.Tensor, "backward"),
    (torch.nn.Module, "zero_grad"),
    (torch.optim.Optimizer, "zero_grad"),
)
_lock = threading.Lock()
_trials: dict[int, Sequence[Tensor]] = {}
"""Parameters of the running trial evaluations, by thread."""
_originals: dict[tuple[type, str], Callable[..., None]] = {}
"""The silenced methods, while a trial runs."""


def _silent(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        parameters = _trials.get(threading.get_ident())
        if parameters is None:  # another thread
            return original(self, *args, **kwargs)
        for p in parameters if isinstance(self, Tensor) else ():
            if p.grad is None and p.requires_grad:  # closures may go on to clip or to print gradients
                p.grad = torch.zeros_like(p)
        return None

    return call


def _value(loss: Any) -> float:
    if loss is None:
        raise ValueError("the closure must return the training loss, got None")
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
