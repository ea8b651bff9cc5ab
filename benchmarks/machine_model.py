"""Seconds and bytes of a training step with Anderson acceleration (AA) on machines described by a few figures.

A model. `python -m benchmarks.scaling` feeds it counted collectives and writes docs/reports/scaling.md.
Symbols: N parameters, P ranks (one per device), m = history_depth, h = bytes of a stored history element. Units are
bytes, seconds, bytes per second and flop per second throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.shapes import Shape, count_elements, decoder_units, resnet50_units

LAYOUTS = ("replicated", "sharded", "fsdp2")
"""Data parallelism with whole histories, with `shard_history=True`, and FSDP2 over all ranks."""
MEMORY_EFFICIENCY = 1 / 1.3
"""Share of the nominal memory bandwidth that AA gets for the floor of its bytes: the project's own goal for kernels
and passes that are not ideal. The check rows of docs/reports/scaling.md show how far this host is from it."""
NETWORK_EFFICIENCY = 0.85
"""Share of the nominal link bandwidth that a long collective gets. Assumed."""
OVERLAP = 0.5
"""Share of the collectives of the plain step that hides behind computation. 0.5 gives ResNet50 on 6,144 V100 about the
scaling efficiency measured on Summit (87 %, Yin et al., DLS 2019; the model says 84 %)."""
LONG_PAYLOAD = 65_536
"""Bytes; accelerator collectives above this are proportional to N, those below (inner products) do not depend on it."""

NEVER = "no, nor without AA"
"""That a network does not fit into a device."""


@dataclass(frozen=True)
class Protocol:
    """Latency of a collective: `base` + steps over links in a node * `local` + steps between nodes * `network`."""

    base: float
    local: float
    network: float
    bandwidth_share: float = 1.0


# NCCL's own cost model for NVLink and a network, src/graph/tuning.cc of NVIDIA/nccl, recent versions (older ones have
# 9.6 us in place of 14): protocols LL and Simple.
NCCL_RINGS = (Protocol(6.6e-6, 0.6e-6, 2.7e-6, 1 / 4), Protocol(8.4e-6, 3.4e-6, 14e-6))
NCCL_TREES = (Protocol(6.8e-6, 0.6e-6, 5e-6, 0.9 / 3.8), Protocol(8.4e-6, 4e-6, 14e-6, 0.9))


@dataclass(frozen=True)
class Machine:
    """One kind of device, `devices_per_node` of them in a node."""

    name: str
    memory_bandwidth: float
    peak_flops: float
    """Dense half precision (float16 or bfloat16) with float32 accumulation."""
    utilization: float
    """Share of `peak_flops` that a large transformer gets (model flops utilization)."""
    images_per_second: float
    """ResNet50 training, mixed precision, one device among those of its node."""
    memory: float
    devices_per_node: int
    local_bandwidth: float
    """Of a ring within a node, per direction."""
    node_bandwidth: float
    """Injection into the network, per node and direction."""
    sources: tuple[str, ...] = ()
    rings: tuple[Protocol, ...] = NCCL_RINGS
    trees: tuple[Protocol, ...] = NCCL_TREES


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
    """A network, and what one device does with it in a plain step."""

    name: str
    units: tuple[tuple[Shape, ...], ...]
    state_bytes: int
    """Per parameter: float32 weight, gradient and optimizer state."""
    optimizer_bytes: int
    """Per parameter read and written by the plain optimizer step."""
    samples: int
    """Images or tokens per device and step."""
    is_convolutional: bool

    @property
    def elements(self) -> int:
        return count_elements([list(unit) for unit in self.units])

    def compute_seconds(self, machine: Machine) -> float:
        """Forward and backward: measured images per second, or 6 flop per parameter and token."""
        if self.is_convolutional:
            return self.samples / machine.images_per_second
        return 6 * self.elements * self.samples / (machine.peak_flops * machine.utilization)


WORKLOADS = {
    "ResNet50": Workload("ResNet50", tuple(map(tuple, resnet50_units())), 12, 20, 32, True),
    "7e9": Workload("7e9 transformer", tuple(map(tuple, decoder_units())), 16, 28, 4096, False),
}
"""SGD with momentum, 32 images a device (49,152 on 1,536 ranks); Adam, 4,096 tokens a device."""


@dataclass(frozen=True)
class Setting:
    """How AA is used."""

    name: str
    depth: int = 10
    element_bytes: int = 4
    blocks: int = 2
    """1: parameters only; 2: their momentum as well (state_coupling "full", the default)."""
    store_each_nth: int = 10
    frequency: int = 20

    @property
    def history_bytes(self) -> int:
        """Per parameter held: 2 m rings of h and three float32 vectors."""
        return self.blocks * (2 * self.depth * self.element_bytes + 12)

    @property
    def store_bytes(self) -> int:
        """Per parameter read and written by storing a pair, 20 + 2 h."""
        return self.blocks * (20 + 2 * self.element_bytes)

    @property
    def acceleration_bytes(self) -> int:
        """Per parameter read and written by an acceleration, 2 m h + 12."""
        return self.blocks * (2 * self.depth * self.element_bytes + 12)

    @property
    def judgment_bytes(self) -> int:
        """Per parameter read to judge an accepted candidate by the next residual."""
        return self.blocks * 8


@dataclass(frozen=True)
class Collective:
    """One collective: what it does, and the bytes of the whole tensor (reduced, gathered, or to be scattered)."""

    operation: str
    payload: int


@dataclass(frozen=True)
class Pattern:
    """Collectives of the accelerator in a step that stores, one that also accelerates, and the judging one after."""

    elements: int
    """Parameters of the network it was counted for."""
    blocks: int
    """Vectors per parameter that were accelerated, as in `Setting`."""
    store: tuple[Collective, ...]
    acceleration: tuple[Collective, ...]
    judgment: tuple[Collective, ...]


@dataclass(frozen=True)
class Overhead:
    """Seconds of an event that do not depend on N: Python, kernel launches, m x m algebra."""

    store: float
    acceleration: float
    judgment: float


@dataclass(frozen=True)
class Acceleration:
    """AA in one layout: how it is used, what it communicates, what it costs beside memory and network."""

    setting: Setting
    pattern: Pattern
    overhead: Overhead


@dataclass(frozen=True)
class Prediction:
    """One machine, layout, workload and number of ranks; seconds per step, bytes per device."""

    plain: float
    acceleration: float
    plain_bytes: float
    history_bytes: float
    memory: float

    @property
    def share(self) -> float:
        """Of AA in a step."""
        return self.acceleration / (self.plain + self.acceleration)

    @property
    def fits(self) -> str:
        """Weights, gradients, optimizer state and history; activations are not counted."""
        if self.plain_bytes > self.memory:
            return NEVER
        return "yes" if self.plain_bytes + self.history_bytes <= self.memory else "no"


def nodes_of(machine: Machine, ranks: int) -> int:
    return math.ceil(ranks / machine.devices_per_node)


def collective_seconds(machine: Machine, collective: Collective, ranks: int) -> float:
    """Fastest protocol; all-reduce as ring or tree, the others as ring (a broadcast as half a tree)."""
    if ranks == 1:
        return 0.0
    nodes, payload = nodes_of(machine, ranks), collective.payload
    bandwidth = machine.local_bandwidth if nodes == 1 else min(machine.local_bandwidth, machine.node_bandwidth)
    second_per_byte = 1 / (bandwidth * NETWORK_EFFICIENCY)
    passes = 2 if collective.operation == "all_reduce" else 1
    ring = [
        p.base
        + passes * ((ranks - nodes) * p.local + (nodes - 1) * p.network)
        + passes * (ranks - 1) / ranks * payload * second_per_byte / p.bandwidth_share
        for p in machine.rings
    ]
    depth_local, depth_network = math.ceil(ranks / nodes) - 1, math.ceil(math.log2(nodes))
    tree = [
        p.base
        + passes * (depth_local * p.local + depth_network * p.network + payload * second_per_byte / p.bandwidth_share)
        for p in machine.trees
    ]
    return min(ring + tree if collective.operation in ("all_reduce", "broadcast") else ring)


def local_elements(units: Iterable[Iterable[Shape]], layout: str, ranks: int) -> int:
    """Elements per history row on the fullest rank. FSDP2 cuts the first dimension d: rank 0 has ceil(d / P) rows."""
    shapes = [shape for unit in units for shape in unit]
    if layout == "fsdp2":
        return sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in shapes)
    total = sum(math.prod(shape) for shape in shapes)
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


def plain_seconds(machine: Machine, workload: Workload, layout: str, ranks: int) -> float:
    """Computation, the collectives that do not hide behind it, and the optimizer (contained in images per second)."""
    compute = workload.compute_seconds(machine)
    collectives = training_collectives(workload, layout, ranks)
    network = sum(collective_seconds(machine, collective, ranks) for collective in collectives)
    exposed = max((1 - OVERLAP) * network, network - compute)
    held = local_elements(workload.units, "fsdp2" if layout == "fsdp2" else "replicated", ranks)
    optimizer = 0.0 if workload.is_convolutional else workload.optimizer_bytes * held / machine.memory_bandwidth
    return compute + exposed + optimizer


def event_seconds(machine: Machine, elements: float, bytes_each: float, overhead: float) -> float:
    """Of one pass over `elements` history elements of `bytes_each`."""
    return overhead + elements * bytes_each / (machine.memory_bandwidth * MEMORY_EFFICIENCY)


def acceleration_seconds(
    machine: Machine, workload: Workload, acceleration: Acceleration, layout: str, ranks: int
) -> float:
    """Of AA per step: stores, one acceleration and one judgment, amortized over `frequency` steps."""
    setting, pattern, overhead = acceleration.setting, acceleration.pattern, acceleration.overhead
    held = local_elements(workload.units, layout, ranks)
    growth = workload.elements / pattern.elements * setting.blocks / pattern.blocks

    def network(collectives: Iterable[Collective]) -> float:
        return sum(collective_seconds(machine, resized(c, growth), ranks) for c in collectives)

    store = event_seconds(machine, held, setting.store_bytes, overhead.store) + network(pattern.store)
    event = event_seconds(machine, held, setting.acceleration_bytes, overhead.acceleration)
    event += network(pattern.acceleration)
    if layout == "sharded":  # the gathered candidate is read and written into whole parameters
        event += event_seconds(machine, workload.elements, 8 * setting.blocks, 0.0)
    judgment = event_seconds(machine, held, setting.judgment_bytes, overhead.judgment) + network(pattern.judgment)
    return store / setting.store_each_nth + (event + judgment) / setting.frequency


def resized(collective: Collective, growth: float) -> Collective:
    """The same collective for `growth` times the elements."""
    if collective.payload <= LONG_PAYLOAD:
        return collective
    return Collective(collective.operation, round(collective.payload * growth))


def predict(machine: Machine, workload: Workload, acceleration: Acceleration, layout: str, ranks: int) -> Prediction:
    """Everything of one case."""
    held = local_elements(workload.units, layout, ranks)
    parameters = held if layout == "fsdp2" else workload.elements
    return Prediction(
        plain=plain_seconds(machine, workload, layout, ranks),
        acceleration=acceleration_seconds(machine, workload, acceleration, layout, ranks),
        plain_bytes=workload.state_bytes * parameters,
        history_bytes=acceleration.setting.history_bytes * held,
        memory=machine.memory,
    )
