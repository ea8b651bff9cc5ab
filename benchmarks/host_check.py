"""Seconds of the accelerator's events on this host, with two gloo ranks, and what the machine model says of them."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import aadl
from benchmarks.fake_ranks import Count, Descent, accelerate, in_processes
from benchmarks.machine_model import (
    LONG_PAYLOAD,
    NETWORK_EFFICIENCY,
    Collective,
    Machine,
    Overhead,
    Protocol,
    Setting,
    collective_seconds,
    event_seconds,
)

CHECK_ELEMENTS = 4_000_000
CHECK_REPEATS = 9
COPY_BYTES = 1 << 28
"""Of the array copied: larger than most last-level caches, as the history of CHECK_ELEMENTS parameters is."""


@dataclass(frozen=True)
class Check:
    """One quantity on this host: seconds measured with two gloo ranks, and what the model says."""

    name: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted


@dataclass(frozen=True)
class Host:
    """Seconds measured on this host: medians, on one of two ranks that work at the same time."""

    copy_bandwidth: float
    """Bytes read and written per second and rank."""
    all_reduce_latency: float
    """Of 8 bytes."""
    gather_bandwidth: float
    """Bytes per second a rank sends in an all-gather half as long as the candidate's."""
    overhead: dict[str, Overhead]
    """By layout, from parameters too small to cost anything."""
    events: dict[str, Overhead]
    """By layout, for `elements` parameters, overhead included."""
    gram_all_reduce: float
    gather: float
    gram_bytes: int
    elements: int


def measure_rank(
    rank: int, world: int, store: str, layouts: Sequence[str], elements: int, gram_bytes: int, copy_bytes: int
) -> Host:
    """What one rank of a gloo group on this host sees; call it on all ranks at once."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=FutureWarning)
    timeout = timedelta(minutes=1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    source, target = torch.ones(copy_bytes // 4), torch.ones(copy_bytes // 4)
    copying = [timed(lambda: target.copy_(source))]
    word, gram = torch.zeros(1, dtype=torch.float64), torch.zeros(gram_bytes // 8, dtype=torch.float64)
    overhead = {layout: event_times(layout, 1000) for layout in layouts}
    events = {}
    for layout in layouts:
        events[layout] = event_times(layout, elements)
        copying.append(timed(lambda: target.copy_(source)))
    host = Host(
        copy_bandwidth=2 * copy_bytes / median(copying),
        all_reduce_latency=timed(lambda: dist.all_reduce(word), 301),
        gram_all_reduce=timed(lambda: dist.all_reduce(gram), 301),
        gather_bandwidth=2 * elements / world * (world - 1) / timed(gather(elements // 2, world)),
        gather=timed(gather(elements, world)),
        overhead=overhead,
        events=events,
        gram_bytes=gram_bytes,
        elements=elements,
    )
    dist.barrier()
    dist.destroy_process_group()
    return host


def timed(action: Callable[[], Any], repeats: int = CHECK_REPEATS) -> float:
    """Median seconds of an action all ranks begin together."""
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def gather(elements: int, world: int) -> Callable[[], Any]:
    """An all-gather of float32 vectors that make up `elements` together."""
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    whole, own = torch.zeros(elements // world * world), torch.ones(elements // world)
    return lambda: gather_into(whole, own)


def event_times(layout: str, elements: int, period: int = 4) -> Overhead:
    """Seconds that storing, accelerating (without the store) and judging (without the store) add to an SGD step.

    A plain optimizer on parameters of its own steps in turn, so that both see the same disturbances.
    """
    (plain_descent, plain), (descent, optimizer) = make_optimizer(elements), make_optimizer(elements)
    accelerate(optimizer, layout, history_depth=10, frequency=period)
    seconds: dict[str, list[float]] = {"store": [], "acceleration": [], "judgment": []}
    kind, warm_up = "store", 12
    for done in range(warm_up + period * CHECK_REPEATS):
        before = dict(aadl.accelerator_of(optimizer).statistics)
        passed = step_seconds(descent, optimizer) - step_seconds(plain_descent, plain)
        after = aadl.accelerator_of(optimizer).statistics
        now = "acceleration" if after["attempts"] > before["attempts"] else kind
        kind = "judgment" if after["accepted"] > before["accepted"] else "store"
        if done >= warm_up:  # the window is full
            seconds[now].append(passed)
    if not seconds["judgment"]:
        raise RuntimeError(f"layout {layout!r}: no candidate was accepted: {aadl.accelerator_of(optimizer).statistics}")
    store = median(seconds["store"])
    return Overhead(store, median(seconds["acceleration"]) - store, median(seconds["judgment"]) - store)


def make_optimizer(elements: int) -> tuple[Descent, torch.optim.Optimizer]:
    """SGD on one vector."""
    parameter = torch.nn.Parameter(torch.randn(elements))
    return Descent([parameter]), torch.optim.SGD([parameter], lr=0.1)


def step_seconds(descent: Descent, optimizer: torch.optim.Optimizer) -> float:
    """Of one optimizer step that all ranks begin together; the gradient is there before."""
    descent.set_gradients()
    dist.barrier()
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def measure_host(
    layouts: Sequence[str], gram_bytes: int, elements: int = CHECK_ELEMENTS, copy_bytes: int = COPY_BYTES
) -> Host:
    """Two gloo ranks; rank 0's view, since they wait for each other."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [(rank, 2, store, tuple(layouts), elements, gram_bytes, copy_bytes) for rank in range(2)]
        return in_processes(measure_rank, ranks)[0]


def gram_bytes_of(counts: Iterable[Count]) -> int:
    """The longest short collective of a counted acceleration; 616 (m = 10) where none was counted."""
    payloads = [each.payload for count in counts for each in count.pattern.acceleration]
    return max((payload for payload in payloads if payload <= LONG_PAYLOAD), default=616)


def host_machine(host: Host) -> Machine:
    """This host as a machine of the model: one node, gloo between two processes."""
    gloo = (Protocol(host.all_reduce_latency, 0.0, 0.0),)
    nominal = host.gather_bandwidth / NETWORK_EFFICIENCY  # measured, so no further reduction
    return Machine("this host", host.copy_bandwidth, 0, 0, 0, 0, 2, nominal, nominal, (), gloo, ())


def checks_of(host: Host) -> list[Check]:
    """Model against measurement on this host, with the bandwidths, latency and overheads measured in the same run."""
    machine, setting, checks = host_machine(host), Setting("check", blocks=1), []
    for layout, events in host.events.items():
        shard = host.elements / (2 if layout == "sharded" else 1)
        fixed = host.overhead[layout]
        candidate = 0.0
        if layout == "sharded":
            candidate = event_seconds(machine, host.elements, 8, 0.0)
            candidate += collective_seconds(machine, Collective("all_gather", 4 * host.elements), 2)
        store = event_seconds(machine, shard, setting.store_bytes, fixed.store)
        event = event_seconds(machine, shard, setting.acceleration_bytes, fixed.acceleration) + candidate
        judgment = event_seconds(machine, shard, setting.judgment_bytes, fixed.judgment)
        checks += [
            Check(f"store event, {layout}", events.store, store),
            Check(f"acceleration event, {layout}", events.acceleration, event),
            Check(f"judgment, {layout}", events.judgment, judgment),
        ]
    gram = collective_seconds(machine, Collective("all_reduce", host.gram_bytes), 2)
    whole = collective_seconds(machine, Collective("all_gather", 4 * host.elements), 2)
    return [
        *checks,
        Check(f"all-reduce of {host.gram_bytes} bytes of inner products", host.gram_all_reduce, gram),
        Check("all-gather of the candidate", host.gather, whole),
    ]
