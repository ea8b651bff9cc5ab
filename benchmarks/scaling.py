"""What Anderson acceleration (AA) costs on thousands of ranks: `python -m benchmarks.scaling --docs`.

One real rank of 1,536 and of 6,144 is run through torch's fake process group, and its collectives and memory are
counted (`fake_ranks`); the fixed cost of the accelerator's events is measured on this host; `machine_model` predicts
machines from both. --docs puts the tables into docs/reports/scaling.md. It takes some minutes on two cores and 8 GB of
memory.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from statistics import median

import torch

import aadl
from benchmarks.fake_ranks import Count, Descent, accelerate, cases_of, count_all
from benchmarks.machine import in_fresh_process, time_call
from benchmarks.machine_model import (
    LAYOUTS,
    MACHINES,
    WORKLOADS,
    Collective,
    Events,
    acceleration_seconds,
    held_by_plain,
    history_bytes,
    local_elements,
    plain_seconds,
    training_collectives,
)
from benchmarks.tables import markdown, number, origin, put_into_page, rows_of

WORLD_SIZES = (1536, 6144)
SMALL_ELEMENTS = 1000
"""Parameters whose passes over memory cost nothing beside the rest of an event."""
PERIOD = 4
PERIODS = 12
"""The first three fill the window and are left out."""


# ---- this host -------------------------------------------------------------------------------------------------------


def measure_overhead() -> Events:
    """Seconds that storing, accelerating (without the store) and judging (without the store) add to an SGD step.

    A plain optimizer on parameters of its own steps in turn, so that both see the same disturbances.

    Raises:
        RuntimeError: no candidate was accepted, so that none was judged.
    """
    torch.manual_seed(0)
    (plain_descent, plain), (descent, optimizer) = make_optimizer(), make_optimizer()
    accelerate(optimizer, history_depth=10, frequency=PERIOD)
    statistics = aadl.accelerator_of(optimizer).statistics
    seconds: dict[str, list[float]] = {"store": [], "acceleration": [], "judgment": []}
    kind = "store"
    for done in range(PERIOD * PERIODS):
        attempts, accepted = statistics["attempts"], statistics["accepted"]
        passed = step_seconds(descent, optimizer) - step_seconds(plain_descent, plain)
        statistics = aadl.accelerator_of(optimizer).statistics
        now = "acceleration" if statistics["attempts"] > attempts else kind
        kind = "judgment" if statistics["accepted"] > accepted else "store"
        if done >= 3 * PERIOD:
            seconds[now].append(passed)
    if not seconds["judgment"]:
        raise RuntimeError(f"no candidate was accepted: {statistics}")
    store = median(seconds["store"])
    return Events(store, median(seconds["acceleration"]) - store, median(seconds["judgment"]) - store)


def make_optimizer() -> tuple[Descent, torch.optim.Optimizer]:
    """SGD on one short vector."""
    parameter = torch.nn.Parameter(torch.randn(SMALL_ELEMENTS))
    return Descent([parameter]), torch.optim.SGD([parameter], lr=0.1)


def step_seconds(descent: Descent, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one optimizer step; the gradient is there before."""
    descent.set_gradients()
    return time_call(optimizer.step)


# ---- tables ----------------------------------------------------------------------------------------------------------


def summary(collectives: Iterable[Collective]) -> str:
    """Collectives by kind and payload, or by kind alone where payloads are many."""
    groups = Counter(collectives)
    if len(groups) <= 2:
        return "; ".join(f"{n} {c.operation} of {size(c.payload)}" for c, n in groups.items()) or "none"
    times: Counter[str] = Counter()
    payload: Counter[str] = Counter()
    for collective, count in groups.items():
        times[collective.operation] += count
        payload[collective.operation] += count * collective.payload
    return "; ".join(f"{times[name]} {name} (together {size(payload[name])})" for name in times)


def size(amount: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= factor:
            return f"{number(amount / factor)} {unit}"
    return f"{amount:.0f} B"


def milliseconds(seconds: float) -> str:
    return number(seconds, 1e3)


def counts_table(counts: Iterable[Count]) -> str:
    """Collectives of one rank."""
    rows = []
    for count in counts:
        case = count.case
        modeled = training_collectives(case.workload, case.layout, case.ranks)
        training = f"modeled: {summary(modeled)}"
        if case.layout == "fsdp2":
            agreement = "as modeled" if Counter(modeled) == Counter(count.training) else f"MODELED: {summary(modeled)}"
            training = f"{summary(count.training)} ({agreement})"
        place = [case.workload.name, case.layout, f"{case.ranks:,}", str(case.depth)]
        rows.append([*place, training, *map(summary, count.events)])
    header = ["network", "layout", "ranks", "m", "plain step", "storing step", "accelerating step", "judging step"]
    return markdown(header, rows)


def memory_table(counts: Iterable[Count]) -> str:
    """Bytes on the fullest rank: counted, and by the formula."""
    rows = []
    for count in counts:
        case = count.case
        formula = history_bytes(case.depth) * local_elements(case.workload.units, case.layout, case.ranks)
        place = [case.workload.name, case.layout, f"{case.ranks:,}", str(case.depth), f"{count.local_elements:,}"]
        rows.append([*place, size(count.history_bytes), size(formula), f"{count.history_bytes / formula:.3f}"])
    header = ["network", "layout", "ranks", "m", "parameters held", "history held", "formula", "held / formula"]
    return markdown(header, rows)


def machines_table() -> str:
    """Figures of the machines."""
    rows = [
        [
            m.name, f"{m.memory_bandwidth / 1e9:,.0f}", f"{m.memory / 1e9:.0f}", f"{m.peak_flops / 1e12:g}",
            f"{m.utilization:.2f}", f"{m.images_per_second:,.0f}", str(m.devices_per_node),
            f"{m.local_bandwidth / 1e9:g}", f"{m.node_bandwidth / 1e9:g}",
        ]
        for m in MACHINES
    ]  # fmt: skip
    header = [
        "device", "memory GB/s", "memory GB", "peak Tflop/s", "utilization", "ResNet50 images/s", "devices a node",
        "link in node GB/s", "injection GB/s a node",
    ]  # fmt: skip
    sources = "\n".join(f"- {m.name}: {'; '.join(m.sources)}." for m in MACHINES)
    return f"{markdown(header, rows)}\n\n{sources}"


def predictions_table(counts: Iterable[Count], overhead: Events) -> str:
    """Seconds per step, share of AA, and bytes of weights, gradients and optimizer state beside those of the history.

    Layouts that were counted at the default depth, which are those in which a device holds the network.
    """
    by_place = {(c.case.workload.name, c.case.ranks, c.case.layout): c for c in counts if c.case.depth == 10}
    rows = []
    for workload, machine, ranks, layout in product(WORKLOADS, MACHINES, WORLD_SIZES, LAYOUTS):
        count = by_place.get((workload.name, ranks, layout))
        if count is None:
            continue
        place = (machine, workload, layout, ranks)
        plain, added = plain_seconds(*place), acceleration_seconds(*place, count.events, overhead)
        bytes_of_plain = workload.state_bytes * held_by_plain(workload, layout, ranks)
        history = history_bytes(10) * local_elements(workload.units, layout, ranks)
        share = f"{milliseconds(added)} ({100 * added / (plain + added):.2g} %)"
        memory = f"{size(bytes_of_plain)} + {size(history)}"
        rows.append([workload.name, machine.name, f"{ranks:,}", layout, milliseconds(plain), share, memory])
    return markdown(["network", "machine", "ranks", "layout", "plain step ms", "AA ms", "memory: plain + AA"], rows)


def conclusion(page: str) -> str:
    """The first sentences of docs/reports/scaling.md, from its predictions."""
    ranges = []
    for layout in LAYOUTS:
        cells = [row["AA ms"] for row in rows_of(page, "predictions") if row["layout"] == layout]
        shares = sorted((cell.partition("(")[2].partition(" %")[0] for cell in cells), key=float)
        ranges.append(f"{shares[0]} to {shares[-1]} % ({layout})")
    return (
        f"By a model of thousands of devices, acceleration at the defaults takes {', '.join(ranges)} of a step. "
        "An acceleration needs one short all-reduce of about a kilobyte; what costs is reading the history, and "
        "gathering it where replicas share one. Storing every step and accelerating every second one costs ten times "
        "as much."
    )


def blocks_of(counts: Sequence[Count], overhead: Events) -> dict[str, str]:
    """What docs/reports/scaling.md has between its marks."""
    fixed = map(milliseconds, overhead)
    return {
        "origin": origin("python -m benchmarks.scaling --docs"),
        "counts": counts_table(counts),
        "memory": memory_table(counts),
        "machines": machines_table(),
        "overhead": "Fixed overhead, in ms: store {}, acceleration {}, judgment {}.".format(*fixed),
        "predictions": predictions_table(counts, overhead),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts, measures, predicts, prints, and with --docs writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/reports/scaling.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in the processes that measure; the tables say so
    overhead = in_fresh_process(measure_overhead)
    blocks = blocks_of(count_all(cases_of(LAYOUTS, WORLD_SIZES, WORKLOADS)), overhead)
    print("\n\n".join(blocks.values()))
    if options.docs:
        put_into_page("scaling", blocks, conclude=conclusion)


if __name__ == "__main__":
    main()
