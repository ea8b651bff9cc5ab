"""What follows from the measurements of benchmarks.step: ratios to the floor, tables, and the roofline figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.accelerated_step import Case, Result, Textbook, held_bytes, memory_agrees, moved_bytes
from benchmarks.machine import Bandwidth, Spread

SMALL = 100_000
"""Parameters up to which calls, not bytes, take the time: reported in microseconds."""
Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    machine: dict[str, Any]
    bandwidth: Bandwidth
    bandwidth_samples: list[Bandwidth]
    bandwidth_before: list[Bandwidth]
    """The newest sample before each of the results."""
    results: list[Result]
    textbooks: list[Textbook]
    training: list[dict[str, Any]]
    notes: list[str]


# ---- what follows from it ------------------------------------------------------------------------------------------


def added(result: Result) -> dict[str, float]:
    """Seconds added to a plain step by kind of step, and by "acceleration" beside the store where both were seen.

    Stores after an accepted candidate (which is then also judged) stand for stores where there are no others.
    """
    plain = result.steps["plain"].median
    seconds = {kind: times.median - plain for kind, times in result.steps.items() if kind != "plain"}
    if result.case.frequency == result.case.store_every:  # no stores but after a refusal
        seconds.pop("store", None)
        seconds.pop("store after candidate", None)
    elif "store" not in seconds:
        seconds["store"] = seconds["store after candidate"]
    if result.case.frequency > 2 * result.case.store_every and "store" in seconds:
        seconds["acceleration"] = seconds["both"] - seconds["store"]
    return seconds


def floor_seconds(case: Case, bandwidth: Bandwidth) -> dict[str, float]:
    """Seconds for the counted bytes: stores at the bandwidth of a copy, accelerations at that of reading."""
    moved = moved_bytes(case)
    store = moved["store"] * case.parameters / bandwidth.copy
    acceleration = moved["acceleration"] * case.parameters / bandwidth.read
    stores_too = (moved["both"] - moved["acceleration"]) * case.parameters / bandwidth.copy
    return {"store": store, "acceleration": acceleration, "both": stores_too + acceleration}


def ratios(result: Result, bandwidth: Bandwidth) -> dict[str, float]:
    """Added time over the floor, by event."""
    seconds, floors = added(result), floor_seconds(result.case, bandwidth)
    return {event: seconds[event] / floor for event, floor in floors.items() if event in seconds}


def disagreements(report: Report) -> list[str]:
    """Cases in which the accelerator holds more or less than is counted."""
    work_area = 1e6 if report.machine["device"] == "cpu" else 1e8
    return [
        f"{name_of(r.case)}: {r.memory.held / r.case.parameters:.1f} B held, {held_bytes(r.case)} B counted"
        for r in report.results
        if not memory_agrees(r.case, r.memory, work_area)
    ]


def disturbed(report: Report) -> list[str]:
    """Cases before or after which copying was below 3/4 of its median: others were using the machine."""
    speeds = [sample.copy for sample in [*report.bandwidth_before, report.bandwidth_samples[-1]]]
    return [
        name_of(result.case)
        for result, around in zip(report.results, pairwise(speeds), strict=True)
        if min(around) < 0.75 * report.bandwidth.copy
    ]


def as_json(report: Report) -> str:
    """Everything, with what follows from it beside each result."""
    plain = asdict(replace(report, bandwidth_before=[], results=[], training=[]))
    del plain["bandwidth_before"]
    plain["results"] = [
        asdict(result)
        | {
            "added_seconds": added(result),
            "floor_seconds": floor_seconds(result.case, report.bandwidth),
            "ratio_to_floor": ratios(result, report.bandwidth),
            "moved_bytes_per_parameter": moved_bytes(result.case),
            "held_bytes_per_parameter": held_bytes(result.case),
            "bandwidth_just_before": asdict(before),
        }
        for result, before in zip(report.results, report.bandwidth_before, strict=True)
    ]
    plain["training"] = [{key: _plain(value) for key, value in row.items()} for row in report.training]
    return json.dumps(plain, indent=1)


# ---- tables --------------------------------------------------------------------------------------------------------


def tables(report: Report, brief: bool = False) -> list[Table]:
    """One table of small problems in microseconds, one of large ones in milliseconds, memory, the textbook, the GPU.

    Brief: average and coupling are varied one at a time, at the largest depth, accelerating every 2 steps.
    """
    deepest = max((result.case.depth for result in report.results), default=0)
    results = [result for result in report.results if not brief or _is_main(result.case, deepest)]
    small = [result for result in results if result.case.parameters <= SMALL]
    large = [result for result in results if result.case.parameters > SMALL]
    made = [
        _small_table(small),
        _time_table(large, report.bandwidth),
        _memory_table(large),
        _textbook_table(report),
        _gpu_table(report),
    ]
    return [table for table in made if table[2]]


def _is_main(case: Case, deepest: int) -> bool:
    changes = case.average + (case.coupling != "params")
    return not changes or (changes == 1 and case.depth == deepest and case.frequency == 2)


def _small_table(results: Sequence[Result]) -> Table:
    kinds = ("idle", "open", "store", "both")
    header = [*CASE_HEADER, "plain step", *(f"+{kind}" for kind in ("idle", "macro-step begins", "store", "both"))]
    rows = [
        [*_case_cells(r.case), _times(r.steps["plain"], 1e6), *(_number(added(r).get(kind), 1e6) for kind in kinds)]
        for r in results
    ]
    return "Small problems, 20 tensors: microseconds, added to a plain step", header, rows


def _time_table(results: Sequence[Result], bandwidth: Bandwidth) -> Table:
    events = ("store", "acceleration", "both")
    header = [
        *CASE_HEADER, "plain step", "step with both", *(f"+{event}" for event in events), "floor of both",
        *(f"{event} / floor" for event in events),
    ]  # fmt: skip
    rows = []
    for result in results:
        seconds, ratio = added(result), ratios(result, bandwidth)
        rows.append(
            [
                *_case_cells(result.case),
                _times(result.steps["plain"], 1e3),
                _times(result.steps["both"], 1e3),
                *(_number(seconds.get(event), 1e3) for event in events),
                _number(floor_seconds(result.case, bandwidth)["both"], 1e3),
                *(_number(ratio.get(event), 1) for event in events),
            ]
        )
    title = (
        "Milliseconds, median [quartiles], added to a plain step; floor: 20 + 2h bytes per parameter for a store ("
        f"after an accepted candidate 28 + 2h) at the {bandwidth.copy / 1e9:.1f} GB/s of a copy, 2mh + 12 for an "
        f"acceleration at the {bandwidth.read / 1e9:.1f} GB/s of reading, twice both with coupling full (an update in "
        f"place moves {bandwidth.update / 1e9:.1f} GB/s here)"
    )
    return title, header, rows


def _memory_table(results: Sequence[Result]) -> Table:
    """One row for cases that keep the same history; the most of any of them."""
    header = ["parameters", "depth", "history", "coupling", "counted", "held", "resident", "peak", "temporary rows"]
    same: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        case = result.case
        key: tuple[str, ...] = (
            f"{case.parameters:,}",
            str(case.depth),
            case.history,
            case.coupling,
            str(held_bytes(case)),
        )
        same.setdefault(key, []).append(result)
    rows = []
    for key, those in same.items():
        per = 1 / those[0].case.parameters
        memories = [asdict(result.memory) for result in those]
        most = {name: max((m[name] for m in memories if m[name] is not None), default=None) for name in memories[0]}
        cells = [_number(most[name], per) for name in ("held", "resident", "peak")]
        rows.append([*key, *cells, _number(most["temporary"], per / 4)])
    title = (
        "Memory the accelerator adds, bytes per parameter: counted, tensors held, growth of the process at rest and at "
        "most; largest growth within an event, in float32 rows"
    )
    return title, header, rows


def _textbook_table(report: Report) -> Table:
    rows = []
    for textbook in report.textbooks:
        ours = _beside(textbook, report.results)
        theirs, own = textbook.both.median - textbook.plain.median, added(ours)["both"] if ours else None
        per = 1 / textbook.parameters
        speed_up = "-" if own is None else f"{theirs / own:.1f}"
        peaks = [_number(textbook.peak, per), _number(ours.memory.peak if ours else None, per)]
        rows.append(
            [f"{textbook.parameters:,}", str(textbook.depth), _number(theirs, 1e3), _number(own, 1e3), speed_up]
        )
        rows[-1] += peaks
    header = ["parameters", "depth", "textbook ms", "aadl ms", "speed-up", "textbook peak B", "aadl peak B"]
    title = "Store and acceleration, added to a plain step, and peak bytes per parameter: textbook (lstsq) and aadl"
    return title, header, rows


def _beside(textbook: Textbook, results: Sequence[Result]) -> Result | None:
    """The plainest case of equal size and depth: a float32 history, at the highest frequency measured."""
    base = Case(textbook.parameters, textbook.depth)
    cases = [result for result in results if replace(result.case, frequency=base.frequency) == base]
    return min(cases, key=lambda result: result.case.frequency, default=None)


def _gpu_table(report: Report) -> Table:
    rows = [
        [name_of(result.case), *(str(result.host_waits.get(kind, "-")) for kind in ("idle", "store", "both"))]
        for result in report.results
        if result.host_waits
    ]
    rows += [
        [f"ResNet50 training, {_settings(row)}: {row['share']:+.2%} of {row['plain'] * 1e3:.1f} ms", "", "", ""]
        for row in report.training
    ]
    return "GPU: times the host waits in a step; share of a training step", ["case", "idle", "store", "both"], rows


CASE_HEADER = ["parameters", "depth", "history", "accelerates every", "average", "coupling", "other"]


def _case_cells(case: Case) -> list[str]:
    other = [f"stores every {case.store_every}"] if case.store_every > 1 else []
    other += ["no safeguard"] if not case.safeguard else []
    other += ["compiled"] if case.fused else []
    average = "always" if case.average else "off"
    return [
        f"{case.parameters:,}", str(case.depth), case.history, str(case.frequency), average, case.coupling,
        ", ".join(other) or "-",
    ]  # fmt: skip


def name_of(case: Case) -> str:
    return " ".join(f"{name} {cell}" for name, cell in zip(CASE_HEADER, _case_cells(case), strict=True) if cell != "-")


def _settings(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(row[key])}" for key in ("fused", "history_dtype") if key in row)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _number(value: float | None, factor: float) -> str:
    if value is None:
        return "-"
    scaled = value * factor
    return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def _times(times: Spread, factor: float) -> str:
    low, high = _number(times.low, factor), _number(times.high, factor)
    return f"{_number(times.median, factor)} [{low} .. {high}]"


def show(table: Table, markdown: bool) -> str:
    """A table as aligned text or in Markdown."""
    title, header, rows = table
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        return "\n".join([f"**{title}**", "", *lines, ""])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join([title, *lines, ""])


# ---- figure --------------------------------------------------------------------------------------------------------


def as_csv(table: Table) -> str:
    """The table as comma-separated values, header first; numbers with a thousands comma lose the comma."""
    _, header, rows = table
    return "".join(",".join(cell.replace(",", "") for cell in row) + "\n" for row in [header, *rows])


def draw(report: Report, path: Path) -> None:
    """Counted bytes over added time against counted bytes, under the bandwidths of copying and reading."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.5), layout="constrained")
    colors = {"store": "#009E73", "acceleration": "#D55E00", "both": "#7B3FA0"}
    for event, color in colors.items():
        for history, marker in (("float32", "o"), ("bfloat16", "^")):
            points = list(_points(report.results, event, history))
            if points:
                label = f"{'store + acceleration' if event == 'both' else event}, {history}"
                axes.scatter(
                    [x for x, _ in points], [y for _, y in points], s=18, c=color, marker=marker, alpha=0.6, label=label
                )
    points = [
        _point(moved_bytes(Case(t.parameters, t.depth))["both"] * t.parameters, t.both.median - t.plain.median)
        for t in report.textbooks
    ]
    if points:
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            s=30,
            c="#333333",
            marker="x",
            label="textbook code, store + acceleration",
        )
    for (name, speed), style in zip(asdict(report.bandwidth).items(), ("-", "--", ":"), strict=True):
        axes.axhline(speed / 1e9, color="black", linestyle=style, linewidth=1, label=f"{name} {speed / 1e9:.1f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="bytes that a store or an acceleration must move")
    axes.set(ylabel="these bytes over the time that it adds to a step (GB/s)")
    axes.set_title(
        "How close aadl comes to the speed of the memory\n(points: measured; lines: speed of copying and reading)",
        loc="left", fontsize=10,
    )  # fmt: skip
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _points(results: Sequence[Result], event: str, history: str) -> Iterator[tuple[float, float]]:
    for result in results:
        seconds = added(result).get(event, 0)
        if result.case.history == history and seconds > 0:
            yield _point(moved_bytes(result.case)[event] * result.case.parameters, seconds)


def _point(moved: int, seconds: float) -> tuple[float, float]:
    return moved, moved / seconds / 1e9
