"""The figure of what the acceleration did, for every experiment."""

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
from experiments.records.figures import as_text, finish, spread_words, training_line
from experiments.records.palette import COLORS, method_of

# Causes of rejection, in the order of their appearance.
CAUSE_COLORS = ("#C9C9C9", "#8F8F8F", "#B9A5C9", "#C9B79C", "#9DB8C9", "#5F5F5F")
CAUSES = {
    "backward": "reverses the last update",
    "loss": "raises the loss",
    "residuals": "raises the sum of squares",
    "check": "raises the sum of squares of the check",
    "rank": "nothing to extrapolate",
    "coefficients": "columns nearly dependent",
    "stopped": "the training loss has risen",
}
"""What the words of `statistics["rejected"]` stand for; the others stand for themselves."""
ACCEPTED_COLOR = "#2E7D32"
AVERAGING_COLOR = "#5B7DB1"
DEVIATION = "acceleration/relative_standard_deviation"


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
    """Three panels a variant: outcomes, relative standard deviation, averaging. Returns the legend's handles, too.

    `variants` are titles and variants; `unit` is that of the horizontal axis, the places of the records.
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
    if not known.any():
        _say(axis, "The criterion is not evaluated\n(the average is off by setting, or\ntoo few updates were stored).")
        return
    threshold = axis.axhline(threshold_of(variant), color="#B00020", linestyle=(0, (4, 2)), linewidth=1)
    handles.setdefault(f"threshold above which the average is switched on ({threshold_of(variant):g})", threshold)
    color = COLORS[method_of(variant)]
    own = stacked[:, known]
    axis.plot(places[known], np.nanmedian(own, axis=0), color=color, linewidth=1.2)
    axis.fill_between(
        places[known], np.nanmin(own, axis=0), np.nanmax(own, axis=0), color=color, alpha=0.15, linewidth=0
    )


def threshold_of(variant: Variant) -> float:
    """`average_tolerance` of a variant: its setting, or the default of its method."""
    for stage in (variant.definition, variant.definition.get("then") or {}):
        settings = stage.get("acceleration") or stage.get("published") or {}
        if "average_tolerance" in settings:
            return float(settings["average_tolerance"])
    return float(inspect.signature(aadl.accelerate).parameters["average_tolerance"].default)


def _say(axis: Axes, sentence: str) -> None:
    axis.text(0.5, 0.5, sentence, transform=axis.transAxes, ha="center", va="center", fontsize=8, color="#666666")


def _places(variant: Variant) -> np.ndarray:
    return max((run.places for run in variant.runs.values()), key=len)


def _causes(variant: Variant) -> dict[str, str]:
    """Causes of rejection that occurred, in words, with their series."""
    names = sorted({name for run in variant.runs.values() for name in run.series if "/rejected_" in name})
    causes = {name: name.rpartition("rejected_")[2] for name in names}
    words = {name: f"rejected: {CAUSES.get(cause, cause.replace('_', ' '))}" for name, cause in causes.items()}
    words["acceleration/reverted"] = "accepted, later taken back"
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
