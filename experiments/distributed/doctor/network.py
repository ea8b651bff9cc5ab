"""Clocks and bandwidth between the ranks."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from experiments.distributed.devices import device_of
from experiments.distributed.doctor.finding import Finding
from experiments.distributed.ranks import Ranks
from experiments.distributed.together import gather

SKEW_SECONDS = 1.0
SIZES_BYTES = (2**12, 2**20, 2**24)


def clocks(ranks: Ranks) -> list[Finding]:
    if ranks.world_size == 1:
        return []
    skews = []
    for _ in range(5):
        dist.barrier()
        times = gather(ranks, time.time())
        skews.append(max(times) - min(times))
    skew = min(skews)  # the others measure how late ranks left the barrier, too
    cure = "have the clocks of the nodes set (chrony, ntp)" if skew > SKEW_SECONDS else ""
    return [Finding("clocks", f"within {skew * 1e3:.0f} ms of each other", cure)]


def bandwidth(ranks: Ranks) -> list[Finding]:
    """Reports the bus bandwidth of all_reduce, 2 (n - 1) / n bytes / seconds, which depends on no number of ranks."""
    if ranks.world_size == 1:
        return []
    device, parts = device_of(ranks), []
    if dist.get_backend() == "gloo":
        device = torch.device("cpu")
    for size in SIZES_BYTES:
        values = torch.zeros(size // 4, device=device)
        seconds = min(_time_all_reduce(values) for _ in range(4))
        bandwidth = 2 * (ranks.world_size - 1) / ranks.world_size * size / seconds / 1e9
        parts.append(f"{size // 1024} KiB {seconds * 1e3:.2f} ms {bandwidth:.2f} GB/s")
    return [Finding("all_reduce", "; ".join(parts))]


def _time_all_reduce(values: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
