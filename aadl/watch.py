"""Signs that somebody else wrote to the tensors of an optimizer, read almost without reading the tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.parameters import MOMENTUM_KEYS, all_parameters, states_of
from aadl.ranks import PLAIN, is_sharded, local

Writes = dict[str, list[int]]
"""By kind of write: the gap between two steps that had it last, and its distance from the one before (0: none)."""

PLAIN_TYPES = frozenset(PLAIN)
_version_of = operator.attrgetter("_version")


@dataclass
class Snapshot:
    """Parameters and momentum buffers of an optimizer at one time."""

    tensors: list[Tensor]
    """Parameters, momentum buffers, and the local shards of all of them where there are shards."""
    trainable: list[bool]
    places: list[tuple[int, tuple[int, ...]]]
    """Address and strides of each tensor or local shard."""
    versions: list[int]

    def same_places(self, other: Snapshot) -> bool:
        """Whether these are the same tensors in the same memory."""
        return (
            len(self.tensors) == len(other.tensors)
            and all(map(operator.is_, self.tensors, other.tensors))
            and self.trainable == other.trainable
            and self.places == other.places
        )

    def untouched_since(self, other: Snapshot) -> bool:
        """Whether nobody wrote since the other snapshot. In-place changes through `.data` leave no mark."""
        return self.versions == other.versions and self.same_places(other)

    def keeps(self, other: Snapshot) -> bool:
        """Whether all tensors of an earlier look are still there, in the same memory; new ones do not matter."""
        here = dict(zip(map(id, self.tensors[-len(self.places) :]), self.places, strict=True))
        known = zip(other.tensors[-len(other.places) :], other.places, strict=True)
        return all(here.get(id(tensor)) == place for tensor, place in known)


def snapshot_of(optimizer: Optimizer, with_momentum: bool) -> Snapshot:
    """Identities, addresses and version counters; no element is read."""
    parameters = all_parameters(optimizer)
    tensors = parameters + (momentum_buffers(optimizer, parameters) if with_momentum else [])
    shards = not PLAIN_TYPES.issuperset(map(type, parameters)) and any(map(is_sharded, parameters))
    tensors += [local(tensor) for tensor in tensors] if shards else []
    here = tensors[len(tensors) // 2 :] if shards else tensors
    places = [(t.data_ptr(), t.stride()) if t.layout == torch.strided else (0, ()) for t in here]
    return Snapshot(tensors, [p.requires_grad for p in parameters], places, versions_of(tensors))


def momentum_buffers(optimizer: Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    """The buffers in which the optimizer keeps first moments; other entries of its state are left out.

    An event asks three times, so the loop takes the shortest way for plain dictionaries and plain tensors.
    """
    states = states_of(optimizer)
    found: list[Tensor] = []
    for p in parameters if states else ():
        state = states.get(p)
        if (type(state) is not dict and not isinstance(state, Mapping)) or not state:
            continue
        for key in MOMENTUM_KEYS:
            buffer = state.get(key)
            if isinstance(buffer, Tensor) and (type(buffer) in PLAIN or is_sharded(buffer)):
                found.append(buffer)
    return found


def versions_of(tensors: list[Tensor]) -> list[int]:
    """Version counters, which count in-place changes."""
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:  # inference tensors have none
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def have_moved(tensors: Sequence[Tensor], versions: list[int], count: int) -> bool:
    """Whether one of the first `count` tensors has another version than it had; the first one that has is the last
    that is asked."""
    try:
        return tensors[0]._version != versions[0] or any(map(operator.ne, versions[:count], map(_version_of, tensors)))
    except RuntimeError:  # inference tensors have none
        return any(map(operator.ne, versions[:count], versions_of(list(tensors))))


def kind_of_write(before: list[int], after: list[int]) -> str:
    """Kind of the writes between two readings of the counters: how many, to how many tensors; "" for none."""
    if before == after:
        return ""
    changes = list(map(operator.sub, after, before))
    return f"{sum(changes)} in {sum(map(bool, changes))}"


def is_regular(writes: Writes, kind: str, gap: int, longest: int) -> bool:
    """Note a write; return whether writes of this kind come at equal distances, so that they belong to the map.

    A projection after every step and the synchronization of an outer optimizer after every few do; loading does not.

    Args:
        writes: those of late, by kind; those before the last `longest` gaps are forgotten.
        kind: from `kind_of_write`.
        gap: number of the gap between two steps.
        longest: distance in gaps, >= 1.
    """
    for known in [known for known, (last, _) in writes.items() if gap - last > longest]:
        del writes[known]
    last, distance = writes.get(kind, (gap, 0))
    writes[kind] = [gap, gap - last]
    return gap - last == distance > 0


def first_element(tensor: Tensor) -> Tensor:
    """A view of the first element of a tensor that has one, shape (1,)."""
    here = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return here.as_strided((1,), (1,))


class Sample:
    """Numbers that show that a model was filled through `.data`.

    Args:
        elements: views of single elements.
        kept: the numbers to compare them with; those of now unless given.
    """

    def __init__(self, elements: list[Tensor], kept: list[float] | None = None) -> None:
        self._elements = elements
        self.kept: list[Any] = self._now() if kept is None else kept

    def keep(self) -> None:
        """Remember the numbers as they are."""
        self.kept = self._now()

    def _now(self) -> list[Any]:
        return list(map(Tensor.item, self._elements))

    def change(self) -> float:
        """The largest distance to a number that was remembered; nan equals nan, and is far from all others."""
        pairs = zip(self._now(), self.kept, strict=True)
        changes = [abs(now - kept) for now, kept in pairs if now != kept and (now == now or kept == kept)]
        return max((inf if isnan(change) else change for change in changes), default=0.0)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and type hold the same elements; nan equals the same nan."""
    return torch.equal(left, right) or torch.equal(left.view(torch.uint8), right.view(torch.uint8))
