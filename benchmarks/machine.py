"""What a benchmark asks of the machine: its facts, its bandwidth, clocks, and memory in use."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

ROOT = Path(__file__).resolve().parent.parent
BANDWIDTH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Of the array copied and read: many times a last-level cache, and long against the start of a kernel."""


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and least of `count` times, in seconds."""

    median: float
    low: float
    high: float
    count: int
    least: float


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second between processor and memory; a copy of N bytes counts 2 N, y += x 3 N.

    Such an update in place is often faster than both others: it writes lines that were just read.
    """

    copy: float
    read: float
    update: float


def spread(times: Sequence[float]) -> Spread:
    """Median, quartiles and least; raises ValueError without a time."""
    if not times:
        raise ValueError("no times were measured")
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return Spread(median(times), low, high, len(times), min(times))


def facts(device: str) -> dict[str, Any]:
    """Processor, threads, versions, commit and date, as plain values."""
    cuda = device.startswith("cuda")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def time_call(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU between two events in its stream, the host's waits included."""
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


class BandwidthMeter:
    """Copy and read bandwidth, sampled again and again on a machine that others use as well.

    Reading is the faster of a sum of one array and an inner product of two.
    """

    def __init__(self, device: str, size: int | None = None) -> None:
        self.device, self.size = device, size or BANDWIDTH_BYTES[torch.device(device).type]
        self.samples: list[Bandwidth] = []

    def sample(self, repeats: int = 3) -> Bandwidth:
        """The best of a few passes; kept in `samples`. Takes about half a second on one core."""
        source, target = (torch.ones(self.size // 4, device=self.device) for _ in range(2))

        def fastest(call: Callable[[], object], moved: int) -> float:
            return moved / min(time_call(call, self.device) for _ in range(repeats))

        copy = fastest(lambda: target.copy_(source), 2 * self.size)
        total = fastest(lambda: source.sum(), self.size)
        product = fastest(lambda: torch.dot(source, target), 2 * self.size)
        update = fastest(lambda: target.add_(source, alpha=-0.1), 3 * self.size)
        self.samples.append(Bandwidth(copy, max(total, product), update))
        return self.samples[-1]

    def median(self) -> Bandwidth:
        """Median over the samples."""
        return Bandwidth(*(median(getattr(s, name) for s in self.samples) for name in ("copy", "read", "update")))


def tensor_bytes(device: str) -> int:
    """Bytes of all storages that a living tensor of Python refers to, each counted once.

    The fake tensors that a compiler leaves have none. Exact at any size, and blind to memory that is not torch's:
    `resident_bytes` sees that.
    """
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)} - {FakeTensor}
    place, storages = torch.device(device).type, {}
    for item in (item for item in objects if type(item) in kinds):
        if item.layout == torch.strided and item.device.type == place:
            with suppress(RuntimeError):  # another wrapper without memory
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes(device: str) -> int | None:
    """Bytes in use: of the process (Linux), or allocated on the GPU. None where the system does not say."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else _status("VmRSS")


def peak_bytes(device: str) -> int | None:
    """The most bytes in use since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def forget_peak(device: str) -> bool:
    """Start `peak_bytes` anew; returns whether the system can."""
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
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _status(name: str) -> int | None:
    return _kilobytes(Path("/proc/self/status"), name)


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes of a line `name:  N kB`."""
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of the checkout, with "+" where it has changes; "unknown" without git."""
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            answers.append(
                subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
    return answers[0] + "+" * bool(answers[1])
