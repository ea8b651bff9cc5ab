"""What a checkpoint holds: nested dicts and lists of tensors and plain values, and nothing that must be unpickled."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Nested dict (keys str or int), list or tuple of tensors (DTensors included), str, int, float, bool and None.
State = dict[str, Any]

PLAIN = (str, int, float, bool, type(None))
ALLOWED = "dicts (keys str or int), lists, tuples, tensors, str, int, float, bool and None"


class Layout(NamedTuple):
    """Name, shape and dtype of a tensor: what two states of one architecture have in common."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Encoded(NamedTuple):
    """A state in parts that can be written.

    Attributes:
        tree: of JSON values; a tensor is its place in `tensors`, a DTensor its name; None for shards only.
        tensors: on the CPU, each once.
        sharded: DTensors by name.
        layouts: of all tensors, in the order of the tree.
    """

    tree: Any
    tensors: list[Tensor]
    sharded: dict[str, Tensor]
    layouts: list[Layout]

    @property
    def num_bytes(self) -> int:
        """Bytes that this process has to write: of the tensors, and about as many as the text of the tree takes."""
        parts = [*self.tensors, *(local_of(tensor) for tensor in self.sharded.values())]
        text = 0 if self.tree is None else len(json.dumps(self.tree))
        return sum(part.numel() * part.element_size() for part in parts) + text


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor; the module that defines them is not imported for asking."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def leaves(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values by name, as `shared['model']['weight']`, and an empty container for each container.

    Raises:
        TypeError: an entry or a key has another type; the message names it.
    """
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
        _check_tensor(state, name)
        yield name, state
        return
    elif type(state) in PLAIN:
        yield name, state
        return
    else:
        raise TypeError(f"{name} is a {_type(state)}: a checkpoint holds {ALLOWED}")
    for key, value in items:
        yield from leaves(value, f"{name}[{key!r}]")


def _check_tensor(tensor: Tensor, name: str) -> None:
    if is_sharded(tensor):
        if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
            raise TypeError(f"{name} is a DTensor with a partial placement: redistribute it before it is saved")
        return
    if type(tensor.detach()) is not Tensor:
        raise TypeError(f"{name} is a {_type(tensor)}: a checkpoint holds plain tensors and DTensors")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = "without data (meta)" if tensor.device.type == "meta" else f"of layout {tensor.layout}"
        raise TypeError(f"{name} is a tensor {kind}: a checkpoint holds dense tensors")


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def layouts_of(state: Any, name: str) -> list[Layout]:
    """Name, shape (the global one of DTensors) and dtype of all tensors."""
    return [layout_of(leaf, value) for leaf, value in leaves(state, name) if isinstance(value, Tensor)]


def layout_of(name: str, tensor: Tensor) -> Layout:
    return Layout(name, tuple(tensor.shape), str(tensor.dtype))


def architecture_of(layouts: list[Layout]) -> str:
    """Short hash of names, shapes and dtypes."""
    return hashlib.sha256(json.dumps(sorted(layouts)).encode()).hexdigest()[:16]


def encode(state: Any, name: str, *, copy: bool = False, shards_only: bool = False) -> Encoded:
    """Takes a state apart.

    Args:
        state: see `State`.
        name: of the whole, for messages and for the names of DTensors.
        copy: whether the parts must stay as they are while the state changes; tensors of other devices are copied to
            the CPU (to pinned memory, if asked to copy) in any case.
        shards_only: whether nothing but DTensors is copied, on a rank that writes no others: `tensors` stays empty,
            and `tree` is None; `layouts` and `sharded` are those of the whole.

    Raises:
        TypeError: an entry has another type; the message names it.
    """
    encoded = Encoded(None, [], {}, [])
    for _ in leaves(state, name):  # all errors, before the first copy
        pass
    places: dict[Any, int] = {}
    tree = _encode(state, name, encoded, places, copy, shards_only)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the copies to pinned memory are under way
    return encoded if shards_only else encoded._replace(tree=tree)


def _encode(value: Any, name: str, into: Encoded, places: dict[Any, int], copy: bool, shards_only: bool) -> Any:
    def inner(key: Any, entry: Any) -> Any:
        return _encode(entry, f"{name}[{key!r}]", into, places, copy, shards_only)

    if isinstance(value, dict):
        return {"dict": [[key, inner(key, entry)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [inner(place, entry) for place, entry in enumerate(value)]}
    if not isinstance(value, Tensor):
        return value
    into.layouts.append(layout_of(name, value))
    if is_sharded(value):
        into.sharded[name] = _copy_of_shards(value) if copy else value.detach()
        return {"sharded": name, "shape": list(value.shape), "dtype": str(value.dtype)}
    if shards_only:
        return None
    # Tied tensors are written once. Empty ones have no address that could tell them apart.
    identity = (
        value.device,
        value.data_ptr(),
        value.shape,
        value.stride(),
        value.dtype,
        value.is_conj(),
        value.is_neg(),
    )
    place = places.get(identity) if value.numel() else None
    if place is None:
        place = places[identity] = len(into.tensors)
        into.tensors.append(_on_cpu(value.detach(), copy))
    return {"tensor": place}


def _on_cpu(tensor: Tensor, copy: bool) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type == "cpu":
        # torch.save writes the whole storage behind a view.
        is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        return tensor.clone() if copy or is_view else tensor
    if tensor.device.type == "cuda" and copy:
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)
    return tensor.cpu()


def _copy_of_shards(tensor: Any) -> Tensor:
    """The same DTensor with a copy of the local part on the CPU; its mesh only says where the part belongs."""
    from torch.distributed.tensor import DTensor

    local = _on_cpu(tensor.detach().to_local(), copy=True)
    return DTensor(local, tensor._spec, requires_grad=False)


def decode(tree: Any, tensors: list[Tensor], sharded: Mapping[str, Tensor]) -> Any:
    """Puts a state together again.

    Raises:
        ValueError: the tree is none that `encode` makes.
    """
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("its tree holds a bare list")
        return tree
    try:
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        if "sharded" in tree:
            return sharded[tree["sharded"]]
        if "dict" in tree:
            return {key: decode(entry, tensors, sharded) for key, entry in tree["dict"]}
        if "tuple" in tree:
            return tuple(decode(entry, tensors, sharded) for entry in tree["tuple"])
        return [decode(entry, tensors, sharded) for entry in tree["list"]]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"its tree has a wrong entry ({error!r})") from None


def shards_in(tree: Any) -> Iterator[Layout]:
    """The DTensors that a tree names."""
    if isinstance(tree, list):
        for entry in tree:
            yield from shards_in(entry)
    elif isinstance(tree, dict):
        if "sharded" in tree:
            yield Layout(tree["sharded"], tuple(tree["shape"]), tree["dtype"])
        else:
            for entry in tree.values():
                yield from shards_in(entry)


def targets_of(tree: Any, template: State | None) -> dict[str, Tensor]:
    """What saved DTensors are loaded into, by name: new DTensors like those of the template, else whole tensors.

    Raises:
        ValueError: the tree names a dtype that there is not.
    """
    known = {name: leaf for name, leaf in leaves(template or {}, "shared") if is_sharded(leaf)}
    targets = {}
    for name, shape, dtype in shards_in(tree):
        like = known.get(name)
        if like is not None and layout_of(name, like) == Layout(name, shape, dtype):
            targets[name] = torch.empty_like(like)
        else:
            targets[name] = torch.empty(shape, dtype=_dtype(dtype))
    return targets


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"its tree names the dtype {text!r}")
    return dtype


def check_template(saved: list[Layout], template: State | None) -> None:
    """Compares the tensors below each key of a template with those that were saved.

    Raises:
        ValueError: names, shapes or dtypes differ; the message names the first tensor.
    """
    for key in template or {}:
        prefix = f"shared[{key!r}]"
        have = {layout.name: layout for layout in layouts_of((template or {})[key], prefix)}
        found = {
            layout.name: layout for layout in saved if layout.name == prefix or layout.name.startswith(f"{prefix}[")
        }
        for name in [*have, *found]:
            mine, theirs = have.get(name), found.get(name)
            if theirs is None:
                raise ValueError(f"another architecture: {name} is missing in it")
            if mine is None:
                raise ValueError(f"another architecture: it has {name}, which is missing here")
            if mine != theirs:
                raise ValueError(
                    f"another architecture: {name} has shape {theirs.shape} and {theirs.dtype} in it, and shape "
                    f"{mine.shape} and {mine.dtype} here"
                )


def digest(state: Any) -> str:
    """SHA-256 over all names, types, values and bits of a state; of DTensors the local part. The order of keys is none.

    Raises:
        TypeError: an entry has another type than a checkpoint holds.
    """
    result = hashlib.sha256()
    for name, value in sorted(leaves(state, "state"), key=lambda leaf: leaf[0]):
        if isinstance(value, Tensor):
            result.update(json.dumps(layout_of(name, value)).encode())
            result.update(_bits(local_of(value)))
        else:
            result.update(json.dumps([name, _type(value), value]).encode())
    return result.hexdigest()


def _bits(tensor: Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


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
