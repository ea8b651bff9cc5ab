"""Ranks that decide together: their sums, and the part of the vectors that each of them holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Ranks:
    """The ranks that decide together.

    Args:
        group: a process group, or None for a process on its own.
    """

    group: Any = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def index(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def total(self, message: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place if the backend can; every rank gets the same bits."""
        if self.size == 1:
            return message
        there = message.to(self._device(message))
        dist.all_reduce(there, group=self.group)
        return there.to(message.device)

    def gathered(self, part: Tensor, length: int) -> Tensor:
        """Parts of at most `length` elements from all ranks, laid end to end; shape (size * length,)."""
        if self.size == 1:
            return part
        device = self._device(part)
        if part.numel() == length:
            own = part.to(device)
        else:
            own = torch.zeros(length, dtype=part.dtype, device=device)
            own[: part.numel()].copy_(part)
        whole = torch.empty(self.size * length, dtype=part.dtype, device=device)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        gather(whole, own, group=self.group)
        return whole

    def _device(self, message: Tensor) -> torch.device:
        """The device on which the backend takes tensors: NCCL needs CUDA tensors."""
        if message.device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return message.device


def ranks_of(process_group: Any) -> Ranks:
    """The ranks of `process_group`, or if it is None all ranks of torch.distributed, if any."""
    if process_group is None and dist.is_available() and dist.is_initialized():
        process_group = dist.group.WORLD
    return Ranks(process_group)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: the local shard of a DTensor (may be empty)."""
    return tensor if type(tensor) in PLAIN else getattr(tensor, "_local_tensor", tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor (whatever its placements)."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def shards_of(tensor: Tensor) -> int:
    """Number of parts into which a tensor is cut: 1 for plain and for replicated tensors."""
    if not is_sharded(tensor):
        return 1
    count, mesh = 1, tensor.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            raise ValueError(f"parameter of shape {tuple(tensor.shape)} is a DTensor with {placement}: only sharded "
                             f"and replicated ones can be extrapolated")  # fmt: skip
        if hasattr(placement, "dim"):  # a Shard, strided or not
            count *= mesh.size(dimension)
    return count


def like(parameter: Tensor, part: Tensor, leading: int) -> Tensor:
    """`part`, shaped (leading dimensions..., local shape..., pair of a complex), as sharded as the parameter is."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    placements = [_shifted(placement, leading) for placement in parameter.placements]  # type: ignore[attr-defined]
    lead, trail = part.shape[:leading], part.shape[leading + parameter.dim() :]
    shape = torch.Size([*lead, *parameter.shape, *trail])
    stride = torch.empty(shape, device="meta").stride()
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def sharded_row(part: Tensor, whole: int, ranks: Ranks) -> Tensor:
    """A window of rows, shape (..., numel), as a DTensor of shape (..., whole) cut along its last dimension."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(ranks.group, part.device.type)
    shape = torch.Size([*part.shape[:-1], whole])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(part.dim() - 1)], run_check=False, shape=shape, stride=stride)


def _shifted(placement: Any, by: int) -> Any:
    """The placement of a tensor that got `by` leading dimensions."""
    if not hasattr(placement, "dim") or by == 0:
        return placement
    fields = {name: getattr(placement, name) for name in ("dim", "split_factor") if hasattr(placement, name)}
    return type(placement)(**(fields | {"dim": placement.dim + by}))
