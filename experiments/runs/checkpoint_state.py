"""What a checkpoint holds: nested dicts and lists of tensors and plain values, and nothing that must be unpickled."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
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


def on_cpu(state: Any, name: str, *, keep: bool = True, sharded: bool = True) -> Any:
    """The same state with plain tensors on the CPU, and DTensors whole.

    All ranks that hold parts of DTensors must call, because these are gathered one after the other. A rank that does
    not `keep` the result only does its part, and gets None.

    Raises:
        TypeError: an entry, named as `shared['model']['weight']`, is neither a tensor nor a plain value, or a DTensor
            in a state that is not `sharded`.
    """
    if isinstance(state, dict):
        for key in state:
            if type(key) not in (str, int):
                raise TypeError(f"{name} has the key {key!r} of type {_type(key)}: keys must be str or int")
        entries = {key: on_cpu(value, f"{name}[{key!r}]", keep=keep, sharded=sharded) for key, value in state.items()}
        return entries if keep else None
    if isinstance(state, list) or type(state) is tuple:
        parts = [on_cpu(value, f"{name}[{i}]", keep=keep, sharded=sharded) for i, value in enumerate(state)]
        return (parts if isinstance(state, list) else tuple(parts)) if keep else None
    if is_sharded(state):
        if not sharded:
            raise TypeError(f"{name} is a DTensor, which belongs into the shared state")
        state = state.detach().full_tensor()
    if isinstance(state, Tensor):
        if type(state.detach()) is not Tensor:
            raise TypeError(f"{name} is a {_type(state)}: a checkpoint holds plain tensors and DTensors")
        return _plain(state.detach()) if keep else None
    if type(state) not in PLAIN:
        raise TypeError(f"{name} is a {_type(state)}: a checkpoint holds {ALLOWED}")
    return state if keep else None


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def num_bytes_of(state: Any) -> int:
    """Of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(num_bytes_of, parts))


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
