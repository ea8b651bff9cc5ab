"""What one trial sees instead of the real gradients, and what it puts back (`aadl.trial` says where torch asks it)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

GRADIENT: Any = inspect.getattr_static(Tensor, "grad")
"""The attribute as torch defines it."""
ZEROS = object()
"""Stands for zeros until somebody reads them."""


class Trial:
    """One trial: its own gradients of all tensors, and the values of modules and generators that it restores."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._own = {id(p): p for p in parameters}
        self._gradients: dict[int, tuple[Tensor, Any]] = {}
        self._passed_over = False
        self._flags: dict[int, tuple[Module, bool]] = {}
        self._buffers: list[tuple[Module, dict[str, Tensor | None]]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._random = _random_states()
        self._caches_weights = torch.is_autocast_cache_enabled()
        self._parametrized = dict(parametrize._cache)
        _empty_caches()  # they hold the weights from before the step

    # gradients

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """A copy of the gradient; after a backward pass zeros for parameters of the optimizer, which closures may clip.

        No zeros for other tensors: a closure that needs the gradient of an input for its value has to fail.
        """
        if id(tensor) not in self._gradients and not self._passed_over:
            real = GRADIENT.__get__(tensor)
            gradient = None if real is None else real.detach().clone()
        else:
            gradient = self._known(tensor)
        if gradient is ZEROS:
            gradient = torch.zeros_like(tensor)
        self._gradients[id(tensor)] = tensor, gradient
        return gradient

    def _known(self, tensor: Tensor) -> Any:
        """The value of a gradient that the trial has touched, or that a backward pass has made unknown."""
        if id(tensor) in self._gradients:
            return self._gradients[id(tensor)][1]
        return ZEROS if id(tensor) in self._own and tensor.requires_grad else None

    def set_gradient(self, tensor: Tensor, gradient: Any) -> None:
        self._gradients[id(tensor)] = tensor, gradient

    def clear(self, tensors: Iterable[Tensor], to_none: bool) -> None:
        """Do what `zero_grad` does, without copies of gradients that nobody reads."""
        for tensor in tensors:
            untouched = id(tensor) not in self._gradients and not self._passed_over
            gradient = GRADIENT.__get__(tensor) if untouched else self._known(tensor)
            self._gradients[id(tensor)] = tensor, None if to_none or gradient is None else ZEROS

    def pass_over(self) -> None:
        """Skip a backward pass: from here on only the gradients of the optimizer's parameters are known."""
        self._passed_over = True
        held = self._gradients.items()
        self._gradients = {key: (t, g) for key, (t, g) in held if key in self._own and g is not None}

    def differentiate(self, run_backward: Callable[..., Any], given: dict[str, Any]) -> None:
        """Compute the gradients of the optimizer's parameters, with their graph, in place of accumulating them."""
        among = set(map(id, given.get("inputs") or self._own.values()))
        wanted = [p for p in self._own.values() if p.requires_grad and id(p) in among]
        before = [self.gradient(p) for p in wanted]
        given |= {"inputs": tuple(wanted), "allow_unreachable": True, "accumulate_grad": False}
        found = run_backward(**given) if wanted else ()
        self.pass_over()
        for p, old, new in zip(wanted, before, found, strict=True):
            self.set_gradient(p, old if new is None else new if old is None else old + new)

    # modules

    def note(self, module: Module) -> None:
        """Remember buffers and flags of a module and its parts, unless they were seen before."""
        if id(module) in self._flags:
            return
        for part in module.modules():
            if id(part) not in self._flags:
                self._flags[id(part)] = part, part.training
                held = dict(part._buffers.items())
                self._buffers.append((part, held))
                for buffer in held.values():
                    if buffer is not None:
                        self.keep(buffer)

    def keep(self, tensor: Tensor) -> None:
        """Remember the values of a tensor that a module may write to (nobody can write to an inference tensor)."""
        tensor = unwrapped(tensor)
        if id(tensor) not in self._values and not tensor.is_inference():
            self._values[id(tensor)] = tensor, _elements_once(tensor).clone()

    # ends

    def rewind(self) -> None:
        """Restore everything that a second evaluation would see."""
        self._gradients, self._passed_over = {}, False
        for restore, state in self._random:
            restore(state)
        with torch.no_grad():
            for tensor, value in self._values.values():
                elements = _elements_once(tensor)
                if tensor.is_nested or elements.shape == value.shape:
                    elements.copy_(value)
                else:  # somebody has resized it
                    tensor.data = value.clone()
        for module, held in self._buffers:
            for name in dict(module._buffers.items()).keys() - held.keys():
                del module._buffers[name]
            for name, buffer in held.items():
                if getattr(module, name, None) is not buffer:  # a scripted module has no plain dictionary of buffers
                    module._buffers[name] = buffer
        for module, training in self._flags.values():
            if module.training != training:
                module.training = training
            reshard = getattr(module, "reshard", None)
            if callable(reshard):  # FSDP2: no backward pass drops the gathered weights
                reshard()
        _empty_caches()

    def end(self) -> None:
        self.rewind()
        parametrize._cache |= self._parametrized
        torch.set_autocast_cache_enabled(self._caches_weights)


def _empty_caches() -> None:
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _elements_once(tensor: Tensor) -> Tensor:
    """A view without the repetitions of an expanded tensor, which nobody can write to."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_nested or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]


def _random_states() -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """Setter and state of each of torch's generators in use."""
    states: list[tuple[Callable[[Tensor], None], Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
    for devices in (torch.cuda, torch.xpu):
        for index in range(devices.device_count() if devices.is_initialized() else 0):
            states.append((functools.partial(devices.set_rng_state, device=index), devices.get_rng_state(index)))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return states


def draw(tensors: Iterable[Tensor], times: int) -> None:
    """Draw random numbers, so that the next ones are others than those of the training that goes on after the trial.

    A draw of two numbers leaves the generator of CUDA where a draw of one does; a second draw leads it on.
    """
    for device in {torch.device("cpu"), *(tensor.device for tensor in tensors)}:
        if device.type in ("cpu", "cuda", "xpu", "mps"):  # whose generators the trial restores
            for _ in range(times):
                torch.rand(1, device=device)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor behind the wrappers of torch.func; it outlives them."""
    unwrap: Callable[[Tensor], Tensor] | None = getattr(torch.func, "debug_unwrap", None)
    return tensor if unwrap is None else unwrap(tensor)
