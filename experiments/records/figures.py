"""Figures, drawn from HDF5 records alone."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_loaders.files import replacing
from experiments.records.compare import TRAIN, VALIDATION, Comparison, Records, Variant, plain_of, role_of
from experiments.records.reading import Run

# One color a role in all figures, told apart with every kind of color blindness (Okabe and Ito), plus a line style.
STYLES: dict[str, tuple[str, Any]] = {
    "plain": ("#333333", "-"),
    "ema": ("#56B4E9", "-"),
    "mean": ("#CC79A7", "-"),
    "aadl": ("#D55E00", "-"),
    "aadl settings": ("#E69F00", "-"),
    "published": ("#0072B2", "-"),
    "published average": ("#0072B2", (0, (4, 2))),
    "published safeguard": ("#009E73", "-"),
    "published average safeguard": ("#009E73", (0, (4, 2))),
}
LABELS = {"plain": "plain", "ema": "EMA of the weights", "aadl": "accelerated (aadl defaults)"}
# Causes of rejection, in the order of their appearance.
CAUSE_COLORS = ("#CC79A7", "#E69F00", "#F0E442", "#56B4E9", "#009E73", "#999999")
REPEATED = ("-", (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))  # styles of several variants with one role

DEVIATION = "acceleration/relative_standard_deviation"

RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}


def draw_figures(comparison: Comparison) -> list[Path]:
    """Draws every figure that the records allow into `figures/` beside them, returns the paths."""
    folder = comparison.folder / "figures"
    drawings: dict[str, Callable[[Comparison], Figure | None]] = {
        "loss.png": draw_loss,
        "published_scheme.png": draw_published_scheme,
        "batch_size.png": draw_batch_size,
        "acceleration.png": draw_acceleration,
        "learning_rate.png": draw_learning_rate,
    }
    return save_figures(folder, [(name, partial(draw, comparison)) for name, draw in drawings.items()])


def save_figures(folder: Path, drawings: Sequence[tuple[str, Callable[[], Figure | None]]]) -> list[Path]:
    """Writes what is drawn by file name, returns the paths; what gives no figure is left out.

    Where the folder cannot be written, as in the results of a colleague, `figures/<experiment>/<scale>` below the
    current folder takes its place, and a line on stderr says so.

    Raises:
        ValueError: two figures have the same name: one would overwrite the other.
    """
    twice = sorted(name for name, count in Counter(name for name, _ in drawings).items() if count > 1)
    if twice:
        raise ValueError(f"two figures would have the same name in {folder}: {', '.join(twice)}")
    folder = _writable(folder)
    paths = []
    with plt.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # it is drawn as a box
        for name, draw in drawings:
            figure = draw()
            if figure is not None:
                with replacing(folder / name, sync=False) as temporary:
                    figure.savefig(temporary, format=Path(name).suffix[1:], metadata={"Software": None})
                plt.close(figure)
                paths.append(folder / name)
    return paths


def _writable(folder: Path) -> Path:
    """Makes the folder of figures, or one below the current folder where the results are read-only."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    instead = Path("figures", *folder.parts[-3:-1])
    instead.mkdir(parents=True, exist_ok=True)
    print(f"note: {folder} cannot be written: the figures are in {instead}", file=sys.stderr)
    return instead


def as_text(label: str) -> str:
    """A label as matplotlib shows it letter by letter: a dollar sign would begin a formula."""
    return label.replace("$", r"\$")


def draw_loss(comparison: Comparison) -> Figure | None:
    """Training and validation loss against the epoch: one column a base optimizer."""
    families = {
        family: [variant for variant in variants if variant.role.split()[-1] not in ("average", "safeguard")]
        for family, variants in comparison.families.items()
    }
    families = {family: variants for family, variants in families.items() if variants}
    if not families:
        return None
    return _loss_figure(comparison, families, "Loss against the epoch", transposed=len(families) == 1)


def draw_published_scheme(comparison: Comparison) -> Figure | None:
    """The published scheme with and without average and safeguard, between plain and aadl at the same settings."""
    families = {
        family: [variant for variant in variants if variant.role not in ("ema", "aadl")]
        for family, variants in comparison.families.items()
        if any(variant.role.startswith("published") for variant in variants)
    }
    return _loss_figure(comparison, families, "The published scheme", transposed=True) if families else None


def _loss_figure(
    comparison: Comparison, families: dict[str, list[Variant]], title: str, *, transposed: bool = False
) -> Figure:
    """Two panels a family: training and validation loss, below each other or, `transposed`, beside each other."""
    count = len(families)
    shape = (count, 2) if transposed else (2, count)
    size = (9.5, 1.4 + 3.0 * count) if transposed else (max(5.0, 1.0 + 3.3 * count), 6.6)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for column, (family, variants) in enumerate(families.items()):
        axes = grid[column] if transposed else grid[:, column]
        for axis, series, name in zip(axes, (TRAIN, VALIDATION), ("training MSE", "validation MSE"), strict=True):
            for variant, color, style in styled(variants):
                values = variant.series(series)
                epochs = np.arange(values.shape[1])
                low, middle, high = quantiles(values)
                label = LABELS.get(variant.role, variant.label)
                (line,) = axis.plot(epochs, middle, color=color, linestyle=style)
                handles.setdefault(label, line)
                axis.fill_between(epochs, low, high, color=color, alpha=0.13, linewidth=0)
            axis.set_yscale("log")
            axis.set_ylabel(name)
            if transposed or axis is axes[0]:
                axis.set_title(as_text(family), loc="left")
            _limit(axis, quantiles((plain_of(variants) or variants[0]).series(series))[1])
        axes[-1].set_xlabel("epoch")
        axes[0].set_xlabel("epoch" if transposed else "")
    spread = f"line: median of {len(comparison.seeds)} seeds, band: 10 to 90 %"
    finish(figure, comparison, f"{title} ({spread})", handles)
    return figure


def _limit(axis: Axes, plain: np.ndarray) -> None:
    """Ends the axis a little above the plain loss after 8 % of the epochs: the first fall would press the rest flat."""
    top = 3.0 * plain[max(1, len(plain) // 12)]
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    low = min(float(curve[np.isfinite(curve)].min(initial=np.inf)) for curve in curves)
    if 0 < low < top < np.inf:
        axis.set_ylim(low * 0.85, top)


def quantiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """10 %, 50 % and 90 % over the seeds, taken from the seeds themselves where one of them diverged."""
    shares = (0.1, 0.5, 0.9)
    with np.errstate(invalid="ignore"):
        low, middle, high = np.quantile(values, shares, axis=0)
    diverged = ~np.isfinite(values).all(axis=0)
    if diverged.any():  # interpolation between a number and infinity makes NaN
        low[diverged], middle[diverged], high[diverged] = np.quantile(
            values[:, diverged], shares, axis=0, method="closest_observation"
        )
    return low, middle, high


def styled(variants: list[Variant]) -> list[tuple[Variant, str, Any]]:
    """Variants with color and line style; further variants with the same role get another line style."""
    seen: dict[str, int] = {}
    styled = []
    for variant in variants:
        color, style = STYLES[variant.role]
        repeat = seen.get(variant.role, 0)
        seen[variant.role] = repeat + 1
        styled.append((variant, color, REPEATED[repeat % len(REPEATED)] if repeat else style))
    return styled


def draw_batch_size(comparison: Comparison) -> Figure | None:
    """Relative standard deviation of consecutive updates against the batch size, early and late, with fitted slopes."""
    runs = comparison.studies.get("batch_size", [])
    if len({run.config["training"]["batch_size"] for run in runs}) < 3:  # a slope of fewer says nothing
        return None
    figure, axis = plt.subplots(figsize=(7.0, 4.8))
    steps = max(int(run.attributes["num_steps"]) for run in runs)
    early, early_color = (0.0, 0.25), STYLES["aadl"][0]
    late, late_color = (0.75, 1.0), STYLES["published"][0]
    for part, color, marker, name in (
        (early, early_color, "o", "first quarter"),
        (late, late_color, "s", "last quarter"),
    ):
        sizes, values = oscillation_by_batch_size(runs, *part)
        middle = np.median(values, axis=1)
        errors = [middle - values.min(axis=1), values.max(axis=1) - middle]
        axis.errorbar(sizes, middle, yerr=errors, color=color, marker=marker, linestyle="none", capsize=3)
        slope, offset = fitted_slope(sizes[:-1], middle[:-1])
        label = f"{name} of {steps} steps: slope {slope:.2f}"
        axis.plot(sizes[:-1], np.exp(offset) * sizes[:-1] ** slope, color=color, label=label)
    sizes, values = oscillation_by_batch_size(runs, *early)
    reference = 0.55 * np.median(values[0]) * (sizes[:-1] / sizes[0]) ** -0.5
    axis.plot(sizes[:-1], reference, color="#999999", linestyle=(0, (4, 2)), label="slope -1/2 (independent rows)")
    axis.annotate("largest batch,\nnot fitted", (sizes[-1], np.median(values[-1])), (-12, 10), ha="right",
                  textcoords="offset points", color="#666666", fontsize=8)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xlabel("batch size (rows)")
    axis.set_ylabel("relative standard deviation\nof consecutive updates")
    axis.legend(loc="lower left")
    seeds = {int(run.attributes["seed"]) for run in runs}
    finish(figure, comparison, f"Oscillations against batch size (range of {len(seeds)} seeds)", {}, seeds)
    return figure


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


def fitted_slope(sizes: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope and offset of `log(values) = slope log(sizes) + offset`.

    The study leaves the largest batch out: where it is the whole training set it has no noise at all, and what remains
    is the curvature of the path.
    """
    slope, offset = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope), float(offset)


def draw_acceleration(comparison: Comparison) -> Figure | None:
    """What the acceleration did: accepted and rejected by cause; averaging and the oscillations that switch it."""
    variants = [
        (f"{fill(variant.label, 36)}\n{fill(family, 36)}", variant)
        for family, group in comparison.families.items()
        for variant in group
        if variant.role.startswith("aadl")
    ][:4]
    if not variants:
        return None
    figure, handles = acceleration_panels(variants, "epoch")
    finish(figure, comparison, "What the acceleration did", handles)
    return figure


def acceleration_panels(
    variants: Sequence[tuple[str, Variant]], unit: str, *, shared: bool = True
) -> tuple[Figure, dict[str, Any]]:
    """Two panels a variant: accelerations by outcome, and averaging with the oscillations that switch it.

    Args:
        variants: titles and variants.
        unit: of the horizontal axis, the places of the records.
        shared: whether all variants have one scale for their numbers of accelerations.

    Returns:
        The figure and the handles of its legend.
    """
    causes = list(dict.fromkeys(cause for _, variant in variants for cause in _causes(variant)))
    colors = {cause: CAUSE_COLORS[position % len(CAUSE_COLORS)] for position, cause in enumerate(causes)}
    size = (max(7.0, 1.0 + 2.8 * len(variants)), 6.0)
    figure, grid = plt.subplots(2, len(variants), figsize=size, squeeze=False, sharex=True)
    for row in grid if shared else grid[1:]:
        for axis in row[1:]:
            axis.sharey(row[0])
            axis.tick_params(labelleft=False)
    handles: dict[str, Any] = {}
    for (title, variant), (upper, lower) in zip(variants, grid.T, strict=True):
        accepted = _mean(variant, "acceleration/accepted") - _mean(variant, "acceleration/reverted")
        counts = [("accepted", STYLES["published"][0], accepted)]
        counts += [(cause, colors[cause], _mean(variant, series)) for cause, series in _causes(variant).items()]
        places = max((run.places for run in variant.runs.values()), key=len)
        bottom = np.zeros(len(places))
        for label, color, values in counts:
            area = upper.fill_between(places, bottom, bottom + values, color=color, alpha=0.85, linewidth=0)
            handles.setdefault(label, area)
            bottom = bottom + values
        upper.set_title(as_text(title), loc="left", fontsize=8.5)
        share = _mean(variant, "acceleration/averaging")
        area = lower.fill_between(places, 0, share, color="#009E73", alpha=0.3, linewidth=0, step="post")
        handles.setdefault("share of seeds with averaging on", area)
        stacked = np.full((len(variant.runs), len(places)), np.nan)
        for row, run in zip(stacked, variant.runs.values(), strict=True):
            values = run.series.get(DEVIATION, np.empty(0))
            row[: len(values)] = values
        known = np.isfinite(stacked).any(axis=0)
        (line,) = lower.plot(places[known], np.nanmedian(stacked[:, known], axis=0), color="#333333", linewidth=1.2)
        handles.setdefault("relative standard deviation between updates (median)", line)
        lower.set_xlabel(unit)
    grid[1, 0].set_ylim(bottom=0)
    grid[0, 0].set_ylabel("accelerations since the start\n(mean over the seeds)")
    grid[1, 0].set_ylabel("averaging on (share),\nrelative standard deviation")
    return figure, handles


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


def draw_learning_rate(comparison: Comparison) -> Figure | None:
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
    for axis, series, name in zip(axes, (TRAIN, VALIDATION), ("training MSE", "validation MSE"), strict=True):
        for role in sorted(groups, key=list(STYLES).index):
            rates = np.array(sorted(groups[role]))
            finals = [np.array([run.series[series][-1] for run in groups[role][rate]]) for rate in rates]
            bad = np.array([not np.isfinite(values).all() for values in finals])
            spread = np.array([(values.min(), np.median(values), values.max()) for values in finals])
            spread[bad] = np.nan
            color, style = STYLES[role]
            (line,) = axis.plot(rates, spread[:, 1], color=color, linestyle=style, marker="o", markersize=4)
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
        axis.set_ylabel(f"{name} after {epochs} epochs")
    seeds = {int(run.attributes["seed"]) for run in runs}
    optimizer = runs[0].config["variant"]["optimizer"]["name"]
    title = f"Sensitivity to the learning rate, {optimizer} (line: median, band: range of {len(seeds)} seeds)"
    finish(figure, comparison, title, handles, seeds)
    return figure


def finish(
    figure: Figure,
    records: Records,
    title: str,
    handles: dict[str, Any],
    seeds: Iterable[int] | None = None,
    note: str = "",
) -> None:
    """Title, one legend below the panels, the source at the bottom; a caution is named first of all.

    Args:
        figure: with its panels drawn.
        records: what is drawn.
        title: what the figure shows.
        handles: of the legend, by label.
        seeds: those of the figure, None for those of the main comparison.
        note: a second line below the title.
    """
    for axis in figure.axes:
        axis.tick_params(which="minor", labelsize=7)
    head = f"{records.subject}: {title[:1].lower()}{title[1:]}"
    color = "#111111"
    if records.caution:
        head, color = f"{records.caution} - {head}", "#B00020"
    height = figure.get_size_inches()[1]
    top = 0.32
    _fitted_text(figure, 1 - 0.1 / height, head, 10.5, va="top", weight="bold", color=color)
    for line, shade in ((records.explanation, color), (note, "#444444")):
        if line:
            _fitted_text(figure, 1 - top / height, line, 8.5, va="top", color=shade)
            top += 0.2
    _fitted_text(figure, 0.08 / height, f"Source: {records.source_line(seeds)}", 7, va="bottom", color="#666666")
    lines = _legend(figure, handles)
    figure.tight_layout(rect=(0, (0.3 + 0.2 * lines) / height, 1, 1 - top / height))


def _legend(figure: Figure, handles: dict[str, Any]) -> int:
    """A legend at the bottom, in as many columns as there is room for; returns the number of its lines."""
    width, height = figure.get_size_inches()
    for columns in range(min(len(handles), int(width // 2.2)), 0, -1):
        anchor = (0.5, 0.26 / height)
        legend = figure.legend(
            [*handles.values()],
            [as_text(label) for label in handles],
            loc="lower center",
            ncols=columns,
            bbox_to_anchor=anchor,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return -(-len(handles) // columns)
        legend.remove()
    return 0


def _fitted_text(figure: Figure, y: float, text: str, size: float, **style: Any) -> None:
    """A line of text at the left margin, in smaller letters where the figure is too narrow for it."""
    artist = figure.text(0.012, y, as_text(text), fontsize=size, **style)
    share = artist.get_window_extent().width / (0.976 * figure.bbox.width)
    artist.set_fontsize(size / max(1.0, share))
