"""Figures of image classification, drawn from HDF5 records alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.images.tables import STALE_TOP1, TOP1, cost_shares, images_per_second, total_seconds
from experiments.records.acceleration_figure import draw_acceleration
from experiments.records.compare import VALIDATION, Comparison, Variant
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
from experiments.records.palette import styled
from experiments.records.training_figures import draw_batch_size

COLORS = {"network": "#BBBBBB", "acceleration": "#D55E00", "input": "#8FB3CC", "evaluation": "#5F5F5F"}
"""Of the parts of the time."""


def draw_image_figures(comparison: Comparison) -> list[Path]:
    """Draws every figure that the records allow into `figures/` beside them, returns the paths."""
    drawings: dict[str, Callable[[Comparison], Figure | None]] = {
        "validation.png": draw_validation,
        "cost.png": draw_cost,
        "statistics.png": draw_statistics,
        "acceleration.png": draw_acceleration,
        "batch_size.png": draw_batch_size,
    }
    comparison = replace(comparison, trained=_trained(comparison))
    return save_figures(
        comparison.folder / "figures", [(name, partial(draw, comparison)) for name, draw in drawings.items()]
    )


def _trained(comparison: Comparison) -> str:
    """ "ResNet18 on fractals (320 images, 10 classes)"."""
    about = comparison.variants[0].first.attributes
    model = str(about["classification"]).replace("resnet", "ResNet")
    data = {"fractals": "fractals"}.get(comparison.data_source, f"ImageNet ({comparison.data_source})")
    return f"{model} on {data}, {about['num_train_images']:,} images of {about['num_classes']:,} classes"


def draw_validation(comparison: Comparison) -> Figure:
    """Validation loss and top-1 accuracy against the epoch and against seconds, evaluation included."""
    figure, grid = plt.subplots(2, 2, figsize=(9.5, 6.8), sharey="row")
    handles: dict[str, Any] = {}
    coinciding = Coinciding()
    for variant, color, style in styled(comparison.variants):
        epochs = _evaluated(variant)
        label = _label(comparison, variant)
        dashed = coinciding.style(label, np.median(variant.series(VALIDATION), axis=0), style)
        handles[label] = legend_line(color, style)
        seconds = np.median([total_seconds(run) for run in variant.runs.values()], axis=0)
        for row, series, factor in zip(grid, (VALIDATION, TOP1), (1.0, 100.0), strict=True):
            low, middle, high = (factor * values[epochs] for values in spread_over_seeds(variant.series(series)))
            for axis, places, drawn in zip(row, (epochs, seconds[epochs]), (dashed, style), strict=True):
                axis.plot(places, middle, color=color, linestyle=drawn)
                axis.fill_between(places, low, high, color=color, alpha=0.13, linewidth=0)
    for axis, name in zip(grid[:, 0], ("validation loss", "validation top-1 (%)"), strict=True):
        axis.set_ylabel(name)
    for axis, name in zip(grid[1], ("epoch", "seconds, evaluation included (median)"), strict=True):
        axis.set_xlabel(name)
    _limit(grid[0, 0], comparison)
    note = f"{_note(comparison)}; statistics of BatchNorm are computed again before each validation"
    finish(figure, comparison, "Validation loss and accuracy", handles, note=f"{note}\n{coinciding.note}")
    return figure


def _limit(axis: Axes, comparison: Comparison) -> None:
    """Ends the loss axis a little above the highest loss after the first evaluation, but for runs that blew up."""
    starts = [
        float(np.median(variant.series(VALIDATION)[:, epochs[1:]], axis=0).max())
        for variant in comparison.variants
        if len(epochs := _evaluated(variant)) > 1
    ]
    finite = [start for start in starts if np.isfinite(start)]
    if finite:
        axis.set_ylim(top=1.1 * min(max(finite), 3 * min(finite)))


def draw_cost(comparison: Comparison) -> Figure:
    variants = comparison.variants
    labels = [as_text(_label(comparison, variant)) for variant in variants]
    places = np.arange(len(variants))
    size = (9.5, 1.6 + 0.42 * len(variants))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, gridspec_kw={"width_ratios": [1, 1.4]})
    rates = [np.array([images_per_second(run) for run in variant.runs.values()]) for variant in variants]
    middle = np.array([np.median(rate) for rate in rates])
    errors = [middle - [rate.min() for rate in rates], [rate.max() for rate in rates] - middle]
    left.barh(places, middle, xerr=errors, color="#888888", height=0.6, ecolor="#333333", capsize=2)
    left.set_yticks(places, labels)
    left.invert_yaxis()
    left.set_xlabel("images per second of training,\nmedian over the epochs")
    start = np.zeros(len(variants))
    handles: dict[str, Any] = {}
    shares = [cost_shares(variant) for variant in variants]
    for part, color in COLORS.items():
        widths = np.array([100 * float(np.median(share[part])) for share in shares])
        handles[part] = right.barh(places, widths, left=start, color=color, height=0.6)
        start = start + widths
    right.set_xlabel("share of the time of the run,\nevaluation included (%, median)")
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
    note = f"{training_line(comparison)}; bars: minimum to maximum of {len(comparison.seeds)} seeds"
    finish(figure, comparison, "Speed and where the time goes", handles, note=note)
    return figure


def draw_statistics(comparison: Comparison) -> Figure | None:
    """What new statistics of BatchNorm add to the top-1 accuracy with those that the training left."""
    figure, axis = plt.subplots(figsize=(8.0, 5.0))
    handles: dict[str, Any] = {}
    coinciding = Coinciding()
    for variant, color, style in styled(comparison.variants):
        if not variant.role.startswith(("plain", "ema", "mean", "aadl")):
            continue
        epochs = _evaluated(variant)[1:]
        difference = 100 * (variant.series(TOP1)[:, epochs] - variant.series(STALE_TOP1)[:, epochs])
        if not np.isfinite(difference).all():
            continue
        low, middle, high = spread_over_seeds(difference)
        label = _label(comparison, variant)
        handles[label] = legend_line(color, style)
        axis.plot(epochs, middle, color=color, linestyle=coinciding.style(label, middle, style))
        axis.fill_between(epochs, low, high, color=color, alpha=0.13, linewidth=0)
    if not handles:
        plt.close(figure)
        return None
    axis.axhline(0, color="#666666", linewidth=0.8)
    axis.set_xlabel("epoch")
    axis.set_ylabel("gain of top-1 by new statistics\n(percentage points)")
    note = f"{_note(comparison)}\n{coinciding.note}"
    finish(figure, comparison, "What stale statistics of BatchNorm cost", handles, note=note)
    return figure


def _label(comparison: Comparison, variant: Variant) -> str:
    """The label; with the optimizer in words where several variants have the same one."""
    is_unique = [other.label for other in comparison.variants].count(variant.label) == 1
    return variant.label if is_unique else f"{variant.label} ({variant.family})"


def _evaluated(variant: Variant) -> np.ndarray:
    stacked = np.stack([run.series[VALIDATION] for run in variant.runs.values()])
    return np.flatnonzero(np.isfinite(stacked).any(axis=0))


def _note(comparison: Comparison) -> str:
    return f"{training_line(comparison)}; {spread_words(len(comparison.seeds))}"
