"""Figures, drawn from HDF5 records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.compare import TRAIN, VALIDATION, Comparison, Variant, role_of
from experiments.record import Run

# One color a role in all figures, told apart with every kind of color blindness (Okabe and Ito), plus a line style.
STYLES: dict[str, tuple[str, Any]] = {
    "plain": ("#333333", "-"),
    "ema": ("#56B4E9", "-"),
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

RC = {
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
    "figure.dpi": 110,
    "savefig.dpi": 110,
}


def draw_figures(comparison: Comparison) -> list[Path]:
    """Draws every figure that the records allow into `figures/` beside them, returns the paths."""
    folder = comparison.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Comparison], Figure | None]] = {
        "loss.png": draw_loss,
        "published_scheme.png": draw_published_scheme,
        "batch_size.png": draw_batch_size,
        "acceleration.png": draw_acceleration,
        "learning_rate.png": draw_learning_rate,
    }
    paths = []
    with plt.rc_context(RC):
        for name, draw in drawings.items():
            figure = draw(comparison)
            if figure is not None:
                figure.savefig(folder / name, metadata={"Software": None})
                plt.close(figure)
                paths.append(folder / name)
    return paths


def draw_loss(comparison: Comparison) -> Figure | None:
    """Training and validation loss against the epoch: one column a base optimizer."""
    families = {
        family: [variant for variant in variants if variant.role.split()[-1] not in ("average", "safeguard")]
        for family, variants in comparison.families.items()
    }
    families = {family: variants for family, variants in families.items() if variants}
    return _loss_figure(comparison, families, "Loss against the epoch") if families else None


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
    for column, (family, variants) in enumerate(families.items()):
        axes = grid[column] if transposed else grid[:, column]
        top = 0.0
        for axis, series, name in zip(axes, (TRAIN, VALIDATION), ("training MSE", "validation MSE"), strict=True):
            for variant, color, style in _styled(variants):
                values = variant.series(series)
                epochs = np.arange(values.shape[1])
                low, middle, high = _spread(values)
                axis.plot(epochs, middle, color=color, linestyle=style, label=variant.label)
                axis.fill_between(epochs, low, high, color=color, alpha=0.13, linewidth=0)
                top = max(top, _after(middle, 0.03))
            axis.set_yscale("log")
            axis.set_ylabel(name)
            axis.set_title(family if not transposed or count > 1 else name, loc="left")
            _limit(axis, axes, top)
        axes[-1].set_xlabel("epoch")
        axes[0].set_xlabel("epoch" if transposed else "")
    handles = {}
    for axis in grid.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    spread = f"line: median of {len(comparison.seeds)} seeds, band: 10 to 90 %"
    _finish(figure, comparison, f"{title} ({spread})", handles)
    return figure


def _after(values: np.ndarray, share: float) -> float:
    """Largest finite value after a share of the epochs: the fall of the first ones would press the rest flat."""
    tail = values[max(1, int(len(values) * share)) :]
    return float(tail[np.isfinite(tail)].max(initial=0.0))


def _limit(axis: Axes, group: Iterable[Axes], top: float) -> None:
    lows = [line.get_ydata() for other in group for line in other.get_lines()]
    low = min((float(values[np.isfinite(values)].min(initial=np.inf)) for values in map(np.asarray, lows)), default=0.0)
    if 0 < low < top:
        axis.set_ylim(low * 0.8, top * 1.3)


def _spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """10 %, 50 % and 90 % over the seeds, taken from the seeds themselves where one of them diverged."""
    with np.errstate(invalid="ignore"):
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0)
    infinite = ~np.isfinite(values).all(axis=0)
    if infinite.any():
        low[infinite], middle[infinite], high[infinite] = np.quantile(
            values[:, infinite], (0.1, 0.5, 0.9), axis=0, method="closest_observation"
        )
    return low, middle, high


def _styled(variants: list[Variant]) -> list[tuple[Variant, str, Any]]:
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
    if len({run.config["training"]["batch_size"] for run in runs}) < 2:
        return None
    rows = max(run.config["training"]["batch_size"] for run in runs)
    figure, axis = plt.subplots(figsize=(6.6, 4.6))
    steps = max(int(run.attributes["num_steps"]) for run in runs)
    for (first, last), color, marker, name in (
        ((0.0, 0.25), STYLES["aadl"][0], "o", "first quarter"),
        ((0.75, 1.0), STYLES["published"][0], "s", "last quarter"),
    ):
        sizes, values = oscillation_by_batch_size(runs, first, last)
        low, middle, high = values.min(axis=1), np.median(values, axis=1), values.max(axis=1)
        # Where one batch is the whole set there is no noise: what remains is the curvature of the path.
        fitted = sizes < rows
        slope, offset = np.polyfit(np.log(sizes[fitted]), np.log(middle[fitted]), 1)
        axis.errorbar(
            sizes, middle, yerr=[middle - low, high - middle], color=color, marker=marker, linestyle="none", capsize=3
        )
        line = sizes[fitted]
        label = f"{name} of the {steps} steps: slope {slope:.2f}"
        axis.plot(line, np.exp(offset) * line**slope, color=color, label=label)
    sizes, values = oscillation_by_batch_size(runs, 0.0, 0.25)
    line = sizes[sizes < rows]
    reference = 0.55 * np.median(values[0]) * (line / line[0]) ** -0.5
    axis.plot(line, reference, color="#999999", linestyle=(0, (4, 2)), label="slope -1/2 (independent samples)")
    axis.annotate("whole set:\nno noise", (sizes[-1], np.median(values[-1])), xytext=(-12, 12), ha="right",
                  textcoords="offset points", color="#666666", fontsize=8)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xlabel("batch size (rows)")
    axis.set_ylabel("relative standard deviation\nof consecutive updates")
    axis.legend(loc="lower left")
    seeds = {int(run.attributes["seed"]) for run in runs}
    _finish(figure, comparison, f"Oscillations fall as the batch grows (median and range of {len(seeds)} seeds)", {})
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
        part = values[int(first * len(values)) : max(int(last * len(values)), int(first * len(values)) + 1)]
        groups.setdefault(run.config["training"]["batch_size"], []).append(float(np.nanmedian(part)))
    sizes = sorted(groups)
    num_seeds = min(len(values) for values in groups.values())
    return np.array(sizes), np.array([groups[size][:num_seeds] for size in sizes])


def draw_acceleration(comparison: Comparison) -> Figure | None:
    """What the acceleration did: accepted and rejected by cause; averaging and the oscillations that switch it."""
    variants = [
        (family, variant)
        for family, group in comparison.families.items()
        for variant in group
        if variant.role.startswith("aadl") and "acceleration/accepted" in next(iter(variant.runs.values())).series
    ][:4]
    if not variants:
        return None
    causes = list(dict.fromkeys(cause for _, variant in variants for cause in _causes(variant)))
    colors = dict(zip(causes, CAUSE_COLORS * (len(causes) // len(CAUSE_COLORS) + 1), strict=False))
    figure, grid = plt.subplots(
        2, len(variants), figsize=(max(5.0, 1.0 + 2.8 * len(variants)), 6.0), squeeze=False, sharex=True, sharey="row"
    )
    handles: dict[str, Any] = {}
    for (family, variant), (upper, lower) in zip(variants, grid.T, strict=True):
        counts = [("accepted", STYLES["published"][0], _mean(variant, "acceleration/accepted"))]
        counts += [(f"rejected: {cause}", colors[cause], _mean(variant, name)) for cause, name in _causes(variant).items()]
        epochs = np.arange(len(counts[0][2]))
        bottom = np.zeros(len(epochs))
        for label, color, values in counts:
            handles.setdefault(
                label, upper.fill_between(epochs, bottom, bottom + values, color=color, alpha=0.85, linewidth=0)
            )
            bottom = bottom + values
        upper.set_title(f"{variant.label}\n{family}", loc="left", fontsize=8.5)
        averaging = _mean(variant, "acceleration/averaging")
        handles.setdefault(
            "share of seeds with averaging on",
            lower.fill_between(epochs, 0, averaging, color="#009E73", alpha=0.3, linewidth=0, step="post"),
        )
        stacked = np.stack([run.series["acceleration/relative_standard_deviation"] for run in variant.runs.values()])
        known = np.isfinite(stacked).any(axis=0)
        (line,) = lower.plot(epochs[known], np.nanmedian(stacked[:, known], axis=0), color="#333333", linewidth=1.2)
        handles.setdefault("relative standard deviation between updates (median)", line)
        lower.set_ylim(0, max(1.05, lower.get_ylim()[1]))
        lower.set_xlabel("epoch")
    grid[0, 0].set_ylabel("accelerations since the start\n(mean over the seeds)")
    grid[1, 0].set_ylabel("averaging on (share),\nrelative standard deviation")
    _finish(figure, comparison, "What the acceleration did", handles)
    return figure


def _causes(variant: Variant) -> dict[str, str]:
    """Causes of rejection that occurred, in words, with their series."""
    names = sorted({name for run in variant.runs.values() for name in run.series if "/rejected_" in name})
    result = {name.rpartition("rejected_")[2].replace("_", " "): name for name in names if _mean(variant, name)[-1] > 0}
    if (_mean(variant, "acceleration/reverted")[-1:] > 0).any():
        result["reverted afterwards"] = "acceleration/reverted"
    return result


def _mean(variant: Variant, name: str) -> np.ndarray:
    """Mean over the seeds of a counter; runs without it count 0, after a divergence the last count stays."""
    length = max(len(run.series[TRAIN]) for run in variant.runs.values())
    stacked = np.zeros((len(variant.runs), length))
    for row, run in zip(stacked, variant.runs.values(), strict=True):
        values = run.series.get(name, np.zeros(length))
        row[:] = np.where(np.isfinite(values), values, 0.0)
        if name != "acceleration/averaging":
            np.maximum.accumulate(row, out=row)
    return stacked.mean(axis=0)


def draw_learning_rate(comparison: Comparison) -> Figure | None:
    """Loss at the end of training against the learning rate; a median that diverged stands as a cross at the top."""
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in comparison.studies.get("learning_rate", []):
        definition = run.config["variant"]
        by_rate = groups.setdefault(role_of(definition), {})
        by_rate.setdefault(definition["optimizer"]["arguments"]["lr"], []).append(run)
    if not groups:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4))
    epochs = next(iter(next(iter(groups.values())).values()))[0].config["training"]["epochs"]
    handles: dict[str, Any] = {}
    for axis, series, name in zip(axes, (TRAIN, VALIDATION), ("training MSE", "validation MSE"), strict=True):
        for role in sorted(groups, key=list(STYLES).index):
            rates = np.array(sorted(groups[role]))
            finals = [np.array([run.series[series][-1] for run in groups[role][rate]]) for rate in rates]
            bad = np.array([not np.isfinite(values).all() for values in finals])
            spread = np.array([(v.min(), np.median(v), v.max()) for v in finals])
            color, style = STYLES[role]
            good = ~bad
            handles[LABELS.get(role, role)] = axis.plot(
                rates[good], spread[good, 1], color=color, linestyle=style, marker="o", markersize=4
            )[0]
            axis.fill_between(rates[good], spread[good, 0], spread[good, 2], color=color, alpha=0.15, linewidth=0)
            if bad.any():
                axis.plot(rates[bad], np.ones(bad.sum()), "x", color=color, transform=axis.get_xaxis_transform(),
                          clip_on=False)  # fmt: skip
                axis.annotate("diverged", (rates[bad][0], 1.0), xycoords=axis.get_xaxis_transform(), fontsize=8,
                              color=color, ha="right", va="bottom", xytext=(-6, 0), textcoords="offset points")  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylabel(f"{name} after {epochs} epochs")
    runs = comparison.studies["learning_rate"]
    seeds = {int(run.attributes["seed"]) for run in runs}
    name = runs[0].config["variant"]["optimizer"]["name"]
    title = f"Sensitivity to the learning rate, {name} (line: median, band: range of {len(seeds)} seeds)"
    _finish(figure, comparison, title, handles)
    return figure


def _finish(figure: Figure, comparison: Comparison, title: str, handles: dict[str, Any]) -> None:
    """Title, one legend below the panels, the source at the bottom; a surrogate is named in the title too."""
    experiment = comparison.folder.parent.name.replace("_", " ")
    head = f"{experiment[:1].upper()}{experiment[1:]}: {title[:1].lower()}{title[1:]}"
    if comparison.is_surrogate:
        head += "  -  SURROGATE DATA"
    inches = figure.get_size_inches()[1]
    columns = max(1, min(len(handles), int(figure.get_size_inches()[0] // 2.2)))
    lines = -(-len(handles) // columns) if handles else 0
    figure.text(0.012, 1 - 0.1 / inches, head, va="top", fontsize=10.5, weight="bold",
                color="#B00020" if comparison.is_surrogate else "#111111")  # fmt: skip
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=columns,
                      bbox_to_anchor=(0.5, 0.26 / inches))  # fmt: skip
    figure.text(0.012, 0.08 / inches, f"Source: {comparison.source_line}", fontsize=7, color="#666666", va="bottom")
    figure.tight_layout(rect=(0, (0.3 + 0.2 * lines) / inches, 1, 1 - 0.32 / inches))

