"""docs/reports/scaling.md, from what `benchmarks.scaling` counted and measured."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fake_ranks import Count
from benchmarks.machine import facts
from benchmarks.machine_model import (
    LAYOUTS,
    MACHINES,
    WORKLOADS,
    Acceleration,
    Collective,
    Overhead,
    Setting,
    Workload,
    local_elements,
    plain_seconds,
    predict,
    training_collectives,
)

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.scaling --docs"
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

    def acceleration(self, layout: str, setting: Setting, ranks: int | None = None) -> Acceleration:
        """AA as counted in that layout (at `ranks`, if given); its overhead is that of this host."""
        found = [c for c in self.counts if c.case.layout == layout and ranks in (None, c.case.ranks)]
        return Acceleration(setting, found[0].pattern, self.overhead)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def summary(collectives: Iterable[Collective]) -> str:
    """Collectives by kind and payload, or by kind alone where payloads are many."""
    groups = Counter(collectives)
    if len(groups) <= 2:
        return "; ".join(f"{n} {c.operation} of {size(c.payload)}" for c, n in groups.items()) or "none"
    number: Counter[str] = Counter()
    payload: Counter[str] = Counter()
    for collective, count in groups.items():
        number[collective.operation] += count
        payload[collective.operation] += count * collective.payload
    return "; ".join(f"{number[name]} {name} (together {size(payload[name])})" for name in number)


def size(number: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{three_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def milliseconds(seconds: float) -> str:
    return three_digits(1e3 * seconds)


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
    return table(header, rows)


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
    for workload in report.workloads:
        for layout in report.layouts:
            for ranks in report.world_sizes:
                counted = any(c.case.layout == layout and c.case.workload == workload for c in report.counts)
                if not counted:
                    formula = DEFAULTS.history_bytes * local_elements(workload.units, layout, ranks)
                    row = [workload.name, layout, f"{ranks:,}", "10", f"{workload.elements:,}", "-", size(formula), "-"]
                    rows.append(row)
    header = ["network", "layout", "ranks", "m", "parameters held", "history held", "formula", "held / formula"]
    return table(header, rows)


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
    return f"{table(header, rows)}\n\n{sources}"


def predictions_table(report: Report, workload: Workload) -> str:
    """Seconds per step and share of AA, for two cadences and a lean setting."""
    rows = []
    for machine in MACHINES:
        for ranks in report.world_sizes:
            for layout in report.layouts:
                usual, often, lean = (
                    predict(machine, workload, report.acceleration(layout, s, ranks), layout, ranks)
                    for s in (DEFAULTS, OFTEN, LEAN)
                )
                cells = [f"{milliseconds(p.acceleration)} ({100 * p.share:.2g} %)" for p in (usual, often, lean)]
                memory = f"{size(usual.plain_bytes)} + {size(usual.history_bytes)}"
                fits = usual.fits if usual.fits == lean.fits else f"{usual.fits}; lean {lean.fits}"
                rows.append([machine.name, f"{ranks:,}", layout, milliseconds(usual.plain), *cells, memory, fits])
    header = [
        "machine", "ranks", "layout", "plain step ms", "AA ms: 10/20", "AA ms: 1/2", "AA ms: lean, 10/20",
        "memory: plain + AA", "fits",
    ]  # fmt: skip
    return table(header, rows)


def conclusion(report: Report) -> str:
    """What the predictions say in one paragraph."""
    ranges = {}
    for layout in report.layouts:
        shares = [
            100 * predict(machine, workload, report.acceleration(layout, DEFAULTS, ranks), layout, ranks).share
            for machine in MACHINES
            for workload in report.workloads
            for ranks in report.world_sizes
        ]
        ranges[layout] = f"{min(shares):.2g} to {max(shares):.2g} % ({layout})"
    return (
        "By a model of thousands of devices, acceleration at the defaults adds "
        f"{', '.join(ranges.values())} to a step. An acceleration needs one short all-reduce of about a kilobyte; "
        "what costs is reading the history, and gathering it where replicas share one. "
        "Accelerating every second step costs about ten times as much."
    )


def markdown(report: Report) -> str:
    """The whole page."""
    fact, fixed = facts("cpu"), report.overhead
    predictions = "\n\n".join(f"### {w.name}\n\n{predictions_table(report, w)}" for w in report.workloads)
    summit, resnet = MACHINES[0], WORKLOADS["ResNet50"]
    efficiency = resnet.compute_seconds(summit) / plain_seconds(summit, resnet, "replicated", 6144)
    return wrapped(f"""# Anderson acceleration on thousands of devices

{conclusion(report)}

Written by `{COMMAND}`: torch {fact["torch"]}, commit {fact["commit"][:9]}{"+" * fact["commit"].endswith("+")}
(+: with changes), {fact["date"][:10]}. **Times on the machines below are predicted by a model, not measured on these
machines, and nothing here was measured on a GPU.** What was counted or measured says so. Formulas, figures and their
sources are in `benchmarks/machine_model.py`.

Layouts: *replicated*, data parallelism where every rank keeps whole parameters and the whole history; *sharded*, the
same with `shard_history=True`; *fsdp2*, `fully_shard` over all ranks. AA is Anderson acceleration, m is
`history_depth`.

## Counted: collectives of one rank

Rank 0 of a fake process group of torch runs the library for real; collectives are recorded and move nothing. AA runs
with SGD and momentum, coupling "full". "Plain step" of fsdp2 is forward and backward of units with the network's shapes
(bfloat16 all-gathers, float32 reduce-scatters); that of the other layouts is one all-reduce of float32 gradients.
Bytes are those of the whole tensor. FSDP2 pads
every tensor to as many equal parts as there are ranks, which is why its bytes grow.

{counts_table(report)}

## Counted: memory of AA on the fullest rank

Bytes of all tensors the accelerator made, momentum included, against 2 (2 m h + 12) bytes a parameter held (h = 4).
What is held beyond the formula is the work area. Rows with "-" were not run (whole parameters would not fit into this
host's memory): they are the formula, which the rows of ResNet50 check. FSDP2 cuts tensors along their first dimension,
so rank 0 holds rows of every tensor, more than N / P.

{memory_table(report)}

## The machines

Short all-reduces follow a tree, long ones a ring or a tree, other collectives a ring, with the latencies of NCCL's
own cost model (`src/graph/tuning.cc`): a hop between nodes 2.7-5 us for short and 14 us for long messages. Long
collectives get 85 % of the link, AA 1/1.3 of the memory bandwidth, and half of the plain step's collectives hide
behind computation; these three figures are assumptions; the last was chosen by ResNet50 on 6,144 V100 of Summit,
where 87 % scaling efficiency was published (Yin et al., DLS 2019) and the model says {100 * efficiency:.0f} %.

{machines_table()}

## Predicted: seconds per step and the share of AA

ResNet50: SGD with momentum, 32 images a device. 7e9: Adam, 4,096 tokens a device. AA: defaults (m = 10, float32,
momentum coupled) with a store every 10 and an acceleration every 20 steps, and every step and every 2; *lean* is m =
5, `history_dtype=torch.bfloat16`, `state_coupling="params"`. Per parameter held: a store moves 20 + 2 h bytes, an
acceleration 2 m h + 12, a judgment 8, each twice with momentum; to these come the collectives counted above and the
fixed overhead of an event with 1,000 parameters, measured on this host (store {milliseconds(fixed.store)} ms,
acceleration {milliseconds(fixed.acceleration)}, judgment {milliseconds(fixed.judgment)}; the last two without the
store). Every candidate is taken. In brackets: share of AA in the step.
"Fits" compares weights, gradients, optimizer state and history with the memory of a device, without activations.

{predictions}

## What the model leaves out

Stragglers, contention in the network, input, activations, gradient buckets, hybrid sharding (FSDP2 within groups of
ranks, which large jobs use because a ring over thousands of ranks has thousands of hops), and the launch latency of
kernels beyond the overhead measured on this CPU. The shares are therefore upper bounds where a real plain step is
longer, and lower bounds where passes over the history are further from the floor than 1.3. An earlier state of this
command (commit ea273315d) compared the model with two gloo ranks on a CPU: events took 0.65 to 4.2 times what the
model says, an all-reduce of a kilobyte 75 times.
""")


def wrapped(text: str, width: int = 118) -> str:
    """Prose wrapped; tables, lists, headings and figures as they are."""
    paragraphs = text.split("\n\n")
    kept = ("|", "#", "-", "!")
    return "\n\n".join(p if p.startswith(kept) else fill(p, width) + "\n" * p.endswith("\n") for p in paragraphs)


def fill(paragraph: str, width: int) -> str:
    return textwrap.fill(" ".join(paragraph.split()), width, break_long_words=False, break_on_hyphens=False)


def write(text: str, reports: Path = ROOT / "docs" / "reports") -> None:
    """Writes docs/reports/scaling.md."""
    (reports / "scaling.md").write_text(text, encoding="utf-8")
