"""What a benchmark asks of the machine: its facts, clock, bandwidth, memory in use, and processes of their own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
BANDWIDTH_BYTES = 1 << 28
"""Of the array copied and read: many times a last-level cache."""


def facts() -> dict[str, Any]:
    """Processor, threads, versions, date, and the commit of the checkout, with "+" where it has changes."""
    from experiments.records.provenance import git_state

    commit, changed = git_state()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit[:9] + "+" * changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_fresh_process(function: Callable[..., T], *arguments: Any, threads: int = 1) -> T:
    """The result of the function in a process of its own, whose torch has so many threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *arguments).result()


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second between processor and memory; a copy of N bytes counts 2 N, y += x 3 N.

    Such an update in place is often faster than both others, because it writes lines that were just read.
    """

    copy: float
    read: float
    update: float


class BandwidthMeter:
    """Copy and read bandwidth, sampled repeatedly, because others may use the machine as well.

    Reading is the faster of a sum of one array and an inner product of two.
    """

    def __init__(self, size: int = BANDWIDTH_BYTES) -> None:
        self.size = size
        self.samples: list[Bandwidth] = []

    def sample(self, repeats: int = 3) -> None:
        """Adds the best of a few passes to `samples`. Takes about half a second on one core."""
        source, target = (torch.ones(self.size // 4) for _ in range(2))

        def fastest(call: Callable[[], object], moved: int) -> float:
            return moved / min(time_call(call) for _ in range(repeats))

        copy = fastest(lambda: target.copy_(source), 2 * self.size)
        total = fastest(lambda: source.sum(), self.size)
        product = fastest(lambda: torch.dot(source, target), 2 * self.size)
        update = fastest(lambda: target.add_(source, alpha=-0.1), 3 * self.size)
        self.samples.append(Bandwidth(copy, max(total, product), update))

    def median(self) -> Bandwidth:
        """Median over the samples."""
        return Bandwidth(*(median(getattr(s, field.name) for s in self.samples) for field in fields(Bandwidth)))


def storages() -> dict[int, int]:
    """Bytes of the memory behind all plain dense tensors of Python in the memory of the processor, by address.

    Exact at any size, and blind to memory that is not torch's, which `resident_bytes` sees.
    """
    found = {}
    for item in gc.get_objects():
        is_plain = type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout == torch.strided
        if is_plain and item.device.type == "cpu":
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def resident_bytes() -> int | None:
    """Bytes of this process in memory (Linux); None where the system does not say."""
    return _kilobytes("/proc/self/status", "VmRSS")


def peak_bytes() -> int | None:
    """The most bytes in use since `forget_peak`."""
    return _kilobytes("/proc/self/status", "VmHWM")


def forget_peak() -> bool:
    """Lets `peak_bytes` begin at the bytes in use now; returns whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Bytes that can still be allocated without swapping."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(path: str, name: str) -> int | None:
    """Bytes of a line `name:  N kB`, None without such a file or line."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":")), None)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
