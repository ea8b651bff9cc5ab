"""What a checkpoint holds: nested dicts and lists of tensors and plain values, and nothing that must be unpickled."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Nested dict (keys str or int), list or tuple of tensors (DTensors included), str, int, float, bool and None.
State = dict[str, Any]

PLAIN = (str, int, float, bool, type(None))
ALLOWED = "dicts (keys str or int), lists, tuples, tensors, str, int, float, bool and None"


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor; the module that defines them is not imported for asking."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def leaves(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors, plain values and empty containers by name, as `shared['model']['weight']`; TypeError for other types."""
    items: Iterator[tuple[Any, Any]]
    if isinstance(state, dict):
        for key in state:
            if type(key) not in (str, int):
                raise TypeError(f"{name} has the key {key!r} of type {_type(key)}: keys must be str or int")
        yield name, {}
        items = iter(state.items())
    elif isinstance(state, list) or type(state) is tuple:
        yield name, [] if isinstance(state, list) else ()
        items = iter(enumerate(state))
    elif isinstance(state, Tensor):
        if not is_sharded(state) and type(state.detach()) is not Tensor:
            raise TypeError(f"{name} is a {_type(state)}: a checkpoint holds plain tensors and DTensors")
        yield name, state
        return
    elif type(state) in PLAIN:
        yield name, state
        return
    else:
        raise TypeError(f"{name} is a {_type(state)}: a checkpoint holds {ALLOWED}")
    for key, value in items:
        yield from leaves(value, f"{name}[{key!r}]")


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_state(state: Any, name: str, *, sharded: bool = True) -> None:
    """Raises TypeError where a state holds anything but tensors and plain values, or DTensors unless `sharded`."""
    for leaf, value in leaves(state, name):
        if not sharded and is_sharded(value):
            raise TypeError(f"{leaf} is a DTensor, which belongs into the shared state")


def num_bytes_of(state: Any) -> int:
    tensors = (value for _, value in leaves(state, "") if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def on_cpu(state: Any, *, keep: bool = True) -> Any:
    """The same state with plain tensors on the CPU, and DTensors whole.

    All ranks that hold parts of DTensors must call, because these are gathered one after the other. A rank that does
    not `keep` the result only does its part, and gets None.
    """
    if isinstance(state, dict):
        entries = {key: on_cpu(entry, keep=keep) for key, entry in state.items()}
        return entries if keep else None
    if isinstance(state, (list, tuple)):
        parts = [on_cpu(entry, keep=keep) for entry in state]
        return (tuple(parts) if isinstance(state, tuple) else parts) if keep else None
    if is_sharded(state):
        whole = state.detach().full_tensor()
        return _plain(whole) if keep else None
    if not keep:
        return None
    return _plain(state.detach()) if isinstance(state, Tensor) else state


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type != "cpu":
        return tensor.cpu()
    # torch.save writes the whole storage behind a view.
    is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if is_view else tensor


def rng_state() -> State:
    """The random generators of this process: Python, numpy's global one, torch on the CPU and on its GPU, if used."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if uses_cuda else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Continues the random generators where `rng_state` saw them; that of a GPU only where there is one."""
    python, of_numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = of_numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((of_numpy["name"], keys, of_numpy["position"], of_numpy["has_gauss"], of_numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
