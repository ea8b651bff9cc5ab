"""What a benchmark asks of the machine: its facts, clocks, bandwidth, memory in use, and processes of their own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import time
import warnings
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
BANDWIDTH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Of the array copied and read: many times a last-level cache, and long against the start of a kernel."""


def facts(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads, versions, date, and the commit of the checkout, with "+" where it has changes."""
    from experiments.records.provenance import git_state

    commit, changed = git_state()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit[:9] + "+" * changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def time_call(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call; on a GPU between two events in its stream, which includes the waits of the host."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def host_waits(call: Callable[[], object]) -> int:
    """How often a call makes the host wait for the GPU, counted by PyTorch's warnings."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


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

    def __init__(self, device: str = "cpu", size: int | None = None) -> None:
        self.device, self.size = device, size or BANDWIDTH_BYTES[torch.device(device).type]
        self.samples: list[Bandwidth] = []

    def sample(self, repeats: int = 3) -> None:
        """Adds the best of a few passes to `samples`. Takes about half a second on one core."""
        source, target = (torch.ones(self.size // 4, device=self.device) for _ in range(2))

        def fastest(call: Callable[[], object], moved: int) -> float:
            return moved / min(time_call(call, self.device) for _ in range(repeats))

        copy = fastest(lambda: target.copy_(source), 2 * self.size)
        total = fastest(lambda: source.sum(), self.size)
        product = fastest(lambda: torch.dot(source, target), 2 * self.size)
        update = fastest(lambda: target.add_(source, alpha=-0.1), 3 * self.size)
        self.samples.append(Bandwidth(copy, max(total, product), update))

    def median(self) -> Bandwidth:
        """Median over the samples."""
        return Bandwidth(*(median(getattr(s, field.name) for s in self.samples) for field in fields(Bandwidth)))


def storages(device: str = "cpu") -> dict[int, int]:
    """Bytes of the memory behind all plain dense tensors of Python that exist on the device, by address.

    Exact at any size, and blind to memory that is not torch's, which `resident_bytes` sees.
    """
    found = {}
    for item in gc.get_objects():
        is_plain = type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout == torch.strided
        if is_plain and item.device.type == torch.device(device).type:
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def resident_bytes(device: str = "cpu") -> int | None:
    """Bytes in use: of the process (Linux), or allocated on the GPU. None where the system does not say."""
    return (
        torch.cuda.memory_allocated(device) if device.startswith("cuda") else _kilobytes("/proc/self/status", "VmRSS")
    )


def peak_bytes(device: str = "cpu") -> int | None:
    """The most bytes in use since `forget_peak`."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes("/proc/self/status", "VmHWM")


def forget_peak(device: str) -> bool:
    """Lets `peak_bytes` begin at the bytes in use now; returns whether the system can."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes(device: str) -> int | None:
    """Bytes that can still be allocated without swapping."""
    return (
        torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else _kilobytes("/proc/meminfo", "MemAvailable")
    )


def _kilobytes(path: str, name: str) -> int | None:
    """Bytes of a line `name:  N kB`, None without such a file or line."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":")), None)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
