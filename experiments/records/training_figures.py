"""Figures of a training by epochs with a training and a validation loss, drawn from HDF5 records alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.records.acceleration_figure import draw_acceleration
from experiments.records.compare import TRAIN, VALIDATION, Comparison, Variant, plain_of, role_of
from experiments.records.figures import (
    Coinciding,
    as_text,
    finish,
    legend_line,
    save_figures,
    spread_over_seeds,
    spread_words,
    training_line,
)
from experiments.records.palette import COLORS, styled
from experiments.records.reading import Run

EARLY, LATE = (0.0, 0.25), (0.75, 1.0)
"""Parts of a training that the figure of the batch sizes compares."""
LABELS = {"plain": "plain optimizer", "ema": "EMA of the weights", "aadl": "aadl, defaults"}


def draw_training_figures(comparison: Comparison, loss_name: str = "loss") -> list[Path]:
    """Draws every figure that the records allow into `figures/` beside them, returns the paths."""
    drawings: list[tuple[str, Callable[[], Figure | None]]] = [
        ("loss.png", partial(draw_loss, comparison, loss_name)),
        ("published_scheme.png", partial(draw_published_scheme, comparison, loss_name)),
        ("batch_size.png", partial(draw_batch_size, comparison)),
        ("acceleration.png", partial(draw_acceleration, comparison)),
        ("learning_rate.png", partial(draw_learning_rate, comparison, loss_name)),
    ]
    return save_figures(comparison.folder / "figures", drawings)


def draw_loss(comparison: Comparison, loss_name: str) -> Figure | None:
    """Training and validation loss against the epoch: one column a base optimizer."""
    families = {
        family: [variant for variant in variants if variant.role.split()[-1] not in ("average", "safeguard")]
        for family, variants in comparison.families.items()
    }
    families = {family: variants for family, variants in families.items() if variants}
    if not families:
        return None
    return _loss_figure(comparison, families, loss_name, "Loss against the epoch", transposed=len(families) == 1)


def draw_published_scheme(comparison: Comparison, loss_name: str) -> Figure | None:
    """The published scheme with and without average and safeguard, between plain and aadl at the same settings."""
    families = {
        family: [variant for variant in variants if variant.role not in ("ema", "aadl")]
        for family, variants in comparison.families.items()
        if any(variant.role.startswith("published") for variant in variants)
    }
    if not families:
        return None
    return _loss_figure(comparison, families, loss_name, "The published scheme", transposed=True)


def _loss_figure(
    comparison: Comparison, families: dict[str, list[Variant]], loss_name: str, title: str, *, transposed: bool
) -> Figure:
    """Two panels a family: training and validation loss, below each other or, `transposed`, beside each other."""
    count = len(families)
    shape = (count, 2) if transposed else (2, count)
    size = (9.5, 1.8 + 3.0 * count) if transposed else (max(6.5, 1.0 + 3.3 * count), 7.0)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    notes = []
    for column, (family, variants) in enumerate(families.items()):
        axes = grid[column] if transposed else grid[:, column]
        for axis, series, name in zip(axes, (TRAIN, VALIDATION), ("training", "validation"), strict=True):
            coinciding = Coinciding()
            for variant, color, style in styled(variants):
                low, middle, high = spread_over_seeds(variant.series(series))
                epochs = np.arange(len(middle))
                handles.setdefault(LABELS.get(variant.role, variant.label), legend_line(color, style))
                axis.plot(epochs, middle, color=color, linestyle=coinciding.style(variant.label, middle, style))
                axis.fill_between(epochs, low, high, color=color, alpha=0.13, linewidth=0)
            axis.set_yscale("log")
            axis.set_ylabel(f"{name} {loss_name}")
            if transposed or axis is axes[0]:
                axis.set_title(as_text(family), loc="left")
            _limit(axis, np.median((plain_of(variants) or variants[0]).series(series), axis=0))
        notes.append(coinciding.note)
        axes[-1].set_xlabel("epoch")
        axes[0].set_xlabel("epoch" if transposed else "")
    note = f"{training_line(comparison)}; {spread_words(len(comparison.seeds))}"
    finish(figure, comparison, title, handles, note="\n".join([note, *dict.fromkeys(filter(None, notes))]))
    return figure


def _limit(axis: Axes, plain: np.ndarray) -> None:
    """Ends the axis a little above the plain loss after 8 % of the epochs: the first fall would press the rest flat."""
    top = 3.0 * plain[max(1, len(plain) // 12)]
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    low = min(float(curve[np.isfinite(curve)].min(initial=np.inf)) for curve in curves)
    if 0 < low < top < np.inf:
        axis.set_ylim(low * 0.85, top)


def draw_learning_rate(comparison: Comparison, loss_name: str) -> Figure | None:
    """Loss at the end of training against the learning rate; where a seed diverged, a cross at the top."""
    runs = comparison.studies.get("learning_rate", [])
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        definition = run.config["variant"]
        by_rate = groups.setdefault(role_of(definition), {})
        by_rate.setdefault(definition["optimizer"]["arguments"]["lr"], []).append(run)
    if not groups:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4))
    epochs = runs[0].config["training"]["epochs"]
    handles: dict[str, Any] = {}
    for axis, series, name in zip(axes, (TRAIN, VALIDATION), ("training", "validation"), strict=True):
        for role in sorted(groups, key=list(COLORS).index):
            rates = np.array(sorted(groups[role]))
            finals = [np.array([run.series[series][-1] for run in groups[role][rate]]) for rate in rates]
            bad = np.array([not np.isfinite(values).all() for values in finals])
            spread = np.array([(values.min(), np.median(values), values.max()) for values in finals])
            spread[bad] = np.nan
            color = COLORS[role]
            (line,) = axis.plot(rates, spread[:, 1], color=color, marker="o", markersize=4)
            handles[LABELS.get(role, role)] = line
            axis.fill_between(rates, spread[:, 0], spread[:, 2], color=color, alpha=0.15, linewidth=0)
            if bad.any():
                top = axis.get_xaxis_transform()
                axis.plot(rates[bad], np.ones(bad.sum()), "x", color=color, transform=top, clip_on=False)
                axis.annotate("diverged", (rates[bad][0], 1.0), (-6, 0), xycoords=top, textcoords="offset points",
                              fontsize=8, color=color, ha="right", va="bottom")  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylabel(f"{name} {loss_name} after {epochs} epochs")
    seeds = {int(run.attributes["seed"]) for run in runs}
    optimizer = runs[0].config["variant"]["optimizer"]
    kind = "Nesterov " * bool(optimizer["arguments"].get("nesterov")) + optimizer["name"]
    batch = runs[0].config["training"]["batch_size"]
    note = f"{kind}, batches of {batch}, {epochs} epochs; {spread_words(len(seeds))}; crosses: a seed diverged"
    finish(figure, comparison, "Loss at the end against the learning rate", handles, seeds, note)
    return figure


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
            beside = math.copysign(22, side) if slope < -1.5 else 0  # a steep line would go through the number
            axis.annotate(f"{slope:+.2f}", (place, height), (beside, side), textcoords="offset points", ha="center",
                          color=color, fontsize=8)  # fmt: skip
    sizes, values = oscillation_by_batch_size(runs, *EARLY)
    reference = 0.55 * np.median(values[0]) * (sizes / sizes[0]) ** -0.5
    axis.plot(
        sizes, reference, color="#999999", linestyle=(0, (4, 2)), label="slope -1/2 (independent rows, no momentum)"
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    largest = next(run for run in runs if run.config["training"]["batch_size"] == sizes[-1])
    is_whole = int(largest.attributes["num_steps"]) == int(largest.config["training"]["epochs"])
    axis.set_xlabel("batch size" + " (the largest one is the whole training set)" * is_whole)
    axis.set_ylabel("relative standard deviation\nof consecutive updates")
    axis.legend(loc="best")
    seeds = {int(run.attributes["seed"]) for run in runs}
    note = f"Marks: median of {len(seeds)} seeds, bars: minimum to maximum; numbers: slope between two neighbors"
    finish(figure, comparison, "Oscillations against the batch size", {}, seeds, note)
    return figure


def oscillation_by_batch_size(runs: list[Run], first: float, last: float) -> tuple[np.ndarray, np.ndarray]:
    """Batch sizes, ascending, and values (num_sizes, num_seeds) of runs of the batch-size study.

    A value is the median, over the part of the epochs from the share `first` to the share `last`, of the relative
    standard deviation of consecutive updates.
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
