"""One real rank of thousands, run through torch's fake process group: collectives are recorded and move nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import aadl
from benchmarks.machine import in_fresh_process, storages
from benchmarks.machine_model import Collective, Events, Workload
from benchmarks.shapes import Shape

OPERATIONS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}
"""torch's operators, in the namespaces c10d and _c10d_functional."""
WHOLE_LIMIT = 100_000_000
"""Parameters up to which a network is counted in the layouts where a rank holds all of them (46 history rows)."""


@dataclass(frozen=True)
class Case:
    """One rank to count: rank 0 of `ranks`."""

    workload: Workload
    layout: str
    ranks: int
    depth: int = 10

    def __str__(self) -> str:
        return f"{self.workload.name}, {self.layout}, {self.ranks:,} ranks, history_depth {self.depth}"


@dataclass(frozen=True)
class Count:
    """What was counted on that rank.

    Attributes:
        local_elements: in the parameters the rank holds itself.
        history_bytes: of all tensors the accelerator made, work areas included.
        training: of forward and backward: what FSDP2 does by itself; not run in the other layouts.
        events: collectives of the accelerator in a step that stores, one that also accelerates, and the judging one.
    """

    case: Case
    local_elements: int
    history_bytes: int
    training: tuple[Collective, ...]
    events: Events


class Recorder(TorchDispatchMode):
    """Records collectives while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name != "wait_tensor":
                self.collectives.append(Collective(OPERATIONS.get(name, name), payload_of([*args, result])))
        return result

    def take(self) -> tuple[Collective, ...]:
        """What was recorded since the last call."""
        taken, self.collectives = tuple(self.collectives), []
        return taken


def payload_of(arguments: Iterable[Any]) -> int:
    """Bytes of the largest argument of a collective, lists of tensors added up."""

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.nbytes
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    return max((size(argument) for argument in arguments), default=0)


class Unit(torch.nn.Module):
    """Parameters that are gathered together. The forward is a sum: collectives depend on shapes only."""

    def __init__(self, shapes: Iterable[Shape]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes)

    def forward(self, value: Tensor) -> Tensor:
        for weight in self.weights:
            value = value + weight.sum()
        return value


def build(case: Case) -> torch.nn.Module:
    """The network in this process: made on the meta device, sharded (FSDP2), then given memory and values."""
    model = torch.nn.Sequential(*(Unit(shapes) for shapes in case.workload.units))
    if case.layout == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (case.ranks,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in [*model, model]:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        local(parameter).normal_()
    return model


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor this rank holds, sharing memory."""
    tensor = tensor.detach()
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class Descent:
    """A fixed quadratic in place of a loss: gradient = curvature * parameter, elementwise, no communication."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.curvatures = [torch.rand_like(local(p)).mul_(0.9).add_(0.1) for p in self.parameters]
        for p in self.parameters:
            p.grad = torch.empty_like(p)

    def set_gradients(self) -> None:
        for p, curvature in zip(self.parameters, self.curvatures, strict=True):
            assert p.grad is not None
            torch.mul(local(p), curvature, out=local(p.grad))


def join_fake_group(ranks: int) -> None:
    """Make this process rank 0 of so many that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamed functions of torch.distributed
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


def count_case(case: Case) -> Count:
    """Runs one rank in this process, which must not have a process group yet.

    Raises:
        RuntimeError: the plain optimizer communicates, or no candidate was taken: the counts would not be those of AA.
    """
    join_fake_group(case.ranks)
    recorder = Recorder()
    model = build(case)
    with recorder:
        if case.layout == "fsdp2":
            model(torch.zeros(1, requires_grad=True)).sum().backward()
    training = recorder.take()
    descent = Descent(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    if any(recorded_step(descent, optimizer, recorder) for _ in range(2)):
        raise RuntimeError("the plain optimizer communicates: nobody can tell its collectives from AA's")
    before = storages()
    # Kernels are not compiled: torch.compile declines under a dispatch mode, and the collectives are the same.
    sharded = {"shard_history": True} if case.layout == "sharded" else {}
    accelerate(optimizer, history_depth=case.depth, frequency=case.depth + 2, fused=False, **sharded)
    steps = [recorded_step(descent, optimizer, recorder) for _ in range(case.depth + 3)]
    statistics = aadl.accelerator_of(optimizer).statistics
    if statistics["attempts"] != 1 or statistics["accepted"] != 1:
        raise RuntimeError(f"{case}: expected one accepted candidate, got {statistics}")
    gc.collect()
    history = sum(size for address, size in storages().items() if address not in before)
    dist.destroy_process_group()
    return Count(case, sum(local(p).numel() for p in model.parameters()), history, training, Events(*steps[-3:]))


def accelerate(optimizer: torch.optim.Optimizer, **settings: Any) -> None:
    """`aadl.accelerate` with one optimizer step per macro-step."""
    aadl.accelerate(optimizer, store_each_nth=1, average=False, wait_iterations=0, **settings)


def recorded_step(descent: Descent, optimizer: torch.optim.Optimizer, recorder: Recorder) -> tuple[Collective, ...]:
    """Collectives from the beginning of the optimizer step to its end."""
    descent.set_gradients()
    with recorder:
        optimizer.step()
    return recorder.take()


def cases_of(layouts: Sequence[str], world_sizes: Sequence[int], workloads: Sequence[Workload]) -> list[Case]:
    """Cases that fit into the memory of a workstation: whole 7e9 parameters do not, their FSDP2 shards do."""
    cases = []
    for workload in workloads:
        small = workload.elements <= WHOLE_LIMIT
        cases += [Case(workload, name, ranks) for name in layouts if small or name == "fsdp2" for ranks in world_sizes]
        if small:
            cases.append(Case(workload, "replicated", world_sizes[0], depth=5))
    return cases


def count_all(cases: Iterable[Case]) -> list[Count]:
    """One process after the other, since a process has one default group."""
    counts = []
    for case in cases:
        try:
            counts.append(in_fresh_process(count_case, case))
        except Exception as error:
            raise RuntimeError(f"layout {case.layout!r} cannot be counted ({case}): {error}") from error
        print(f"counted {case}", flush=True)
    return counts
