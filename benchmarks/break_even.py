"""After how many accelerations compiled kernels have earned their compilation: `python -m benchmarks.break_even`.

A period is what the defaults make of 20 optimizer steps: two stores and one acceleration. Every case runs in processes
of their own, one after the other: uncompiled, compiled with an empty cache of torch, compiled with that cache filled.
Seconds are those of processors, of the compilers too: a training that uses all cores loses them, and they do not depend
on who else uses the machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

import torch

from benchmarks.accelerated_step import RESNET50, Case, Problem, accelerate
from benchmarks.machine import in_fresh_process
from benchmarks.tables import head, line, number, origin

SIZES = (100_000, 1_000_000, 10_000_000, RESNET50)
STEADY = 6
"""Last periods of a run, whose median stands for all later ones."""
STEPS_PER_PERIOD = 20
"""Optimizer steps, at the defaults of `aadl.accelerate`."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a run: of a period in the long run, and what the first ones took beyond that."""

    period: float
    start: float


def costs(periods: Sequence[float]) -> Costs:
    """From the seconds of all periods of a run."""
    steady = median(periods[-STEADY:])
    return Costs(steady, sum(periods) - steady * len(periods))


def earned_after(plain: Costs, compiled: Costs) -> float:
    """Periods after which the compiled run has caught up; inf where it never does."""
    saved = plain.period - compiled.period
    return max(0.0, compiled.start - plain.start) / saved if saved > 0 else float("inf")


def run(case: Case, cache: str) -> Costs:
    """The costs of one run; `cache` is the folder of torch's compiler."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # compilers as our children
    problem = Problem(case.parameters, "cpu")
    optimizer = problem.optimizer(case.coupling)
    accelerate(optimizer, case)

    def period() -> float:
        seconds = 0.0
        for _ in range(2):
            problem.gradient()
            seconds -= processor_seconds()
            optimizer.step()
            seconds += processor_seconds()
        return seconds

    return costs([period() for _ in range(case.depth + 2 + STEADY)])


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def row_of(case: Case, threads: int) -> list[str]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as cache:
        plain, first, later = (
            in_fresh_process(run, replace(case, fused=fused), cache, threads=threads) for fused in (False, True, True)
        )
    steady = min(first.period, later.period)
    earned = [earned_after(plain, replace(compiled, period=steady)) for compiled in (first, later)]
    return [
        f"{case.parameters:,}", str(case.depth), case.coupling, number(plain.period, 1e3), number(steady, 1e3),
        *(number(compiled.start - plain.start) for compiled in (first, later)),
        *("never" if periods == float("inf") else f"{periods * STEPS_PER_PERIOD:,.0f}" for periods in earned),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.break_even", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)), default=SIZES)
    parser.add_argument("--depths", nargs="+", type=int, default=(5, 10))
    parser.add_argument("--couplings", nargs="+", choices=("params", "full"), default=("params", "full"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)  # as in the processes that measure; the last line says so
    print(head([
        "parameters", "depth", "coupling", "period, ms", "compiled, ms", "compilation, s", "from torch's cache, s",
        "earned after, steps", "from the cache",
    ]))  # fmt: skip
    for size, depth, coupling in product(options.sizes, options.depths, options.couplings):
        print(line(row_of(Case(size, depth, coupling=coupling), options.threads)), flush=True)
    print(f"\n{origin('python -m benchmarks.break_even')}")


if __name__ == "__main__":
    main()
