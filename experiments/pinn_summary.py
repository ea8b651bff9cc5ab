"""The tables of physics-informed networks and their targets, from HDF5 records alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from experiments.compare import SECONDS, TRAIN, Variant
from experiments.pinn_compare import (
    ERROR,
    Group,
    Measures,
    diverged_note,
    final_error,
    measure,
    settings_line,
    value_within,
)
from experiments.record import Run
from experiments.summarize import (
    all_within,
    markdown_table,
    median,
    median_within,
    spread,
    target,
    text_table,
    write_text,
)

TOLERANCE = 1.02
"""A final loss of more than this times the baseline's counts as above it."""
AGAINST = (
    "variant",
    "iterations to the baseline's final loss",
    "final loss over the baseline's",
    "at equal evaluations",
    "at equal seconds",
    "seeds > 2 % above",
)
LEGEND = (
    "Median over the seeds [minimum .. maximum]; a diverged run counts as infinitely bad. Loss: on the points of the "
    "last draw, with the evaluated weights; each variant has its own points. Iterations: evaluations of the gradient "
    "or of a Jacobian after which no recorded loss is above the baseline's final one on the same seed; the loss jumps "
    "when points are drawn anew, so the baseline may have been below its final loss before. At equal evaluations (of "
    "the loss, trials included) or seconds: the losses where both have spent the smaller of the two budgets, "
    "interpolated; no schedule was adapted to it. Seconds: training alone. The last column includes diverged runs; "
    "where only the baseline diverged, a seed is unknown."
)


def summarize_pinn(groups: list[Group]) -> str:
    """Writes `summary.md` beside the records and returns the same as text for a terminal."""
    folder = groups[0].folder
    title = f"{folder.parent.name}, {folder.name}"
    cautions = {f"{group.equation}: {group.degenerate}" for group in groups if group.degenerate}
    title += f" - DEGENERATE EQUATION: {'; '.join(sorted(cautions))}" if cautions else ""
    markdown, text = [f"# {title}", ""], [title, ""]
    for group in groups:
        against = group.baseline.label if group.baseline is not None else f"{group.name} (not run)"
        head = f"{group.equation}, compared with {against}"
        head = f"{group.caution} - {head}" if group.caution else head
        markdown += [f"## {head}", "", *([f"**{group.degenerate}**", ""] if group.degenerate else [])]
        text += [head, *([group.degenerate] if group.degenerate else [])]
        markdown += [f"{settings_line(group)}.", ""]
        text += [settings_line(group), ""]
        for header, rows in _tables(group):
            markdown += [*markdown_table(header, rows), ""]
            text += [*text_table(header, rows), ""]
        diverged = diverged_note(group.variants)
        if diverged:
            markdown += [f"Diverged: {diverged}.", ""]
            text += [f"Diverged: {diverged}.", ""]
    targets = target_lines(groups)
    if targets:
        markdown += ["## Targets", "", *(f"- {line}" for line in targets), ""]
        text += ["Targets", *(f"  {line}" for line in targets), ""]
    seeds = sorted({seed for group in groups for seed in group.seeds})
    source = f"Source: {groups[0].source_line(seeds)}"
    markdown += [LEGEND, "", source, ""]
    text += [LEGEND, source]
    write_text(folder / "summary.md", "\n".join(markdown))
    return "\n".join(text)


def _tables(group: Group) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Headers and rows: what each variant reached, the comparison with the baseline, and the learning rates."""
    measured = [(variant, measure(variant, group)) for variant in group.variants]
    errors = [f"relative L2 ({name})" for name in group.predictors]
    tables = [(("variant", "final training loss", *errors, "evaluations", "seconds"), _result_rows(group, measured))]
    if group.baseline is not None and len(group.variants) > 1:
        tables.append((AGAINST, [_comparison_row(group, variant, measures) for variant, measures in measured]))
    if group.studies.get("learning_rate"):
        rows = _learning_rate_rows(group, group.studies["learning_rate"])
        tables.append((("variant", "learning rate", "final training loss", *errors[:1]), rows))
    return tables


def _result_rows(group: Group, measured: list[tuple[Variant, Measures]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for variant, measures in measured:
        errors = [spread(measures.errors[name], "{:.2e}", "diverged") for name in group.predictors]
        loss = spread(measures.loss, "{:.2e}", "diverged")
        evaluations = spread(measures.evaluations, "{:.0f}", "diverged")
        rows.append((variant.label, loss, *errors, evaluations, spread(measures.seconds, "{:.1f}", "diverged")))
    names = dict.fromkeys(name for rivals in group.predictors.values() for name in rivals)
    for name in names:
        errors = [f"{rivals.get(name, np.nan):.2e}" for rivals in group.predictors.values()]
        rows.append((f"no network: {name}", "-", *errors, "-", "-"))
    return rows


def _comparison_row(group: Group, variant: Variant, measures: Measures) -> tuple[str, ...]:
    if not measures.shared:
        return (variant.label, *("no seed in common",) * 5)
    iterations = spread(measures.iterations, "{:.0f}")
    if variant is group.baseline:
        return (variant.label, iterations, "-", "-", "-", "-")
    above = f"{int((measures.ratio > TOLERANCE).sum())} of {len(measures.shared)}"
    unknown = int(np.isnan(measures.ratio).sum())
    above += f", {unknown} unknown" if unknown else ""
    ratios = (measures.ratio, measures.at_evaluations, measures.at_seconds)
    return (variant.label, iterations, *(spread(ratio, "{:.3g}", "diverged") for ratio in ratios), above)


def _learning_rate_rows(group: Group, runs: list[Run]) -> list[tuple[str, ...]]:
    """One row a variant and rate."""
    by_rate: dict[tuple[int, float], list[Run]] = {}
    for run in runs:
        rate = run.config["variant"]["optimizer"]["arguments"]["lr"]
        by_rate.setdefault((run.attributes["variant_index"], rate), []).append(run)
    rows = []
    for (_, rate), some in sorted(by_rate.items()):
        losses = np.array([np.inf if run.diverged else run.series[TRAIN][-1] for run in some])
        row = [some[0].config["variant"]["label"], f"{rate:g}", spread(losses, "{:.2e}", "diverged")]
        if group.main_set is not None:
            errors = np.array([final_error(run, group.main_set) for run in some])
            row.append(spread(errors, "{:.2e}", "diverged"))
        rows.append(tuple(row))
    return rows


# ---- targets ---------------------------------------------------------------------------------------------------------


def target_lines(groups: list[Group]) -> list[str]:
    """The targets of the experiment with the numbers; empty for an experiment without any.

    A target is met, NOT MET or unknown: the last where its variants were not run, or where the seeds on which the
    baseline diverged could decide it.
    """
    experiment = groups[0].folder.parent.name
    if experiment not in TARGETS:
        return []
    lines = [
        _never_above(variant, group)
        for group in groups
        for variant in group.variants
        if variant.role == "aadl"
    ]
    return lines + [line(groups[0]) for line in TARGETS[experiment]]


def _never_above(variant: Variant, group: Group) -> str:
    measures = measure(variant, group)
    above = [seed for seed, ratio in zip(measures.shared, measures.ratio, strict=True) if ratio > TOLERANCE]
    what = f"{variant.label}, {group.equation}: never ends more than 2 % above its baseline"
    if not measures.shared:
        return target(what, None, "the baseline was not run")
    where = f"above on seeds {above}" if above else f"above on none of {len(measures.shared)} seeds"
    ratios = f"final loss over the baseline's {spread(measures.ratio, '{:.3g}', 'diverged')}"
    return target(what, all_within(measures.ratio, TOLERANCE), f"{where}; {ratios}")


def _sooner(group: Group, *, name: str, share: float, words: str) -> str:
    """A variant reaches the baseline's final loss in this share of its iterations, in the median."""
    what = f"{name}: the baseline's final loss in at most {words} of its iterations"
    variant = next((variant for variant in group.variants if variant.name == name), None)
    measures = None if variant is None else measure(variant, group)
    if measures is None or not measures.shared:
        return target(what, None, "not run")
    return target(what, median_within(measures.share, share), f"share {spread(measures.share, '{:.2f}')}")


def _error(
    group: Group,
    *,
    limit: float,
    seconds: float = np.inf,
    only: Callable[[Run], bool] = lambda run: True,
    words: str = "any variant",
) -> str:
    """The best variant has at most this relative L2 error after these training seconds, in the median."""
    within = f" after at most {seconds:g} s of training" if np.isfinite(seconds) else ""
    what = f"relative L2 at most {limit:g}{within}, {words}"
    series = f"metrics/validation/{ERROR}{group.main_set}"
    found = []
    for variant in group.variants if group.main_set is not None else []:
        errors = [value_within(run, series, SECONDS, seconds) for run in variant.runs.values() if only(run)]
        if errors:
            found.append((median(np.array(errors)), variant.label, np.array(errors)))
    if not found:
        return target(what, None, "not run")
    best, label, values = min(found, key=lambda entry: entry[0])
    return target(what, best <= limit, f"best is {label} with {spread(values, '{:.2e}', 'diverged')}")


HIGHER_ORDER = ("LBFGS", "LevenbergMarquardt")


def _is_first_order(run: Run) -> bool:
    definition = run.config["variant"]
    stages = [definition, *([definition["then"]] if definition.get("then") else [])]
    return not any(stage["optimizer"]["name"] in HIGHER_ORDER for stage in stages)


def _on_gpu(run: Run) -> bool:
    return not str(run.attributes["devices"]).startswith("cpu")


# Of the first group of an experiment; beside them, no variant with the defaults of aadl may end above its baseline.
TARGETS: dict[str, tuple[Callable[[Group], str], ...]] = {
    "burgers_2d": (
        partial(_sooner, name="adam_aadl", share=1 / 2, words="half"),
        partial(_error, limit=0.05, only=_is_first_order, words="any first-order variant (no L-BFGS)"),
        partial(_error, limit=1e-4, seconds=60),
        partial(_error, limit=1e-5, seconds=600),
        partial(_error, limit=1e-7, seconds=600, only=_on_gpu, words="any variant on a GPU"),
    ),
    "burgers_100d": (
        partial(_error, limit=0.2),
        partial(_error, limit=0.05, seconds=3600),
    ),
}
