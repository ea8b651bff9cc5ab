"""What follows from the measurements of benchmarks.step: ratios to the floor, tables, and the roofline figure."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.accelerated_step import Case, Result, Textbook, held_bytes, memory_agrees, moved_bytes
from benchmarks.machine import Bandwidth
from benchmarks.tables import Table, number, with_quartiles

SMALL = 100_000
"""Parameters up to which calls, not bytes, take the time: reported in microseconds."""
EVENTS = ("store", "acceleration", "both")


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    device: str
    bandwidth: Bandwidth
    results: list[Result]
    textbooks: list[Textbook]


# ---- what follows from it ------------------------------------------------------------------------------------------


def added(result: Result) -> dict[str, float]:
    """Seconds added to a plain step by kind of step, and by "acceleration" beside the store where both were seen.

    Stores after an accepted candidate (which is then also judged) stand for stores where there are no others.
    """
    case, plain = result.case, median(result.steps["plain"])
    seconds = {kind: median(times) - plain for kind, times in result.steps.items() if kind != "plain"}
    after_candidate = seconds.pop("store after candidate", None)
    if case.frequency == case.store_every:  # no stores but after a refusal
        seconds.pop("store", None)
    elif "store" not in seconds and after_candidate is not None:
        seconds["store"] = after_candidate
    if case.frequency > 2 * case.store_every and "store" in seconds:
        seconds["acceleration"] = seconds["both"] - seconds["store"]
    return seconds


def floor_seconds(case: Case, bandwidth: Bandwidth) -> dict[str, float]:
    """Seconds for the counted bytes: stores at the bandwidth of a copy, accelerations at that of reading."""
    moved = {event: count * case.parameters for event, count in moved_bytes(case).items()}
    acceleration = moved["acceleration"] / bandwidth.read
    stores_too = (moved["both"] - moved["acceleration"]) / bandwidth.copy
    return {
        "store": moved["store"] / bandwidth.copy, "acceleration": acceleration, "both": stores_too + acceleration
    }  # fmt: skip


def ratios(result: Result, bandwidth: Bandwidth) -> dict[str, float]:
    """Added time over the floor, by event."""
    seconds, floors = added(result), floor_seconds(result.case, bandwidth)
    return {event: seconds[event] / floor for event, floor in floors.items() if event in seconds}


def disagreements(report: Report) -> list[str]:
    """Cases in which the accelerator holds more or less than is counted."""
    work_area = 1e8 if report.device.startswith("cuda") else 1e6
    return [
        f"{name_of(r.case)}: {r.memory.held / r.case.parameters:.1f} B held, {held_bytes(r.case)} B counted"
        for r in report.results
        if not memory_agrees(r.case, r.memory, work_area)
    ]


# ---- tables --------------------------------------------------------------------------------------------------------

CASE_HEADER = ["parameters", "depth", "history", "accelerates every", "average", "coupling", "other"]


def tables(report: Report) -> dict[str, Table]:
    """By name: small problems in microseconds, large ones in milliseconds, memory, the textbook, waits on a GPU."""
    small = [result for result in report.results if result.case.parameters <= SMALL]
    large = [result for result in report.results if result.case.parameters > SMALL]
    made = {
        "step_small": _small_table(small),
        "step_large": _large_table(large, report.bandwidth),
        "memory": _memory_table(large),
        "step_textbook": _textbook_table(report),
        "step_bandwidth": _bandwidth_table(report),
        "host_waits": _host_waits_table(report.results),
    }
    return {name: table for name, table in made.items() if table.rows}


def _small_table(results: Sequence[Result]) -> Table:
    kinds = {"idle": "+idle", "open": "+macro-step begins", "store": "+store", "both": "+both"}
    rows = [
        [
            *case_cells(result.case),
            with_quartiles(result.steps["plain"], lambda seconds: number(seconds, 1e6)),
            *(number(added(result).get(kind), 1e6) for kind in kinds),
        ]
        for result in results
    ]
    title = "Small problems, 20 tensors: microseconds, added to a plain step"
    return Table(title, [*CASE_HEADER, "plain step", *kinds.values()], rows)


def _large_table(results: Sequence[Result], bandwidth: Bandwidth) -> Table:
    header = [
        *CASE_HEADER, "plain step", "step with both", *(f"+{event}" for event in EVENTS), "floor of both",
        *(f"{event} / floor" for event in EVENTS),
    ]  # fmt: skip
    rows = []
    for result in results:
        seconds, ratio = added(result), ratios(result, bandwidth)
        rows.append(
            [
                *case_cells(result.case),
                *(with_quartiles(result.steps[kind], lambda value: number(value, 1e3)) for kind in ("plain", "both")),
                *(number(seconds.get(event), 1e3) for event in EVENTS),
                number(floor_seconds(result.case, bandwidth)["both"], 1e3),
                *(number(ratio.get(event)) for event in EVENTS),
            ]
        )
    title = (
        "Milliseconds, median [quartiles], added to a plain step; floor: 20 + 2h bytes per parameter for a store ("
        f"after an accepted candidate 28 + 2h) at the {bandwidth.copy / 1e9:.1f} GB/s of a copy, 2mh + 12 for an "
        f"acceleration at the {bandwidth.read / 1e9:.1f} GB/s of reading, twice both with coupling full (an update in "
        f"place moves {bandwidth.update / 1e9:.1f} GB/s here)"
    )
    return Table(title, header, rows)


def _memory_table(results: Sequence[Result]) -> Table:
    """One row for cases that keep the same history, with the most of any of them."""
    same: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        case = result.case
        keys: tuple[str, ...] = (
            f"{case.parameters:,}",
            str(case.depth),
            case.history,
            case.coupling,
            str(held_bytes(case)),
        )
        same.setdefault(keys, []).append(result)
    rows = []
    for keys, those in same.items():
        per = 1 / those[0].case.parameters
        memories = [asdict(result.memory) for result in those]
        most = {name: max((m[name] for m in memories if m[name] is not None), default=None) for name in memories[0]}
        cells = [number(most[name], per) for name in ("held", "resident", "peak")]
        rows.append([*keys, *cells, number(most["temporary"], per / 4)])
    title = (
        "Memory the accelerator adds, bytes per parameter: counted, tensors held, growth of the process at rest and at "
        "most; largest growth within an event, in float32 rows"
    )
    header = ["parameters", "depth", "history", "coupling", "counted", "held", "resident", "peak", "temporary rows"]
    return Table(title, header, rows)


def _textbook_table(report: Report) -> Table:
    rows = []
    for textbook in report.textbooks:
        ours = _beside(textbook, report.results)
        theirs, own = median(textbook.both) - median(textbook.plain), added(ours)["both"] if ours else None
        speed_up = "-" if own is None else f"{theirs / own:.1f}"
        per = 1 / textbook.parameters
        peaks = [number(textbook.peak, per), number(ours.memory.peak if ours else None, per)]
        sizes = [f"{textbook.parameters:,}", str(textbook.depth)]
        rows.append([*sizes, number(theirs, 1e3), number(own, 1e3), speed_up, *peaks])
    header = ["parameters", "depth", "textbook ms", "aadl ms", "speed-up", "textbook peak B", "aadl peak B"]
    title = "Store and acceleration, added to a plain step, and peak bytes per parameter: textbook (lstsq) and aadl"
    return Table(title, header, rows)


def _bandwidth_table(report: Report) -> Table:
    device = "GPU" if report.device.startswith("cuda") else "CPU"
    rows = [[name, number(speed, 1e-9), device] for name, speed in asdict(report.bandwidth).items()]
    return Table("Speed of the memory, median over the run", ["kind", "GB/s", "device"], rows)


def _beside(textbook: Textbook, results: Sequence[Result]) -> Result | None:
    """The plainest case of equal size and depth: a float32 history, at the highest frequency measured."""
    base = Case(textbook.parameters, textbook.depth)
    cases = [result for result in results if replace(result.case, frequency=base.frequency) == base]
    return min(cases, key=lambda result: result.case.frequency, default=None)


def _host_waits_table(results: Sequence[Result]) -> Table:
    kinds = ("idle", "store", "both")
    rows = [
        [name_of(result.case), *(str(result.host_waits.get(kind, "-")) for kind in kinds)]
        for result in results
        if result.host_waits
    ]
    return Table("GPU: times the host waits in a step", ["case", *kinds], rows)


def case_cells(case: Case) -> list[str]:
    other = [f"stores every {case.store_every}"] if case.store_every > 1 else []
    other += ["no safeguard"] if not case.safeguard else []
    other += ["compiled"] if case.fused else []
    average = "always" if case.average else "off"
    return [
        f"{case.parameters:,}", str(case.depth), case.history, str(case.frequency), average, case.coupling,
        ", ".join(other) or "-",
    ]  # fmt: skip


def name_of(case: Case) -> str:
    """The case in a line."""
    return " ".join(f"{name} {cell}" for name, cell in zip(CASE_HEADER, case_cells(case), strict=True) if cell != "-")


# ---- figure --------------------------------------------------------------------------------------------------------

UNITS = {"step_small.csv": 1e-6, "step_large.csv": 1e-3}
"""Tables of steps, and the seconds in which their added times count."""
KINDS = {"store": ("a step that stores", "#0072B2"), "both": ("a step that stores and accelerates", "#D55E00")}
Point = tuple[float, float]
"""Bytes and seconds."""


def draw(folder: Path, path: Path) -> None:
    """Counted bytes over added time against counted bytes, under the speed of the memory.

    Args:
        folder: with the `step_*.csv` of a run.
        path: of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from experiments.records.figures import RC, frame

    with pyplot.rc_context(RC):
        figure, axes = pyplot.subplots(figsize=(8.5, 5.2))
        handles = {}
        for label, (points, style) in _points(folder).items():
            moved, seconds = np.array(points).T
            handles[label] = axes.scatter(moved, moved / seconds / 1e9, **style)
        for row, line, side in zip(
            read_csv(folder / "step_bandwidth.csv"), ("--", "-"), ("top", "bottom"), strict=False
        ):
            axes.axhline(float(row["GB/s"]), color="#333333", linewidth=1, linestyle=line)
            words, place = f"memory, {row['kind']}: {row['GB/s']} GB/s", (0.01, float(row["GB/s"]))
            axes.annotate(words, place, xycoords=axes.get_yaxis_transform(), va=side, fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="bytes that the step must move for aadl")
        axes.set(ylabel="these bytes over the time\nthat aadl adds to the step (GB/s)")
        head = f"One optimizer step with aadl on a {row['device']}: how near it comes to the speed of the memory"
        note = "A mark: one setting and network of 1,000 to 25.6 million weights, median of repeats; higher is faster"
        source = f"python -m benchmarks.step · tables {', '.join(UNITS)}"
        frame(figure, (head, "#111111"), [(note, "#444444")], source, handles)
        figure.savefig(path, dpi=100, metadata={"Software": None})
        pyplot.close(figure)


def _points(folder: Path) -> dict[str, tuple[list[Point], dict[str, Any]]]:
    """Points and style of each kind of mark that the tables have, by label."""
    marks: dict[str, tuple[list[Point], dict[str, Any]]] = {}

    def add(label: str, moved: float, cell: str, unit: float, **style: Any) -> None:
        if cell != "-" and float(cell) > 0:
            marks.setdefault(label, ([], style))[0].append((moved, float(cell) * unit))

    for compiled, (event, (label, color)) in product((False, True), KINDS.items()):
        style = {"s": 18, "facecolors": color if compiled else "none", "edgecolors": color, "linewidths": 0.9}
        for name, unit in UNITS.items():
            for row in read_csv(folder / name):
                case = case_of(row)
                if case.fused == compiled:
                    moved = moved_bytes(case)[event] * case.parameters
                    add(label + ", compiled (fused=True)" * compiled, moved, row[f"+{event}"], unit, **style)
    for row in read_csv(folder / "step_textbook.csv"):
        case = Case(int(row["parameters"]), int(row["depth"]))
        moved = moved_bytes(case)["both"] * case.parameters
        add("textbook code, stores and accelerates", moved, row["textbook ms"], 1e-3, s=32, c="#333333", marker="x")
    return marks


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it was not written."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def case_of(row: dict[str, str]) -> Case:
    """The case of a row of `step_small.csv` or `step_large.csv`."""
    stores = re.search(r"stores every (\d+)", row["other"])
    return Case(
        int(row["parameters"]), int(row["depth"]), row["history"], int(row["accelerates every"]),
        int(stores[1]) if stores else 1, row["average"] == "always", "full" if row["coupling"] == "full" else "params",
        "no safeguard" not in row["other"], "compiled" in row["other"],
    )  # fmt: skip
