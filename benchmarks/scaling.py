"""What Anderson acceleration (AA) costs on thousands of ranks: `python -m benchmarks.scaling --docs`.

One real rank of 1,536 and of 6,144 is run through torch's fake process group, and its collectives and memory are
counted (`fake_ranks`); the fixed cost of the accelerator's events is measured on this host; `machine_model` predicts
machines from both. --docs puts the tables into docs/reports/scaling.md. It takes some minutes on two cores and 8 GB of
memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

import aadl
from benchmarks.fake_ranks import Descent, accelerate, cases_of, count_all
from benchmarks.machine import in_fresh_process, time_call
from benchmarks.machine_model import LAYOUTS, WORKLOADS, Overhead
from benchmarks.scaling_docs import Report, blocks_of, conclusion
from benchmarks.tables import put_into_page

WORLD_SIZES = (1536, 6144)
SMALL_ELEMENTS = 1000
"""Parameters whose passes over memory cost nothing beside the rest of an event."""
PERIOD = 4
PERIODS = 12
"""The first three fill the window and are left out."""


def measure_overhead() -> Overhead:
    """Seconds that storing, accelerating (without the store) and judging (without the store) add to an SGD step.

    A plain optimizer on parameters of its own steps in turn, so that both see the same disturbances.

    Raises:
        RuntimeError: no candidate was accepted, so that none was judged.
    """
    torch.manual_seed(0)
    (plain_descent, plain), (descent, optimizer) = make_optimizer(), make_optimizer()
    accelerate(optimizer, "replicated", history_depth=10, frequency=PERIOD)
    seconds: dict[str, list[float]] = {"store": [], "acceleration": [], "judgment": []}
    kind = "store"
    for done in range(PERIOD * PERIODS):
        before: dict[str, Any] = dict(aadl.accelerator_of(optimizer).statistics)
        passed = step_seconds(descent, optimizer) - step_seconds(plain_descent, plain)
        after = aadl.accelerator_of(optimizer).statistics
        now = "acceleration" if after["attempts"] > before["attempts"] else kind
        kind = "judgment" if after["accepted"] > before["accepted"] else "store"
        if done >= 3 * PERIOD:
            seconds[now].append(passed)
    if not seconds["judgment"]:
        raise RuntimeError(f"no candidate was accepted: {aadl.accelerator_of(optimizer).statistics}")
    store = median(seconds["store"])
    return Overhead(store, median(seconds["acceleration"]) - store, median(seconds["judgment"]) - store)


def make_optimizer() -> tuple[Descent, torch.optim.Optimizer]:
    """SGD on one short vector."""
    parameter = torch.nn.Parameter(torch.randn(SMALL_ELEMENTS))
    return Descent([parameter]), torch.optim.SGD([parameter], lr=0.1)


def step_seconds(descent: Descent, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one optimizer step; the gradient is there before."""
    descent.set_gradients()
    return time_call(optimizer.step)


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts, measures, predicts, prints, and with --docs writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/reports/scaling.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in the processes that measure; the tables say so
    workloads = list(WORKLOADS.values())
    overhead = in_fresh_process(measure_overhead)
    counts = count_all(cases_of(LAYOUTS, WORLD_SIZES, workloads))
    blocks = blocks_of(Report(counts, overhead, workloads))
    print("\n\n".join(blocks.values()))
    if options.docs:
        put_into_page("scaling", blocks, conclude=conclusion)


if __name__ == "__main__":
    main()
