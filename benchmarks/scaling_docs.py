"""The tables of docs/reports/scaling.md, from what `benchmarks.scaling` counted and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.fake_ranks import Count
from benchmarks.machine_model import (
    LAYOUTS,
    MACHINES,
    NEVER,
    Acceleration,
    Collective,
    Overhead,
    Setting,
    Workload,
    local_elements,
    predict,
    training_collectives,
)
from benchmarks.tables import markdown, number, origin, rows_of

DEFAULTS = Setting("defaults: store every 10, accelerate every 20")
OFTEN = Setting("store every step, accelerate every 2", store_each_nth=1, frequency=2)
LEAN = Setting("lean: m = 5, bfloat16, parameters only", depth=5, element_bytes=2, blocks=1)


@dataclass(frozen=True)
class Report:
    """What one run counted, and the seconds of events with few parameters that it measured on this host."""

    counts: Sequence[Count]
    overhead: Overhead
    workloads: Sequence[Workload]

    @property
    def layouts(self) -> list[str]:
        """Counted ones, in the usual order."""
        return [layout for layout in LAYOUTS if any(count.case.layout == layout for count in self.counts)]

    @property
    def world_sizes(self) -> list[int]:
        return sorted({count.case.ranks for count in self.counts})

    def acceleration(self, layout: str, setting: Setting, ranks: int) -> Acceleration:
        """AA as counted in that layout on so many ranks; its overhead is that of this host."""
        found = next(c for c in self.counts if (c.case.layout, c.case.ranks) == (layout, ranks))
        return Acceleration(setting, found.pattern, self.overhead)


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


def counts_table(report: Report) -> str:
    """Collectives of one rank."""
    rows = []
    for count in report.counts:
        case, pattern = count.case, count.pattern
        modeled = training_collectives(case.workload, case.layout, case.ranks)
        training = f"modeled: {summary(modeled)}"
        if case.layout == "fsdp2":
            agreement = "as modeled" if Counter(modeled) == Counter(count.training) else f"MODELED: {summary(modeled)}"
            training = f"{summary(count.training)} ({agreement})"
        rows.append(
            [
                case.workload.name, case.layout, f"{case.ranks:,}", str(case.depth), training,
                summary(pattern.store), summary(pattern.acceleration), summary(pattern.judgment),
            ]
        )  # fmt: skip
    header = ["network", "layout", "ranks", "m", "plain step", "storing step", "accelerating step", "judging step"]
    return markdown(header, rows)


def memory_table(report: Report) -> str:
    """Bytes on the fullest rank: counted, and by the formula."""
    rows = []
    for count in report.counts:
        case, workload = count.case, count.case.workload
        setting = Setting("", depth=case.depth, blocks=count.pattern.blocks)
        formula = setting.history_bytes * local_elements(workload.units, case.layout, case.ranks)
        rows.append(
            [
                workload.name, case.layout, f"{case.ranks:,}", str(case.depth), f"{count.local_elements:,}",
                size(count.history_bytes), size(formula), f"{count.history_bytes / formula:.3f}",
            ]
        )  # fmt: skip
    counted = {(count.case.workload.name, count.case.layout) for count in report.counts}
    for workload, layout, ranks in product(report.workloads, report.layouts, report.world_sizes):
        if (workload.name, layout) not in counted:
            by_formula = size(DEFAULTS.history_bytes * local_elements(workload.units, layout, ranks))
            rows.append([workload.name, layout, f"{ranks:,}", "10", f"{workload.elements:,}", "-", by_formula, "-"])
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


def predictions_table(report: Report, workload: Workload) -> str:
    """Seconds per step and share of AA, for two cadences and a lean setting; rows that fit without AA."""
    rows = []
    for machine, ranks, layout in product(MACHINES, report.world_sizes, report.layouts):
        usual, often, lean = (
            predict(machine, workload, report.acceleration(layout, setting, ranks), layout, ranks)
            for setting in (DEFAULTS, OFTEN, LEAN)
        )
        if usual.fits == NEVER:
            continue
        cells = [f"{milliseconds(p.acceleration)} ({100 * p.share:.2g} %)" for p in (usual, often, lean)]
        memory = f"{size(usual.plain_bytes)} + {size(usual.history_bytes)}"
        fits = usual.fits if usual.fits == lean.fits else f"{usual.fits}; lean {lean.fits}"
        rows.append([machine.name, f"{ranks:,}", layout, milliseconds(usual.plain), *cells, memory, fits])
    header = [
        "machine", "ranks", "layout", "plain step ms", "AA ms: 10/20", "AA ms: 1/2", "AA ms: lean, 10/20",
        "memory: plain + AA", "fits",
    ]  # fmt: skip
    return markdown(header, rows)


def conclusion(page: str) -> str:
    """The first sentences of docs/reports/scaling.md, from its predictions."""
    ranges = []
    for layout in LAYOUTS:
        cells = [row["AA ms: 10/20"] for row in rows_of(page, "predictions") if row["layout"] == layout]
        shares = sorted((cell.partition("(")[2].partition(" %")[0] for cell in cells), key=float)
        ranges.append(f"{shares[0]} to {shares[-1]} % ({layout})")
    return (
        f"By a model of thousands of devices, acceleration at the defaults takes {', '.join(ranges)} of a step. "
        "An acceleration needs one short all-reduce of about a kilobyte; what costs is reading the history, and "
        "gathering it where replicas share one. Accelerating every second step costs about ten times as much."
    )


def blocks_of(report: Report) -> dict[str, str]:
    """What docs/reports/scaling.md has between its marks."""
    fixed = report.overhead
    return {
        "origin": origin("python -m benchmarks.scaling --docs"),
        "counts": counts_table(report),
        "memory": memory_table(report),
        "machines": machines_table(),
        "overhead": f"Fixed overhead, in ms: store {milliseconds(fixed.store)}, acceleration "
        f"{milliseconds(fixed.acceleration)}, judgment {milliseconds(fixed.judgment)}.",
        "predictions": "\n\n".join(f"### {w.name}\n\n{predictions_table(report, w)}" for w in report.workloads),
    }
