"""What groups of runs end with: medians over the runs with bootstrap intervals, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatch
from typing import Any

import numpy as np

from experiments.records.reading import Run
from experiments.settings.suggestion import did_you_mean

LEVEL = 0.95
NUM_RESAMPLES = 10_000
GROUPS = ("variant", "label", "optimizer", "study", "seed", "data_source", "git_commit", "world_size")
"""Groups by name; any other group is a setting, as `training.batch_size` or `variant.optimizer.arguments.lr`."""
DEFAULT_METRICS = (
    "metrics/train/loss",
    "metrics/validation/loss",
    "metrics/validation/top1",
    "metrics/validation/relative_l2_*",
    "timing/training_seconds",
)


@dataclass(frozen=True)
class Interval:
    """The last values of one metric over the runs of a group.

    `group` has the values that the runs have in common, as texts. A diverged run counts as infinitely bad. `low` and
    `high` are the ends of the bootstrap interval of the median, NaN for a single run.
    """

    experiment: str
    scale: str
    group: tuple[str, ...]
    metric: str
    num_runs: int
    median: float
    low: float
    high: float
    minimum: float
    maximum: float


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of (num_runs,) values at the level 0.95, the same at every call.

    The ends are medians of resamples, never values between two of them, so that infinite values are allowed; they are
    NaN for a single value, which says nothing of the spread.

    Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(values) < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(0)
    medians = np.median(np.sort(values)[generator.integers(len(values), size=(NUM_RESAMPLES, len(values)))], axis=1)
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(medians, (tail, 1.0 - tail), method="inverted_cdf")
    return float(low), float(high)


def intervals_of(
    runs: Iterable[Run], group_by: Sequence[str] = ("variant",), metrics: Sequence[str] = DEFAULT_METRICS
) -> list[Interval]:
    """The intervals of all metrics by experiment, scale and group, in the order in which the runs come.

    `group_by` names `GROUPS`, or settings with dots; in the names of the metrics `*` stands for any letters. ValueError
    where no run has one of the groups, or any of the metrics.
    """
    runs = list(runs)
    groups: dict[tuple[str, str, tuple[str, ...]], list[Run]] = {}
    for name in group_by:
        _check_group(name, runs)
    for run in runs:
        place = run.attributes["experiment"], run.attributes["scale"], tuple(value_of(run, name) for name in group_by)
        groups.setdefault(place, []).append(run)
    found = [
        _interval(*place, metric, own)
        for place, own in groups.items()
        for metric in dict.fromkeys(name for run in own for name in run.series)
        if any(fnmatch(metric, wanted) for wanted in metrics)
    ]
    if not found:
        series = sorted({name for run in runs for name in run.series})
        raise ValueError(f"--metric must be one of {', '.join(series)}, got {', '.join(metrics)}")
    return found


def _interval(experiment: str, scale: str, group: tuple[str, ...], metric: str, runs: Sequence[Run]) -> Interval:
    worst = -np.inf if "top1" in metric or "top5" in metric else np.inf
    own = [run for run in runs if metric in run.series and len(run.series[metric])]
    last = np.array([float(run.series[metric][-1]) for run in own])
    values = np.where(np.isfinite(last), last, worst)
    low, high = bootstrap_interval(values)
    median, smallest, largest = float(np.median(values)), float(values.min()), float(values.max())
    return Interval(experiment, scale, group, metric, len(own), median, low, high, smallest, largest)


def _check_group(name: str, runs: Sequence[Run]) -> None:
    if name in GROUPS or any(_setting(run.config, name) is not None for run in runs):
        return
    known = sorted({key for run in runs for key in _names(run.config)})
    raise ValueError(
        f"--group-by must be one of {', '.join(GROUPS)}, or a setting of the records as training.epochs, got {name!r}"
        f"{did_you_mean(name, [*GROUPS, *known])}"
    )


def value_of(run: Run, name: str) -> str:
    """The value of a group as text; "" where a run has none."""
    value = run.attributes.get(name) if name in GROUPS else None
    if name == "optimizer":
        value = run.config["variant"]["optimizer"]["name"]
    if value is None:
        value = _setting(run.config, name)
    return "" if value is None else str(value)


def _setting(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _names(config: Mapping[str, Any], above: str = "") -> Iterable[str]:
    for key, value in config.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{above}{key}.")


def as_csv(intervals: Iterable[Interval], group_by: Sequence[str]) -> str:
    """One line a group and metric, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Interval)]
    writer.writerow([*names[:2], *group_by, *names[3:]])
    for entry in intervals:
        experiment, scale, group, *rest = astuple(entry)
        writer.writerow([experiment, scale, *group, *rest])
    return text.getvalue()


def tables_of(
    intervals: Iterable[Interval], cell: Callable[[Interval], str]
) -> dict[tuple[str, str], tuple[list[str], list[list[str]]]]:
    """For each experiment and scale, the names of the metrics and rows of groups, with the text of each cell."""
    tables: dict[tuple[str, str], tuple[list[str], list[list[str]]]] = {}
    by_place: dict[tuple[str, str], list[Interval]] = {}
    for entry in intervals:
        by_place.setdefault((entry.experiment, entry.scale), []).append(entry)
    for place, own in by_place.items():
        metrics = list(dict.fromkeys(entry.metric for entry in own))
        cells = {(entry.group, entry.metric): cell(entry) for entry in own}
        groups = dict.fromkeys(entry.group for entry in own)
        rows = [[*group, *(cells.get((group, metric), "") for metric in metrics)] for group in groups]
        tables[place] = metrics, rows
    return tables


def as_text(entry: Interval) -> str:
    """ "median [low, high]" with three digits."""
    interval = "" if np.isnan(entry.low) else f" [{entry.low:.3g}, {entry.high:.3g}]"
    return f"{entry.median:.3g}{interval}"


def as_latex(intervals: Sequence[Interval], group_by: Sequence[str]) -> str:
    r"""A table for each experiment and scale, of the package booktabs; \input takes the file."""
    lines = []
    for (experiment, scale), (metrics, rows) in tables_of(intervals, _latex_cell).items():
        own = [entry.num_runs for entry in intervals if (entry.experiment, entry.scale) == (experiment, scale)]
        runs = str(own[0]) if len(set(own)) == 1 else f"{min(own)} to {max(own)}"
        lines += [
            f"% {experiment}, {scale}: median at the end over {runs} runs [bootstrap interval at the level {LEVEL:g}]",
            rf"\begin{{tabular}}{{{'l' * (len(group_by) + len(metrics))}}}",
            r"\toprule",
            " & ".join(_escaped(name) for name in [*group_by, *map(short_name, metrics)]) + r" \\",
            r"\midrule",
            *(" & ".join([*map(_escaped, row[: len(group_by)]), *row[len(group_by) :]]) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    return "\n".join(lines)


def short_name(metric: str) -> str:
    """A metric as people say it: "validation loss"."""
    return metric.removeprefix("metrics/").removeprefix("timing/").replace("/", " ").replace("_", " ")


def _latex_cell(entry: Interval) -> str:
    if np.isnan(entry.low):
        return _latex_number(entry.median)
    return f"{_latex_number(entry.median)} [{_latex_number(entry.low)}, {_latex_number(entry.high)}]"


def _latex_number(value: float) -> str:
    if not np.isfinite(value):
        return r"$\infty$" if value > 0 else r"$-\infty$"
    digits, _, exponent = f"{value:.3g}".partition("e")
    return rf"${digits} \times 10^{{{int(exponent)}}}$" if exponent else f"${digits}$"


_ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: str) -> str:
    return re.sub(r"[\\~^&%$#_{}]", lambda found: _ESCAPES.get(found[0], "\\" + found[0]), text)
