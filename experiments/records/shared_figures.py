"""Two figures that several experiments share: what the acceleration did, and oscillations against the batch size."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import aadl
from experiments.records.compare import Comparison, Variant
from experiments.records.figures import as_text, finish, spread_over_seeds, spread_words, training_line
from experiments.records.palette import COLORS, method_of
from experiments.records.reading import Run

# Causes of rejection, in the order of their appearance.
CAUSE_COLORS = ("#C9C9C9", "#8F8F8F", "#B9A5C9", "#C9B79C", "#9DB8C9", "#5F5F5F")
ACCEPTED_COLOR = "#2E7D32"
AVERAGING_COLOR = "#5B7DB1"
DEVIATION = "acceleration/relative_standard_deviation"
EARLY, LATE = (0.0, 0.25), (0.75, 1.0)
"""Parts of a training that the figure of the batch sizes compares."""


# ---- batch size ------------------------------------------------------------------------------------------------------


def draw_batch_size(comparison: Comparison) -> Figure | None:
    """Relative standard deviation of consecutive updates against the batch size, with the slope of each segment."""
    runs = comparison.studies.get("batch_size", [])
    if len({run.config["training"]["batch_size"] for run in runs}) < 3:  # fewer show no course
        return None
    figure, axis = plt.subplots(figsize=(8.0, 5.2))
    steps = max(int(run.attributes["num_steps"]) for run in runs)
    for part, color, marker, name, side in (
        (EARLY, "#333333", "o", "first quarter", -15),
        (LATE, "#7B3FA0", "s", "last quarter", 9),
    ):
        sizes, values = oscillation_by_batch_size(runs, *part)
        low, middle, high = spread_over_seeds(values.T)
        axis.errorbar(sizes, middle, yerr=[middle - low, high - middle], color=color, marker=marker, capsize=3,
                      label=f"{name} of {steps} steps")  # fmt: skip
        for place, slope in zip(np.sqrt(sizes[:-1] * sizes[1:]), slopes(sizes, middle), strict=True):
            height = float(np.exp(np.interp(np.log(place), np.log(sizes), np.log(middle))))
            axis.annotate(f"{slope:+.2f}", (place, height), (0, side), textcoords="offset points", ha="center",
                          color=color, fontsize=8)  # fmt: skip
    sizes, values = oscillation_by_batch_size(runs, *EARLY)
    reference = 0.55 * np.median(values[0]) * (sizes / sizes[0]) ** -0.5
    axis.plot(
        sizes, reference, color="#999999", linestyle=(0, (4, 2)), label="slope -1/2 (independent rows, no momentum)"
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xlabel("batch size" + " (the largest one is the whole training set)" * _takes_all(runs, sizes[-1]))
    axis.set_ylabel("relative standard deviation\nof consecutive updates")
    axis.legend(loc="best")
    seeds = {int(run.attributes["seed"]) for run in runs}
    note = f"Marks: median of {len(seeds)} seeds, bars: minimum to maximum; numbers: slope between two neighbors"
    finish(figure, comparison, "Oscillations against the batch size", {}, seeds, note)
    return figure


def _takes_all(runs: Sequence[Run], size: int) -> bool:
    """Whether an epoch with this batch size has one step."""
    own = next(run for run in runs if run.config["training"]["batch_size"] == size)
    return int(own.attributes["num_steps"]) == int(own.config["training"]["epochs"])


def oscillation_by_batch_size(runs: list[Run], first: float, last: float) -> tuple[np.ndarray, np.ndarray]:
    """Median over a part of the training of the relative standard deviation of consecutive updates.

    Args:
        runs: of the batch-size study.
        first: start of the part, as a share of the epochs in [0, 1).
        last: its end, in (first, 1].

    Returns:
        Batch sizes, ascending, and values (num_sizes, num_seeds).
    """
    groups: dict[int, list[float]] = {}
    for run in runs:
        values = run.series["updates/relative_standard_deviation"][1:]
        start = int(first * len(values))
        part = values[start : max(int(last * len(values)), start + 1)]
        groups.setdefault(run.config["training"]["batch_size"], []).append(float(np.nanmedian(part)))
    sizes = sorted(groups)
    num_seeds = min(len(values) for values in groups.values())
    return np.array(sizes), np.array([groups[size][:num_seeds] for size in sizes])


def slopes(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Slope of log(values) over log(sizes) between each size and the next."""
    result: np.ndarray = np.diff(np.log(values)) / np.diff(np.log(sizes))
    return result


# ---- acceleration ----------------------------------------------------------------------------------------------------


def draw_acceleration(comparison: Comparison) -> Figure | None:
    """What the acceleration did: outcomes of the attempts, oscillations, and averaging."""
    variants = [
        (f"{fill(variant.label, 34)}\n{fill(family, 34)}", variant)
        for family, group in comparison.families.items()
        for variant in group
        if variant.role.startswith("aadl")
    ][:4]
    if not variants:
        return None
    figure, handles = acceleration_panels(variants, "epoch")
    note = f"{training_line(comparison)}; {spread_words(len(comparison.seeds))}"
    finish(figure, comparison, "What the acceleration did", handles, note=note)
    return figure


def acceleration_panels(variants: Sequence[tuple[str, Variant]], unit: str) -> tuple[Figure, dict[str, Any]]:
    """Three panels a variant, one quantity each: outcomes, relative standard deviation, averaging.

    Args:
        variants: titles and variants.
        unit: of the horizontal axis, the places of the records.

    Returns:
        The figure and the handles of its legend.
    """
    causes = list(dict.fromkeys(cause for _, variant in variants for cause in _causes(variant)))
    colors = {cause: CAUSE_COLORS[position % len(CAUSE_COLORS)] for position, cause in enumerate(causes)}
    size = (max(7.0, 1.0 + 2.8 * len(variants)), 7.6)
    figure, grid = plt.subplots(
        3, len(variants), figsize=size, squeeze=False, sharex=True, sharey="row", height_ratios=(1.3, 1.3, 0.7)
    )
    handles: dict[str, Any] = {}
    for (title, variant), (upper, middle, lower) in zip(variants, grid.T, strict=True):
        counted = _outcomes(upper, variant, colors, handles)
        upper.set_title(as_text(f"{title}\n{counted}"), loc="left", fontsize=8.5)
        _deviation(middle, variant, handles)
        places = _places(variant)
        lower.fill_between(
            places, 0, 100 * _mean(variant, "acceleration/averaging"), color=AVERAGING_COLOR, alpha=0.5, step="post"
        )
        if not _mean(variant, "acceleration/averaging").any():
            _say(lower, "The average is never on.")
        lower.set_xlabel(unit)
    grid[0, 0].set_ylim(0, 100)
    grid[0, 0].set_ylabel("attempts so far (%)")
    grid[1, 0].set_ylim(bottom=0)
    grid[1, 0].set_ylabel("relative standard deviation\nbetween updates")
    grid[2, 0].set_ylim(0, 105)
    grid[2, 0].set_ylabel("seeds that\naverage (%)")
    return figure, handles


def _outcomes(axis: Axes, variant: Variant, colors: dict[str, str], handles: dict[str, Any]) -> str:
    """Shares of the attempts so far by outcome, stacked; returns the numbers at the end, in words."""
    places = _places(variant)
    accepted = _mean(variant, "acceleration/accepted") - _mean(variant, "acceleration/reverted")
    counts = [("accepted", ACCEPTED_COLOR, accepted)]
    counts += [(cause, colors[cause], _mean(variant, series)) for cause, series in _causes(variant).items()]
    total = np.sum([values for _, _, values in counts], axis=0)
    known = total > 0
    if not known.any():
        _say(axis, "No attempt was made.")
    bottom = np.zeros(len(places))
    for label, color, values in counts:
        share = np.divide(100 * values, total, out=np.zeros(len(places)), where=known)
        area = axis.fill_between(places, bottom, bottom + share, where=known, color=color, linewidth=0)
        handles.setdefault(label, area)
        bottom = bottom + share
    return f"{accepted[-1]:.3g} of {total[-1]:.3g} attempts accepted (mean)"


def _deviation(axis: Axes, variant: Variant, handles: dict[str, Any]) -> None:
    """The relative standard deviation over the seeds, under the threshold of the criterion."""
    places = _places(variant)
    stacked = np.full((len(variant.runs), len(places)), np.nan)
    for row, run in zip(stacked, variant.runs.values(), strict=True):
        values = run.series.get(DEVIATION, np.empty(0))
        row[: len(values)] = values
    known = np.isfinite(stacked).any(axis=0)
    threshold = axis.axhline(threshold_of(variant), color="#B00020", linestyle=(0, (4, 2)), linewidth=1)
    handles.setdefault(f"threshold above which the average is switched on ({threshold_of(variant):g})", threshold)
    if not known.any():
        _say(axis, "The criterion is not evaluated\n(the average is off by setting, or\ntoo few updates were stored).")
        return
    color = COLORS[method_of(variant)]
    own = stacked[:, known]
    axis.plot(places[known], np.nanmedian(own, axis=0), color=color, linewidth=1.2)
    axis.fill_between(
        places[known], np.nanmin(own, axis=0), np.nanmax(own, axis=0), color=color, alpha=0.15, linewidth=0
    )


def threshold_of(variant: Variant) -> float:
    """`average_tolerance` of a variant: its setting, or the default of its method."""
    definition = next(iter(variant.runs.values())).config["variant"]
    for stage in (definition, definition.get("then") or {}):
        settings = stage.get("acceleration") or stage.get("published") or {}
        if "average_tolerance" in settings:
            return float(settings["average_tolerance"])
    return float(inspect.signature(aadl.accelerate).parameters["average_tolerance"].default)


def _say(axis: Axes, sentence: str) -> None:
    """A sentence in an empty panel."""
    axis.text(0.5, 0.5, sentence, transform=axis.transAxes, ha="center", va="center", fontsize=8, color="#666666")


def _places(variant: Variant) -> np.ndarray:
    """The places of the longest run."""
    return max((run.places for run in variant.runs.values()), key=len)


def _causes(variant: Variant) -> dict[str, str]:
    """Causes of rejection that occurred, in words, with their series."""
    names = sorted({name for run in variant.runs.values() for name in run.series if "/rejected_" in name})
    words = {name: "rejected: " + name.rpartition("rejected_")[2].replace("_", " ") for name in names}
    words["acceleration/reverted"] = "accepted, later reverted"
    return {cause: name for name, cause in words.items() if _mean(variant, name)[-1] > 0}


def _mean(variant: Variant, name: str) -> np.ndarray:
    """Mean over the seeds of a counter or a flag; a run without it counts 0, a diverged one keeps its last count."""
    length = max(len(run.places) for run in variant.runs.values())
    stacked = np.zeros((len(variant.runs), length))
    for row, run in zip(stacked, variant.runs.values(), strict=True):
        values = run.series.get(name, np.zeros(length))
        row[: len(values)] = np.where(np.isfinite(values), values, 0.0)
        if name != "acceleration/averaging":
            np.maximum.accumulate(row, out=row)
    mean: np.ndarray = stacked.mean(axis=0)
    return mean
