"""One accelerated optimizer step, timed and weighed: cases, counts of bytes, and measurements of benchmarks.step."""

from __future__ import annotations

import gc
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import aadl
from aadl import kernels
from aadl.settings import StateCoupling
from benchmarks import machine
from benchmarks.shapes import resnet50_units

RESNET50 = 25_557_032
TENSORS = 20
"""Of all problems but ResNet50's."""
WEIGHED = 1_000_000
"""Parameters from which work areas are small against the rows, so that memory can be held against its count."""
FRESH = 5_000_000
"""Parameters from which a case gets a process of its own, in which resident memory is rows and nothing else."""
EVENTS_PER_ROUND = 15
"""Accelerations before the quadratic starts again: it must not converge to rounding errors."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COUNTED = ("macro_steps", "attempts", "accepted", "reverted")


@dataclass(frozen=True)
class Case:
    """One setting of the accelerator on one problem; `coupling` "full" comes with momentum 0.9, "params" without."""

    parameters: int
    depth: int
    history: str = "float32"
    frequency: int = 2
    store_every: int = 1
    average: bool = False
    coupling: StateCoupling = "params"
    safeguard: bool = True
    fused: bool = False

    @property
    def element(self) -> int:
        """Bytes of an element of the history."""
        return DTYPES[self.history].itemsize

    @property
    def states(self) -> int:
        """Vectors per parameter that are accelerated."""
        return 2 if self.coupling == "full" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes. `held`: tensors of the accelerator; `resident`, `peak`: growth of the process, at rest and at most.

    `temporary`: the largest growth within one event. None where it was not measured.
    """

    held: int
    resident: int | None = None
    peak: int | None = None
    temporary: int | None = None


@dataclass(frozen=True)
class Result:
    """Seconds of whole steps by kind (see `kind_of`; "plain" is the optimizer without acceleration)."""

    case: Case
    steps: dict[str, list[float]]
    memory: Memory
    host_waits: dict[str, int]


@dataclass(frozen=True)
class Textbook:
    """Seconds of plain steps and of those that store and accelerate; peak growth of the process in bytes."""

    parameters: int
    depth: int
    plain: list[float]
    both: list[float]
    peak: int | None


# ---- counts --------------------------------------------------------------------------------------------------------


def moved_bytes(case: Case) -> dict[str, int]:
    """Bytes per parameter that an event cannot avoid to move, h bytes per element of the history, depth m.

    store: 20 + 2h. Read p, x, f; write Df, Dg, f, g, x being the last g. After an accepted candidate x is a vector of
        its own: 28 + 2h to read it and to keep the last g beside it. Where every other step accelerates, or every one,
        all stores that do nothing else are such.
    acceleration: 2mh + 12. Read DF, DG and p; write p and x.
    """
    after_plain, after_candidate = (case.states * (each + 2 * case.element) for each in (20, 28))
    store = after_candidate if case.frequency <= 2 * case.store_every else after_plain
    stores_too = after_candidate if case.frequency == case.store_every else after_plain
    acceleration = case.states * (2 * case.depth * case.element + 12)
    return {"store": store, "acceleration": acceleration, "both": stores_too + acceleration}


def held_bytes(case: Case) -> int:
    """Bytes per parameter that the history takes: 2m rows and three vectors, the same again for momentum."""
    return case.states * (2 * case.depth * case.element + 12)


def memory_agrees(case: Case, memory: Memory, work_area: float = 1e6) -> bool:
    """Whether the accelerator holds what is counted, within a tenth and a work area of so many bytes.

    True for small cases: they hold mainly work areas.
    """
    counted = held_bytes(case) * case.parameters
    return case.parameters < WEIGHED or -0.02 * counted <= memory.held - counted <= 0.1 * counted + work_area


def shapes_of(parameters: int) -> list[tuple[int, ...]]:
    """ResNet50's shapes, or as many elements in 20 vectors."""
    if parameters == RESNET50:
        return [shape for unit in resnet50_units() for shape in unit]
    return [(parameters // TENSORS + (index < parameters % TENSORS),) for index in range(TENSORS)]


# ---- measurement ---------------------------------------------------------------------------------------------------


class Problem:
    """Sum of d (p - target)^2 / 2, d log-uniform in [1e-4, 1]: a noise-free map whose candidates are accepted."""

    def __init__(self, parameters: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shapes = shapes_of(parameters)
        self.device = device
        self.parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        self.targets = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        exponents = [torch.rand(shape, generator=generator, device=device) for shape in shapes]
        self.curvatures = [exponent.mul_(-4 * math.log(10)).exp_() for exponent in exponents]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def restart(self) -> None:
        """Parameters at zero."""
        for parameter in self.parameters:
            parameter.zero_()

    @torch.no_grad()
    def gradient(self) -> None:
        """Fill the gradients in place."""
        for parameter, target, curvature in zip(self.parameters, self.targets, self.curvatures, strict=True):
            assert parameter.grad is not None
            torch.sub(parameter, target, out=parameter.grad).mul_(curvature)

    def timed(self, step: Callable[[], object]) -> float:
        """Seconds of one step, its gradient computed before."""
        self.gradient()
        return machine.time_call(step, self.device)

    def optimizer(self, coupling: StateCoupling = "params") -> torch.optim.SGD:
        """SGD on the problem, with momentum where that is coupled; rarely is a candidate refused at this rate."""
        return torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9 if coupling == "full" else 0.0)


def accelerate(optimizer: torch.optim.Optimizer, case: Case) -> None:
    """Accelerate as the case says."""
    aadl.accelerate(
        optimizer,
        history_depth=case.depth,
        store_each_nth=case.store_every,
        frequency=case.frequency,
        average="always" if case.average else False,
        safeguard=case.safeguard,
        state_coupling=case.coupling,
        history_dtype=DTYPES[case.history],
        fused=case.fused,
    )


def kind_of(before: dict[str, int], after: dict[str, int], last: str) -> str:
    """What a step did, by the change of the counters and the kind of the step before it.

    Returns:
        "both" (stored and accelerated), "store", "store after candidate", "open" (neither, but noted where a macro-step
        starts), "idle" (neither), or "refused" (a candidate was refused or taken back).
    """
    change = {name: after[name] - before[name] for name in COUNTED}
    if change["reverted"] or change["attempts"] != change["accepted"]:
        return "refused"
    if change["accepted"]:
        return "both"
    if change["macro_steps"]:
        return "store after candidate" if last == "both" else "store"
    return "idle" if last in ("idle", "open") else "open"


class Round:
    """A freshly accelerated optimizer on a problem that is at its start again; weighed where `weighs`."""

    def __init__(self, problem: Problem, case: Case, plain_steps: int, weighs: bool) -> None:
        self.problem, self.case = problem, case
        self.times: dict[str, list[float]] = defaultdict(list)
        self.temporaries: list[int] = []
        problem.restart()
        self.optimizer = problem.optimizer(case.coupling)
        self.plain(plain_steps)
        self.weighs_process = weighs and (case.parameters >= FRESH or problem.device.startswith("cuda"))
        if weighs:
            gc.collect()  # nothing of an earlier case may disappear in between
        self.tensors = self._tensor_bytes() if weighs else 0
        self.resident = self.peak = machine.resident_bytes(problem.device)
        accelerate(self.optimizer, case)
        self.last = "idle"

    @property
    def statistics(self) -> dict[str, Any]:
        """A copy of the accelerator's counters."""
        return dict(aadl.accelerator_of(self.optimizer).statistics)

    def plain(self, steps: int) -> None:
        """Steps without acceleration after one that does not count, because it may make the momentum."""
        self.times["plain"] += [self.problem.timed(self.optimizer.step) for _ in range(steps + 1)][1:]

    def step(self) -> None:
        """One step; its time counts once the history is full."""
        device, before = self.problem.device, self.statistics
        resident = machine.resident_bytes(device) if self.weighs_process else None
        weighs = self.weighs_process and machine.forget_peak(device)
        seconds = self.problem.timed(self.optimizer.step)
        peak = machine.peak_bytes(device) if weighs else None
        self.last = kind_of(before, self.statistics, self.last)
        if peak is not None and self.peak is not None:
            self.peak = max(self.peak, peak)
        if before["macro_steps"] - before["reverted"] > self.case.depth:
            self.times[self.last].append(seconds)
            if peak is not None and resident is not None:
                self.temporaries.append(peak - resident)

    def run(self, events: int) -> None:
        """Steps until `events` accelerations were timed, or too many were refused.

        Raises:
            RuntimeError: no candidate was accepted, or the history was lost, so that there is nothing to time.
        """
        case = self.case
        for _ in range((case.depth + 2) * case.store_every + (3 * events + 2) * case.frequency):
            self.step()
            if len(self.times["both"]) == events:
                break
        if not self.times["both"]:
            raise RuntimeError(f"{case}: no candidate was accepted with a full history: {self.statistics}")
        if self.statistics["moved"] or self.statistics["resets"]:
            raise RuntimeError(f"{case}: the history was disturbed: {self.statistics}")

    def host_waits(self) -> dict[str, int]:
        """By kind of step, over two periods; GPU only.

        The counters are not read in between, which would wait as well: kinds follow from the schedule.
        """
        first, case, waits = self.statistics["steps"] + 1, self.case, []
        for _ in range(2 * case.frequency):
            self.problem.gradient()
            waits.append(machine.host_waits(self.optimizer.step))
        most: dict[str, int] = {}
        for step, count in enumerate(waits, first):
            kind = "both" if step % case.frequency == 0 else "idle" if step % case.store_every else "store"
            most[kind] = max(count, most.get(kind, 0))
        return most

    def memory(self) -> Memory:
        """What acceleration added."""
        resident = machine.resident_bytes(self.problem.device) if self.weighs_process else None
        return Memory(
            held=self._tensor_bytes() - self.tensors,
            resident=_growth(self.resident, resident),
            peak=_growth(self.resident, self.peak if self.temporaries else None),
            temporary=max(self.temporaries, default=None),
        )

    def _tensor_bytes(self) -> int:
        return sum(machine.storages(self.problem.device).values())


def measure(case: Case, device: str, repeats: int) -> Result:
    """Time `repeats` accelerations and the steps between them, in rounds of which the first is weighed."""
    kernels.free_work_areas()  # those of earlier cases would be missed when they go
    problem = Problem(case.parameters, device)
    times: dict[str, list[float]] = defaultdict(list)
    memory: Memory | None = None
    waits: dict[str, int] = {}
    while len(times["both"]) < repeats:
        events = min(EVENTS_PER_ROUND, repeats - len(times["both"]))
        turn = Round(problem, case, events, weighs=memory is None)
        turn.run(events)
        if memory is None:
            memory = turn.memory()
            waits = turn.host_waits() if device.startswith("cuda") else {}
        aadl.remove_acceleration(turn.optimizer)
        turn.plain(events)
        for kind, seconds in turn.times.items():
            times[kind] += seconds
    assert memory is not None
    return Result(case, dict(times), memory, waits)


# ---- textbook ------------------------------------------------------------------------------------------------------


class TextbookAnderson:
    """Anderson acceleration as it is commonly written, around an optimizer without momentum."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], depth: int) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.iterates: deque[torch.Tensor] = deque(maxlen=depth + 1)
        self.residuals: deque[torch.Tensor] = deque(maxlen=depth + 1)

    @torch.no_grad()
    def step(self, mix: bool = True) -> None:
        """A step of the optimizer, stored, and the extrapolation of what is stored."""
        start = parameters_to_vector(self.parameters)
        self.optimizer.step()
        mapped = parameters_to_vector(self.parameters)
        self.iterates.append(start)
        self.residuals.append(mapped - start)
        if not mix or len(self.residuals) < 2:
            return
        differences = torch.stack([new - old for old, new in pairwise(self.residuals)], dim=1)
        moves = torch.stack([new - old for old, new in pairwise(self.iterates)], dim=1)
        driver = "gels" if differences.is_cuda else None  # the only one there
        gamma = torch.linalg.lstsq(differences, self.residuals[-1].unsqueeze(1), driver=driver).solution
        vector_to_parameters(mapped - ((moves + differences) @ gamma).squeeze(1), self.parameters)


def textbook_bytes(parameters: int, depth: int) -> int:
    """About what the textbook needs at its peak: lists, stacks, copies of the solver."""
    return 4 * parameters * (8 * depth + 12)


def measure_textbook(parameters: int, depth: int, device: str, repeats: int) -> Textbook:
    """Time steps with a full history."""
    problem = Problem(parameters, device)
    optimizer = problem.optimizer()
    plain = [problem.timed(optimizer.step) for _ in range(repeats + 1)][1:]
    before = machine.resident_bytes(device)
    weighs = parameters >= FRESH and machine.forget_peak(device)
    textbook = TextbookAnderson(optimizer, problem.parameters, depth)
    for _ in range(depth):
        problem.timed(lambda: textbook.step(mix=False))
    both = [problem.timed(textbook.step) for _ in range(repeats)]
    return Textbook(parameters, depth, plain, both, _growth(before, machine.peak_bytes(device) if weighs else None))


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before
