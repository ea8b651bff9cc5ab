"""Noticing that somebody else wrote to the tensors of an optimizer, without reading them."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.parameters import MOMENTUM_KEYS, all_parameters, state_of
from aadl.ranks import PLAIN, is_sharded, local


class Look(NamedTuple):
    """Parameters and momentum buffers of an optimizer at one time."""

    tensors: list[Tensor]
    """Parameters, momentum buffers, and the local shards of all of them where there are shards."""
    trainable: list[bool]
    places: list[tuple[int, tuple[int, ...]]]
    """Address and strides of each tensor or local shard."""
    versions: list[int]

    def same_places(self, other: Look) -> bool:
        """Whether these are the same tensors in the same memory."""
        return (
            len(self.tensors) == len(other.tensors)
            and all(map(operator.is_, self.tensors, other.tensors))
            and self.trainable == other.trainable
            and self.places == other.places
        )

    def untouched_since(self, other: Look) -> bool:
        """Whether nobody wrote in between. In-place changes through `.data` leave no mark."""
        return self.versions == other.versions and self.same_places(other)


def look_at(optimizer: Optimizer, with_momentum: bool) -> Look:
    """Identities, addresses and version counters; no element is read."""
    parameters = all_parameters(optimizer)
    tensors = parameters[:]
    if with_momentum:
        for p in parameters:
            state = state_of(optimizer, p)
            buffers = [state[key] for key in MOMENTUM_KEYS if isinstance(state.get(key), Tensor)] if state else ()
            tensors += [buffer for buffer in buffers if type(buffer) in PLAIN or is_sharded(buffer)]
    shards = any(map(is_sharded, parameters))
    tensors += [local(tensor) for tensor in tensors] if shards else []
    here = tensors[len(tensors) // 2 :] if shards else tensors
    places = [(t.data_ptr(), t.stride()) if t.layout == torch.strided else (0, ()) for t in here]
    return Look(tensors, [p.requires_grad for p in parameters], places, versions_of(tensors))


def versions_of(tensors: list[Tensor]) -> list[int]:
    """Version counters, which count in-place changes."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors have none
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
