"""Figures of physics-informed networks, drawn from HDF5 records alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments.pinn.compare import ERROR, Group, final_error, has_other_loss, settings_line
from experiments.records.acceleration_figure import acceleration_panels
from experiments.records.compare import SECONDS, TRAIN, Variant
from experiments.records.figures import (
    Coinciding,
    as_text,
    finish,
    legend_line,
    save_figures,
    spread_over_seeds,
    spread_words,
)
from experiments.records.palette import styled
from experiments.records.reading import Run, read_fields

SLICES = (0.25, 0.5, 0.75)
MAX_ACCELERATED = 4
Curve = tuple[str, np.ndarray, str, Any]
"""Label, values over x and t, color and line style."""
FLOOR = 1e-16
"""Least error and residual on logarithmic color scales: zeros have no logarithm."""


def draw_pinn_figures(groups: list[Group]) -> list[Path]:
    """Draws every figure that the records allow into `figures/` beside them, returns the paths.

    The names of the figures of the first group stand alone, those of the others end in the name of their baseline and,
    where it was not run, of their first variant: several groups may lack the same one.
    """
    drawings: list[tuple[str, Callable[[], Figure | None]]] = []
    for position, group in enumerate(groups):
        ending = "" if group.baseline is not None else f"+{group.variants[0].name}"  # no name holds a plus
        ending = f"_of_{group.name}{ending}" if position else ""
        for name, draw in (
            ("convergence", draw_convergence),
            ("solution", draw_best_solution),
            ("solution_baseline", draw_baseline_solution),
            ("predictors", draw_predictors),
            ("acceleration", draw_acceleration),
        ):
            drawings.append((f"{name}{ending}.png", partial(draw, group)))
    return save_figures(groups[0].folder / "figures", drawings)


# ---- convergence -----------------------------------------------------------------------------------------------------


def draw_convergence(group: Group) -> Figure | None:
    """Loss and relative L2 error against iterations and against training seconds."""
    rows = [(TRAIN, "training loss")]
    if group.main_set is not None:
        rows.append((f"metrics/validation/{ERROR}{group.main_set}", f"relative L2 error ({group.main_set})"))
    figure, grid = plt.subplots(
        len(rows), 2, figsize=(10.5, 1.9 + 2.9 * len(rows)), squeeze=False, sharex="col", sharey="row"
    )
    handles: dict[str, Any] = {}
    coinciding = Coinciding()
    for variant, color, style in styled(group.variants):
        dashed = coinciding.style(_label(variant), curve(variant, rows[-1][0], "iterations")[1][1], style)
        for axes, (series, _) in zip(grid, rows, strict=True):
            if series == TRAIN and has_other_loss(variant, group):
                continue  # two losses are not compared on one axis
            for axis, against, drawn in zip(axes, ("iterations", SECONDS), (dashed, style), strict=True):
                places, (low, middle, high) = curve(variant, series, against)
                if not len(places):
                    continue
                axis.plot(places, middle, color=color, linestyle=drawn, linewidth=1.4)
                axis.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)
                label = _label(variant) + " (other loss: error alone)" * has_other_loss(variant, group)
                handles[label] = legend_line(color, style)
    for axes, (_, name) in zip(grid, rows, strict=True):
        axes[0].set_ylabel(name)
        axes[0].set_yscale("log")
        _limit(axes[0])
    for axis, name in zip(grid[-1], ("iterations", "training seconds"), strict=True):
        axis.set_xlabel(name)
        _scale(axis)
    if group.main_set is not None:
        for axis in grid[1]:
            _lines_of_predictors(axis, group, named=axis is grid[1, 1])
    names = "training loss" if group.main_set is None else "training loss and error"
    note = f"{settings_line(group)}\n{spread_words(len(group.seeds))}\n{coinciding.note}"
    finish(figure, group, f"{names} against iterations and time", handles, note=note)
    return figure


def curve(variant: Variant, series: str, against: str) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A series over the seeds, evaluation by evaluation, from the first one after the start on.

    The place of an evaluation, by "iterations" or by a series, is the median over the seeds. The curve ends with the
    shortest run that did not diverge; a diverged run counts as infinitely bad from its last loss on. Returns places,
    and minimum, median and maximum, where they are finite; an infinite maximum is NaN.
    """
    runs = list(variant.runs.values())
    length = min((len(run.places) for run in runs if not run.diverged), default=max(len(run.places) for run in runs))
    values, places = np.full((len(runs), length), np.inf), np.full((len(runs), length), np.nan)
    for value_row, place_row, run in zip(values, places, runs, strict=True):
        own = run.series[series][:length]
        value_row[: len(own)] = np.where(np.isfinite(own), own, np.inf)
        own = (run.places if against == "iterations" else run.series[against])[:length]
        place_row[: len(own)] = own
    low, middle, high = spread_over_seeds(values)
    known = np.isfinite(middle) & np.isfinite(places).any(axis=0)
    known[0] = False  # a logarithmic axis has no zero
    return np.nanmedian(places[:, known], axis=0), (low[known], middle[known], _finite(high[known]))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _label(variant: Variant) -> str:
    """The label, with the number of diverged runs."""
    diverged = sum(run.diverged for run in variant.runs.values())
    return f"{variant.label} ({diverged} of {len(variant.runs)} diverged)" if diverged else variant.label


def _limit(axis: Axes) -> None:
    """Ends the axis a little below and above the median lines: a band or a bad start would press the rest flat."""
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    values = np.concatenate([curve[(curve > 0) & np.isfinite(curve)] for curve in curves]) if curves else np.empty(0)
    if values.size:
        axis.set_ylim(values.min() / 1.5, values.max() * 1.5)


def _scale(axis: Axes) -> None:
    """A logarithmic axis where the lines end at very different places."""
    ends = [float(np.max(line.get_xdata())) for line in axis.get_lines() if len(np.asarray(line.get_xdata()))]
    if ends and max(ends) > 4 * min(ends):
        axis.set_xscale("log")


def _lines_of_predictors(axis: Axes, group: Group, *, named: bool = True) -> None:
    """Thin horizontal lines with names beside the panel; the axis grows until they can be seen."""
    low, high = axis.get_ylim()
    errors = {name: error for name, error in group.predictors[group.main_set or ""].items() if error > 0}
    if not errors:
        return
    axis.set_ylim(min(low, min(errors.values()) / 1.5), max(high, max(errors.values()) * 1.8))
    decades = float(np.log10(axis.get_ylim()[1] / axis.get_ylim()[0]))
    height = -np.inf
    for name, error in sorted(errors.items(), key=lambda item: item[1]):
        axis.axhline(error, color="#999999", linewidth=0.8, zorder=1)
        if named:  # above the name below it, a line of letters being a twelfth of a panel
            text = _wrapped(name, 14)
            height = max(float(np.log10(error)), height + decades * (1 + text.count("\n")) / 12)
            axis.annotate(text, (1.0, 10**height), (3, 0), xycoords=axis.get_yaxis_transform(), ha="left",
                          textcoords="offset points", va="center", fontsize=7, color="#666666")  # fmt: skip


# ---- solution --------------------------------------------------------------------------------------------------------


def draw_best_solution(group: Group) -> Figure | None:
    """The solution of the best seed of aadl's best variant; of all variants where aadl was not run."""
    finite = [(badness(run, group), variant, run) for variant in group.variants for run in variant.runs.values()]
    ranked = [entry for entry in finite if entry[1].role.startswith("aadl") and np.isfinite(entry[0])] or finite
    _, variant, run = min(ranked, key=lambda entry: entry[0])
    which = "the best run" + " of aadl" * variant.role.startswith("aadl")
    return _solution(group, variant, run, which)


def draw_baseline_solution(group: Group) -> Figure | None:
    """The solution of the median seed of the baseline: of an even number the better one of the two."""
    variant = group.baseline
    if variant is None:
        return None
    return _solution(group, variant, median_run(variant, group), "the median run of the baseline")


def median_run(variant: Variant, group: Group) -> Run:
    """The run in the middle; of an even number the better one of the two."""
    runs = sorted(variant.runs.values(), key=lambda run: badness(run, group))
    return runs[(len(runs) - 1) // 2]


def badness(run: Run, group: Group) -> float:
    """The relative L2 error at the end, or the loss where the solution is not known; inf for a diverged run."""
    if group.main_set is not None:
        return final_error(run, group.main_set)
    return np.inf if run.diverged else float(run.series[TRAIN][-1])


def _solution(group: Group, variant: Variant, run: Run, which: str) -> Figure | None:
    """Maps of solution, exact solution, error and residual; slices in time with a zoom on the steepest place."""
    fields = read_fields(run.path)
    if not {"x", "t", "u", "pde_residual"} <= set(fields) or not np.isfinite(fields["u"]).all():
        return None
    t, u, exact = fields["t"], fields["u"], fields.get("exact")
    figure, grid = plt.subplots(2, 4, figsize=(14.0, 6.8))
    limits, colors = _range(u if exact is None else exact)
    _map(grid[0, 0], fields, u, "u of the network, with the points", colors, vmin=limits[0], vmax=limits[1])
    grid[0, 0].plot(fields["collocation_t"], fields["collocation_x"], ".", color="black", markersize=1.2, alpha=0.35,
                    markeredgewidth=0)  # fmt: skip
    grid[0, 0].set_xlim(t[0], t[-1])
    if exact is not None:
        _map(grid[0, 1], fields, exact, "exact u", colors, vmin=limits[0], vmax=limits[1])
        _map(grid[0, 2], fields, np.abs(u - exact), "|error|", "viridis", norm=_log_norm(u - exact))
    else:
        for axis in grid[0, 2:]:
            axis.set_axis_off()
    residual, axis = fields["pde_residual"], grid[0, 1 if exact is None else 3]
    _map(axis, fields, np.abs(residual), "|pde_residual|", "magma", norm=_log_norm(residual))
    handles: dict[str, Any] = {}
    styles = {entry.name: (color, style) for entry, color, style in styled(group.variants)}
    curves = [("network", u, *styles[variant.name])]
    if exact is not None:
        curves = _errors(group, variant, run, exact, styles)
    _slices(grid[1], fields, curves, handles)
    seed, problem = run.attributes["seed"], run.config["problem"]
    note = f"{problem['num_points']} + {problem['num_conditions']} points, {int(run.places[-1])} iterations, "
    note += f"{run.series[SECONDS][-1]:.1f} s of training"
    error = "" if group.main_set is None else f", relative L2 {final_error(run, group.main_set):.2e}"
    finish(figure, group, f"{which}: {variant.label}, seed {seed}{error}", handles, [seed], note)
    return figure


def _errors(
    group: Group, variant: Variant, run: Run, exact: np.ndarray, styles: dict[str, tuple[str, Any]]
) -> list[Curve]:
    """Errors of this run, of the median run of the baseline and of the best variant."""
    shown = {variant.name: (variant, run, "this run")}
    best = min(group.variants, key=lambda other: badness(median_run(other, group), group))
    for other, words in ((group.baseline, "median run"), (best, "median run, the best of all variants")):
        if other is not None:
            shown.setdefault(other.name, (other, median_run(other, group), words))
    coinciding, curves = Coinciding(), []
    for other, own, words in shown.values():
        u = read_fields(own.path).get("u")
        if u is not None and np.isfinite(u).all():
            label, (color, style) = f"|error| of {other.label} ({words})", styles[other.name]
            values = np.maximum(np.abs(u - exact), FLOOR)
            curves.append((label, values, color, coinciding.style(label, values, style)))
    return curves


def _slices(axes: np.ndarray, fields: dict[str, np.ndarray], curves: list[Curve], handles: dict[str, Any]) -> None:
    """Slices in time of errors, or of a solution that nothing is known about; the last panel zooms in on the front."""
    x, t, solution = fields["x"], fields["t"], fields.get("exact", fields["u"])
    times = slice_places(t)
    steepest = max(times, key=lambda place: float(np.abs(np.gradient(solution[:, place], x)).max()))
    for axis, place in zip(axes, [*times, steepest], strict=True):
        for label, values, color, style in curves:
            (handles[label],) = axis.plot(x, values[:, place], color=color, linestyle=style, linewidth=1.2)
        axis.set_xlabel("x")
        axis.set_title(f"t = {t[place]:.3g}", loc="left")
    axes[-1].set_xlim(*front(x, solution[:, steepest]))
    axes[-1].set_title(f"t = {t[steepest]:.3g}, the steepest place", loc="left")
    margin = 0.05 * float(np.ptp(solution))
    low, high = float(solution.min()) - margin, float(solution.max()) + margin
    if "exact" in fields:
        for axis in axes:
            axis.set_yscale("log")
        high = max(axis.get_ylim()[1] for axis in axes)
        low = max(min(axis.get_ylim()[0] for axis in axes), 1e-7 * high)
    for axis in axes:
        axis.set_ylim(low, high)
    axes[0].set_ylabel("|error|" if "exact" in fields else "u")


def _map(axis: Axes, fields: dict[str, np.ndarray], values: np.ndarray, title: str, colors: str, **scale: Any) -> None:
    image = axis.pcolormesh(fields["t"], fields["x"], values, cmap=colors, shading="nearest", rasterized=True, **scale)
    axis.figure.colorbar(image, ax=axis, pad=0.02, aspect=25)
    axis.set_title(title, loc="left")
    axis.set_xlabel("t")
    axis.set_ylabel("x")
    axis.grid(False)


def _range(values: np.ndarray) -> tuple[tuple[float, float], str]:
    """Limits of a color scale and its colors: around zero, which is white then, where there are both signs."""
    low, high = float(values.min()), float(values.max())
    size = max(-low, high)
    if min(-low, high) > 1e-3 * size:
        return (-size, size), "RdBu_r"
    return (low, high if high > low else low + 1.0), "viridis"


def _log_norm(values: np.ndarray) -> LogNorm:
    """From the largest value down over five decades at most, but not beyond the smallest percents."""
    sizes = np.maximum(np.abs(values), FLOOR)
    high = float(sizes.max())
    low = max(float(np.quantile(sizes, 0.02)), 1e-5 * high)
    return LogNorm(low if low < high else high / 10, high, clip=True)


def slice_places(t: np.ndarray) -> list[int]:
    """Indices of the times 0.25, 0.5 and 0.75, or of these shares of the time, if it does not end at about 1."""
    horizon = 1.0 if 0.9 < t[-1] <= 1.0 and t[0] == 0 else float(t[-1] - t[0])
    return [int(np.abs(t - t[0] - share * horizon).argmin()) for share in SLICES]


def front(x: np.ndarray, u: np.ndarray) -> tuple[float, float]:
    """Window around the steepest place: three times the range of u over the steepest slope to either side."""
    slope = np.abs(np.gradient(u, x))
    place = int(slope.argmax())
    width = 3.0 * float(np.ptp(u)) / float(slope[place]) if slope[place] > 0 else float(np.ptp(x))
    return max(float(x[0]), float(x[place]) - width), min(float(x[-1]), float(x[place]) + width)


# ---- errors against trivial predictors, acceleration -----------------------------------------------------------------


def draw_predictors(group: Group) -> Figure | None:
    """Final errors by variant against trivial predictors, for equations whose solution cannot be drawn."""
    drawn = any(read_fields(run.path) for run in list(group.variants[0].runs.values())[:1])
    if drawn or group.main_set is None:
        return None
    figure, axis = plt.subplots(figsize=(max(7.0, 2.0 + 1.2 * len(group.variants)), 4.8))
    names = []
    for place, (variant, color, _) in enumerate(styled(group.variants)):
        errors = np.array([final_error(run, group.main_set) for run in variant.runs.values()])
        finite = errors[np.isfinite(errors)]
        axis.plot(np.full(len(finite), place), finite, "o", color=color, alpha=0.6, markersize=5)
        if np.isfinite(np.median(errors)):
            axis.plot([place - 0.25, place + 0.25], [np.median(errors)] * 2, color=color, linewidth=2.4)
        names.append(as_text(_wrapped(_label(variant))))
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low / 1.2, high * 1.2)
    axis.set_xlim(-0.6, len(names) - 0.4)
    _lines_of_predictors(axis, group)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel(f"relative L2 error ({group.main_set})")
    axis.grid(axis="x", visible=False)
    seeds = f"{len(group.seeds)} seed{'s' * (len(group.seeds) > 1)}"
    note = f"dots: {seeds}, bar: median; gray lines: guesses without training"
    finish(figure, group, "final error", {}, note=f"{settings_line(group)}\n{note}")
    return figure


def _wrapped(label: str, width: int = 16) -> str:
    """The label in lines of at most about `width` letters."""
    return fill(label, width, break_long_words=False)


def draw_acceleration(group: Group) -> Figure | None:
    """What the acceleration did: that of aadl first, then the published scheme, at most four variants."""
    accelerated = [
        variant
        for variant in group.variants
        if any("acceleration/accepted" in run.series for run in variant.runs.values())
    ]
    accelerated.sort(key=lambda variant: not variant.role.startswith("aadl"))
    if not accelerated:
        return None
    shown = accelerated[:MAX_ACCELERATED]
    figure, handles = acceleration_panels([(_wrapped(variant.label, 34), variant) for variant in shown], "iterations")
    count = f" ({len(shown)} of {len(accelerated)} accelerated variants)" if len(accelerated) > len(shown) else ""
    note = f"{settings_line(group)}\n{spread_words(len(group.seeds))}"
    finish(figure, group, f"what the acceleration did{count}", handles, note=note)
    return figure
