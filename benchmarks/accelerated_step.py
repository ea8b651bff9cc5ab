"""One accelerated optimizer step, timed and weighed: cases, counts of bytes, and measurements of benchmarks.step."""

from __future__ import annotations

import gc
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import aadl
from aadl import kernels
from aadl.settings import StateCoupling
from benchmarks import machine
from benchmarks.machine import Spread, spread, time_call
from benchmarks.shapes import resnet50_shapes

T = TypeVar("T")
RESNET50 = 25_557_032
TENSORS = 20
"""Of all problems but ResNet50's."""
WEIGHED = 1_000_000
"""Parameters from which work areas are small against the rows, so that memory can be held against its count."""
FRESH = 5_000_000
"""Parameters from which a case gets a process of its own, in which resident memory is rows and nothing else."""
EVENTS_PER_ROUND = 15
"""Accelerations before the quadratic starts anew: it must not converge to rounding errors."""
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


@dataclass(frozen=True)
class Memory:
    """Bytes. `held`: tensors of the accelerator; `resident`, `peak`: growth of the process, at rest and at most.

    `temporary`: the largest growth within one event. None where it was not measured.
    """

    held: int
    resident: int | None
    peak: int | None
    temporary: int | None


@dataclass(frozen=True)
class Result:
    """Seconds of whole steps by kind (see `kind_of`; "plain" is the optimizer without acceleration)."""

    case: Case
    steps: dict[str, Spread]
    memory: Memory
    host_waits: dict[str, int]
    statistics: dict[str, int]


@dataclass(frozen=True)
class Textbook:
    """Seconds of a plain step and of one that stores and accelerates; peak growth of the process in bytes."""

    parameters: int
    depth: int
    plain: Spread
    both: Spread
    peak: int | None


# ---- counts --------------------------------------------------------------------------------------------------------


def moved_bytes(case: Case, relaxation: float = 1.0) -> dict[str, int]:
    """Bytes per parameter that an event cannot avoid to move, h bytes per element of the history, depth m.

    store: 20 + 2h. Read p, x, f; write Df, Dg, f, g, x being the last g. After an accepted candidate x is a vector of
        its own: 28 + 2h to read it and to keep the last g beside it. Where every other step accelerates, or every one,
        all stores that do nothing else are such.
    acceleration: 2mh + 12. Read DF, DG and p; write p and x. Relaxation reads DF once more.
    """
    element, states = _element(case), _states(case)
    after_plain, after_candidate = states * (20 + 2 * element), states * (28 + 2 * element)
    store = after_candidate if case.frequency <= 2 * case.store_every else after_plain
    stores_too = after_candidate if case.frequency == case.store_every else after_plain
    acceleration = states * (2 * case.depth * element + 12) + (relaxation != 1) * case.depth * element
    return {"store": store, "acceleration": acceleration, "both": stores_too + acceleration}


def held_bytes(case: Case) -> int:
    """Bytes per parameter that the history takes: 2m rows and three vectors, the same again for momentum."""
    return _states(case) * (2 * case.depth * _element(case) + 12)


def memory_agrees(case: Case, memory: Memory, work_area: float = 1e6) -> bool:
    """Whether the accelerator holds what is counted, within a tenth and a work area of so many bytes.

    True for small cases: they hold mainly work areas.
    """
    counted = held_bytes(case) * case.parameters
    return case.parameters < WEIGHED or -0.02 * counted <= memory.held - counted <= 0.1 * counted + work_area


def shapes_of(parameters: int) -> list[tuple[int, ...]]:
    """ResNet50's shapes, or as many elements in 20 vectors."""
    if parameters == RESNET50:
        return resnet50_shapes()
    return [(parameters // TENSORS + (index < parameters % TENSORS),) for index in range(TENSORS)]


def _element(case: Case) -> int:
    return DTYPES[case.history].itemsize


def _states(case: Case) -> int:
    return 2 if case.coupling == "full" else 1


# ---- measurement ---------------------------------------------------------------------------------------------------


class Problem:
    """Sum of d (p - target)^2 / 2, d log-uniform in [1e-4, 1]: a noise-free map whose candidates are accepted."""

    def __init__(self, parameters: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shapes = shapes_of(parameters)
        self.device = device
        self.parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        self.targets = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        self.curvatures = [torch.rand(s, generator=generator, device=device).mul_(-4 * math.log(10)) for s in shapes]
        self.gradients = [torch.zeros(shape, device=device) for shape in shapes]
        for parameter, gradient, curvature in zip(self.parameters, self.gradients, self.curvatures, strict=True):
            parameter.grad = gradient
            curvature.exp_()

    @torch.no_grad()
    def restart(self) -> None:
        """Parameters at zero."""
        for parameter in self.parameters:
            parameter.zero_()

    @torch.no_grad()
    def gradient(self) -> None:
        """Fill the gradients in place."""
        vectors = zip(self.parameters, self.targets, self.curvatures, self.gradients, strict=True)
        for parameter, target, curvature, gradient in vectors:
            torch.sub(parameter, target, out=gradient).mul_(curvature)

    def timed(self, step: Callable[[], object]) -> float:
        """Seconds of one step, its gradient computed before."""
        self.gradient()
        return time_call(step, self.device)

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
    """A freshly accelerated optimizer on a problem that starts anew."""

    def __init__(self, problem: Problem, case: Case, repeats: int, weigh: bool) -> None:
        self.problem, self.case = problem, case
        self.times: dict[str, list[float]] = {}
        self.temporaries: list[int] = []
        self.waits: dict[str, int] = {}
        problem.restart()
        self.optimizer = problem.optimizer(case.coupling)
        self.plain(repeats)
        self.weighed = weigh and (case.parameters >= FRESH or problem.device.startswith("cuda"))
        if weigh:
            gc.collect()  # nothing of an earlier case may disappear in between
        self.tensors = machine.tensor_bytes(problem.device) if weigh else 0
        self.resident = machine.resident_bytes(problem.device)
        self.peak = self.resident
        accelerate(self.optimizer, case)
        self.last = "idle"

    @property
    def statistics(self) -> dict[str, Any]:
        """The accelerator's counters, read afresh."""
        return dict(aadl.accelerator_of(self.optimizer).statistics)

    def plain(self, repeats: int) -> None:
        """Steps without acceleration; the first one makes the momentum."""
        times = [self.problem.timed(self.optimizer.step) for _ in range(repeats + 1)]
        self.times.setdefault("plain", []).extend(times[1:])

    def step(self) -> None:
        """One step; its time counts once the history is full."""
        device, before = self.problem.device, {name: self.statistics[name] for name in COUNTED}
        resident = machine.resident_bytes(device) if self.weighed else None
        can_weigh = self.weighed and machine.forget_peak(device)
        seconds = self.problem.timed(self.optimizer.step)
        peak = machine.peak_bytes(device) if can_weigh else None
        self.last = kind_of(before, self.statistics, self.last)
        if peak is not None and self.peak is not None:
            self.peak = max(self.peak, peak)
        if before["macro_steps"] - before["reverted"] > self.case.depth:
            self.times.setdefault(self.last, []).append(seconds)
            if peak is not None and resident is not None:
                self.temporaries.append(peak - resident)

    def run(self, events: int) -> int:
        """Steps until `events` accelerations were timed, or too many were refused; returns how many were."""
        case = self.case
        for _ in range((case.depth + 2) * case.store_every + (3 * events + 2) * case.frequency):
            self.step()
            if len(self.times.get("both", ())) == events:
                break
        if self.statistics["moved"] or self.statistics["resets"]:
            raise RuntimeError(f"{case}: the history was disturbed: {self.statistics}")
        return len(self.times.get("both", ()))

    def count_host_waits(self) -> None:
        """By kind of step, over two periods; GPU only.

        The counters are not read in between, which would wait as well: kinds follow from the schedule.
        """
        first, case, counts = self.statistics["steps"] + 1, self.case, []
        for _ in range(2 * case.frequency):
            self.problem.gradient()
            counts.append(machine.host_waits(self.optimizer.step))
        for number, waits in enumerate(counts, first):
            kind = "both" if number % case.frequency == 0 else "idle" if number % case.store_every else "store"
            self.waits[kind] = max(waits, self.waits.get(kind, 0))

    def memory(self) -> Memory:
        """What acceleration added."""
        device = self.problem.device
        resident = machine.resident_bytes(device) if self.weighed else None
        return Memory(
            held=machine.tensor_bytes(device) - self.tensors,
            resident=_growth(self.resident, resident),
            peak=_growth(self.resident, self.peak if self.temporaries else None),
            temporary=max(self.temporaries, default=None),
        )


def measure(case: Case, device: str, repeats: int) -> Result:
    """Time `repeats` accelerations and the steps between them, in rounds.

    Raises:
        RuntimeError: a round in which no candidate was accepted, or the history was lost: nothing to time.
    """
    kernels.free_work_areas()  # those of earlier cases would be missed when they go
    problem = Problem(case.parameters, device)
    times: dict[str, list[float]] = {}
    first: Memory | None = None
    waits: dict[str, int] = {}
    totals = dict.fromkeys(("steps", *COUNTED), 0)
    while len(times.get("both", ())) < repeats:
        wanted = min(EVENTS_PER_ROUND, repeats - len(times.get("both", ())))
        turn = Round(problem, case, wanted, weigh=first is None)
        if not turn.run(wanted):
            raise RuntimeError(f"{case}: no candidate was accepted with a full history: {turn.statistics}")
        if first is None:
            first = turn.memory()
            if device.startswith("cuda"):
                turn.count_host_waits()
                waits = turn.waits
        for name in totals:
            totals[name] += turn.statistics[name]
        aadl.remove_acceleration(turn.optimizer)
        turn.plain(wanted)
        for kind, seconds in turn.times.items():
            times.setdefault(kind, []).extend(seconds)
    assert first is not None
    return Result(case, {kind: spread(values) for kind, values in times.items()}, first, waits, totals)


def in_fresh_process(function: Callable[..., T], threads: int, *arguments: Any) -> T:
    """The function's result from a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *arguments).result()


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
    can_weigh = parameters >= FRESH and machine.forget_peak(device)
    textbook = TextbookAnderson(optimizer, problem.parameters, depth)
    for _ in range(depth):
        problem.timed(lambda: textbook.step(mix=False))
    both = [problem.timed(textbook.step) for _ in range(repeats)]
    after = machine.peak_bytes(device)
    peak = _growth(before, after if can_weigh else None)
    return Textbook(parameters, depth, spread(plain), spread(both), peak)


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before
