"""Seconds of a training step with Anderson acceleration (AA) on machines described by a few figures.

A model. `python -m benchmarks.scaling` feeds it counted collectives and writes docs/reports/scaling.md. AA is used with
its defaults. Symbols: N parameters, P ranks (one per device), m = history_depth, h = 4 bytes of a stored history
element. Units are bytes, seconds, bytes per second and flop per second throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.shapes import Shape, count_elements, decoder_units, resnet50_units

LAYOUTS = ("replicated", "sharded", "fsdp2")
"""Data parallelism with whole histories, with `shard_history=True`, and FSDP2 over all ranks."""
MEMORY_EFFICIENCY = 1 / 1.3
"""Share of the nominal memory bandwidth that AA gets for the floor of its bytes: the project's own goal for kernels
and passes that are not ideal."""
NETWORK_EFFICIENCY = 0.85
"""Share of the nominal link bandwidth that a long collective gets. Assumed."""
OVERLAP = 0.5
"""Share of the collectives of the plain step that hides behind computation. 0.5 gives ResNet50 on 6,144 V100 about the
scaling efficiency measured on Summit (87 %, Yin et al., DLS 2019; the model says 84 %)."""
STORE_EACH, ACCELERATE_EACH = 10, 20
"""Optimizer steps between two stores and between two accelerations, at the defaults."""


class Protocol(NamedTuple):
    """Latency of a collective: `base` + steps over links in a node * `local` + steps between nodes * `network`."""

    base: float
    local: float
    network: float
    bandwidth_share: float = 1.0


# NCCL's own cost model for NVLink and a network, src/graph/tuning.cc of NVIDIA/nccl, recent versions (older ones have
# 9.6 us in place of 14): protocols LL and Simple.
RINGS = (Protocol(6.6e-6, 0.6e-6, 2.7e-6, 1 / 4), Protocol(8.4e-6, 3.4e-6, 14e-6))
TREES = (Protocol(6.8e-6, 0.6e-6, 5e-6, 0.9 / 3.8), Protocol(8.4e-6, 4e-6, 14e-6, 0.9))


@dataclass(frozen=True)
class Machine:
    """One kind of device, `devices_per_node` of them in a node.

    Attributes:
        peak_flops: dense half precision (float16 or bfloat16) with float32 accumulation.
        utilization: share of `peak_flops` that a large transformer gets (model flops utilization).
        images_per_second: ResNet50 training, mixed precision, one device among those of its node.
        local_bandwidth: of a ring within a node, per direction.
        node_bandwidth: injection into the network, per node and direction.
        sources: of the figures.
    """

    name: str
    memory_bandwidth: float
    peak_flops: float
    utilization: float
    images_per_second: float
    memory: float
    devices_per_node: int
    local_bandwidth: float
    node_bandwidth: float
    sources: tuple[str, ...]


MACHINES = (
    Machine(
        "V100, Summit", 900e9, 125e12, 0.30, 1040, 16e9, 6, 50e9, 23e9,
        (
            "OLCF Summit user guide: 6 V100 (16 GB HBM2, 900 GB/s) a node, 2 NVLink bricks = 50 GB/s between GPUs",
            "dual-rail EDR InfiniBand: nominally 25 GB/s, about 23 GB/s injection a node",
            "1,040 images/s: NVIDIA DeepLearningExamples, NGC 21.03, AMP, 8,322 on 8 V100",
            "utilization 0.30: assumed",
        ),
    ),
    Machine(
        "MI250X die, Frontier", 1.6e12, 191.5e12, 0.36, 800, 64e9, 8, 50e9, 100e9,
        (
            "OLCF Frontier user guide: 8 dies (GCDs) of 64 GB a node, 50-200 GB/s Infinity Fabric between dies",
            "AMD MI250X data sheet: 3.2 TB/s and 383 Tflop/s per module of two dies; 4 Slingshot ports of 25 GB/s",
            "utilization 0.36: 175e9 parameters on Frontier, arXiv 2312.12705",
            "800 images/s: ASSUMED, about 10 % of peak; no published measurement was found",
            "latencies: NCCL's figures taken for RCCL",
        ),
    ),
    Machine(
        "A100-40GB, Perlmutter", 1.555e12, 312e12, 0.45, 2078, 40e9, 4, 235e9, 100e9,
        (
            "NERSC Perlmutter architecture page: 4 A100 and 4 Slingshot-11 ports of 25 GB/s a node",
            "NVIDIA A100-40GB data sheet: 1,555 GB/s, 312 Tflop/s; NCCL caps its ring within a node at 235 GB/s",
            "2,078 images/s: NVIDIA DeepLearningExamples, NGC 21.03, AMP, 16,621 on 8 A100",
            "utilization 0.45: assumed between 0.5 (7e9 parameters, FSDP2, 32 A800) and published larger runs",
        ),
    ),
    Machine(
        "H100 SXM", 3.35e12, 989e12, 0.40, 6940, 80e9, 8, 360e9, 400e9,
        (
            "NVIDIA H100 SXM data sheet: 3.35 TB/s, 80 GB, 989 Tflop/s; 8 ports NDR400 of 50 GB/s a node",
            "360 GB/s in a node: NCCL's figure for Hopper (NVLink 4, nominally 450 GB/s)",
            "6,940 images/s: implied by MLPerf Training 3.0, 8 H100, 13.466 min, about 35 epochs and their evaluations",
            "utilization 0.40: assumed",
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A network, and what one device does with it in a plain step.

    Attributes:
        units: shapes of the parameters that FSDP2 gathers together.
        state_bytes: per parameter: float32 weight, gradient and optimizer state.
        optimizer_bytes: per parameter read and written by the plain optimizer step; 0 where `images_per_second` of the
            machine contain it.
        samples: images or tokens per device and step.
    """

    name: str
    units: tuple[tuple[Shape, ...], ...]
    state_bytes: int
    optimizer_bytes: int
    samples: int
    is_convolutional: bool

    @property
    def elements(self) -> int:
        return count_elements(self.units)

    def compute_seconds(self, machine: Machine) -> float:
        """Forward and backward: measured images per second, or 6 flop per parameter and token."""
        if self.is_convolutional:
            return self.samples / machine.images_per_second
        return 6 * self.elements * self.samples / (machine.peak_flops * machine.utilization)


WORKLOADS = (
    Workload("ResNet50", tuple(map(tuple, resnet50_units())), 12, 0, 32, True),
    Workload("7e9 transformer", tuple(map(tuple, decoder_units())), 16, 28, 4096, False),
)
"""SGD with momentum, 32 images a device (49,152 on 1,536 ranks); Adam, 4,096 tokens a device."""


class Collective(NamedTuple):
    """One collective: what it does, and the bytes of the whole tensor (reduced, gathered, or to be scattered)."""

    operation: str
    payload: int


class Events(NamedTuple):
    """Something of a step that stores, of what an acceleration adds to one, and of the step that judges it."""

    store: Any
    acceleration: Any
    judgment: Any


def history_bytes(depth: int) -> int:
    """Per parameter held, momentum included: 2 m rows and three float32 vectors, twice."""
    return 2 * (2 * depth * 4 + 12)


MOVED = Events(2 * (20 + 2 * 4), history_bytes(10), 2 * 8)
"""Bytes per parameter read and written, momentum included: 20 + 2 h, 2 m h + 12 with m = 10, and 8, twice."""


def collective_seconds(machine: Machine, collective: Collective, ranks: int) -> float:
    """Fastest protocol; all-reduce as ring or tree, the others as ring (a broadcast as half a tree)."""
    if ranks == 1:
        return 0.0
    nodes, payload = math.ceil(ranks / machine.devices_per_node), collective.payload
    bandwidth = machine.local_bandwidth if nodes == 1 else min(machine.local_bandwidth, machine.node_bandwidth)
    second_per_byte = 1 / (bandwidth * NETWORK_EFFICIENCY)
    passes = 2 if collective.operation == "all_reduce" else 1
    ring = [
        p.base
        + passes * ((ranks - nodes) * p.local + (nodes - 1) * p.network)
        + passes * (ranks - 1) / ranks * payload * second_per_byte / p.bandwidth_share
        for p in RINGS
    ]
    depth_local, depth_network = math.ceil(ranks / nodes) - 1, math.ceil(math.log2(nodes))
    tree = [
        p.base
        + passes * (depth_local * p.local + depth_network * p.network + payload * second_per_byte / p.bandwidth_share)
        for p in TREES
    ]
    return min(ring + tree if collective.operation in ("all_reduce", "broadcast") else ring)


def local_elements(units: Iterable[Iterable[Shape]], layout: str, ranks: int) -> int:
    """Elements per history row on the fullest rank. FSDP2 cuts the first dimension d: rank 0 has ceil(d / P) rows."""
    if layout == "fsdp2":
        return sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for unit in units for shape in unit)
    total = count_elements(units)
    return math.ceil(total / ranks) if layout == "sharded" else total


def training_collectives(workload: Workload, layout: str, ranks: int) -> list[Collective]:
    """Of a plain step. FSDP2 with bfloat16 parameters pads every tensor to P equal parts (two all-gathers and one
    float32 reduce-scatter per unit); the other layouts all-reduce float32 gradients. Not in the order they happen."""
    if layout != "fsdp2":
        return [Collective("all_reduce", 4 * workload.elements)]
    collectives = []
    for unit in workload.units:
        padded = ranks * local_elements([unit], "fsdp2", ranks)
        collectives += [Collective("all_gather", 2 * padded)] * 2 + [Collective("reduce_scatter", 4 * padded)]
    return collectives


def held_by_plain(workload: Workload, layout: str, ranks: int) -> int:
    """Parameters on the fullest rank."""
    return local_elements(workload.units, "fsdp2" if layout == "fsdp2" else "replicated", ranks)


def plain_seconds(machine: Machine, workload: Workload, layout: str, ranks: int) -> float:
    """Computation, the collectives that do not hide behind it, and the optimizer."""
    compute = workload.compute_seconds(machine)
    collectives = training_collectives(workload, layout, ranks)
    network = sum(collective_seconds(machine, collective, ranks) for collective in collectives)
    exposed = max((1 - OVERLAP) * network, network - compute)
    held = held_by_plain(workload, layout, ranks)
    return compute + exposed + workload.optimizer_bytes * held / machine.memory_bandwidth


def acceleration_seconds(
    machine: Machine, workload: Workload, layout: str, ranks: int, collectives: Events, overhead: Events
) -> float:
    """Of AA per step: stores, one acceleration and one judgment, amortized over the steps between two of them.

    Args:
        machine, workload, layout, ranks: where.
        collectives: of each event, as counted.
        overhead: seconds of each event that do not depend on N: Python, kernel launches, m x m algebra.
    """
    speed = machine.memory_bandwidth * MEMORY_EFFICIENCY
    held = local_elements(workload.units, layout, ranks)

    def seconds(fixed: float, moved: int, communicated: Sequence[Collective]) -> float:
        return fixed + held * moved / speed + sum(collective_seconds(machine, each, ranks) for each in communicated)

    store, event, judgment = (seconds(*parts) for parts in zip(overhead, MOVED, collectives, strict=True))
    if layout == "sharded":  # the gathered candidate is read and written into whole parameters
        event += workload.elements * 2 * 8 / speed
    return store / STORE_EACH + (event + judgment) / ACCELERATE_EACH
