"""Memory for the rows of a history, and the error that is raised if there is no room for it."""

from __future__ import annotations

import mmap
import os
from typing import NamedTuple

import torch
from torch import Tensor

from aadl.mixing import host_tensor
from aadl.ranks import Ranks
from aadl.settings import Settings

MAPPED_FROM = 1 << 20
"""Bytes of a tensor on the host from which the system is asked for pages."""
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class Need(NamedTuple):
    """Memory that a history needs on this rank."""

    nbytes: dict[torch.device, int]
    elements: dict[str, int]
    """Elements of one vector, by kind."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool = False) -> Tensor:
    """A tensor of zeros; a large one on the host takes memory only when it is written to.

    torch.zeros writes its zeros at once. For rows of 1e8 elements that takes seconds of the first step, even for rows
    that a short training never fills.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or pinned or nbytes < MAPPED_FROM:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
    return torch.frombuffer(mmap.mmap(-1, nbytes, **PRIVATE), dtype=dtype).view(shape)


def check_room(need: Need, settings: Settings) -> None:
    """Raise an error for a history that cannot fit, before any of it is allocated.

    The free memory of a CUDA device is known. Of the host only the size is known, not what other processes take, nor
    the limits of a container or a batch system.

    Raises:
        torch.OutOfMemoryError: naming the bytes and what makes them fewer.
    """
    for device, count in need.nbytes.items():
        room = room_on(device)
        if room is not None and count > room:
            raise no_room(need, settings, device)


def no_room(need: Need, settings: Settings, device: torch.device | None = None) -> torch.OutOfMemoryError:
    """The error about a history that cannot be allocated (on `device`, or on the one that needs most)."""
    device = device or max(need.nbytes, key=need.nbytes.__getitem__)
    room = room_on(device)
    has = "" if room is None else f" ({'the host has' if device.type == 'cpu' else 'free:'} {size(room)})"
    elements = " and ".join(f"{count:,} elements of {kind}" for kind, count in need.elements.items())
    return torch.OutOfMemoryError(
        f"the history of this accelerator, history_depth={settings.history_depth} for {elements}, needs "
        f"{size(need.nbytes[device])} on {device}, which cannot be allocated{has}: use {_cures(need, settings, device)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed for lack of room. (The host's allocators have no error type of their own.)"""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error)


def agree(ranks: Ranks, error: torch.OutOfMemoryError | None) -> None:
    """Raise on every rank if the history does not fit on one of them; the ranks exchange eight bytes."""
    failed = round(float(ranks.total(host_tensor(float(error is not None)))))
    if error is not None:
        raise error
    if failed:
        raise torch.OutOfMemoryError(
            f"the history of this accelerator fits on this rank, but not on {failed} of the {ranks.size} ranks, whose "
            f"errors say what it needs there"
        )


def size(count: int) -> str:
    """Bytes with three digits and a unit, as 1.23 GB."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB", "EB"]
    while number >= 999.5 and len(units) > 1:
        number /= 1e3
        units.pop(0)
    return f"{number:.3g} {units[0]}"


def room_on(device: torch.device) -> int | None:
    """Most bytes that a history can have; None if that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cures(need: Need, settings: Settings, device: torch.device) -> str:
    """Arguments that make the history smaller or put it elsewhere, without those that are in use already."""
    cures = [f"history_depth={settings.history_depth // 2}"] if settings.history_depth > 1 else []
    cures += ["history_dtype=torch.bfloat16"] if settings.history_dtype != torch.bfloat16 else []
    cures += ["state_coupling='combine'"] if "momentum" in need.elements and settings.state_coupling == "full" else []
    if settings.acceleration_type != "nonlinear_gmres":  # which takes neither
        cures += ["shard_history=True (replicas on several ranks)"] if not settings.shard_history else []
        cures += ["history_device='cpu'"] if device.type != "cpu" else []
    return " or ".join([", ".join(cures[:-1]), cures[-1]] if len(cures) > 1 else cures) or "a smaller model"
