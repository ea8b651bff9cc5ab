"""The tables of physics-informed networks, from HDF5 records alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.pinn.compare import (
    Group,
    Measures,
    accepted_candidates,
    diverged_note,
    final_error,
    has_other_loss,
    measure,
    settings_line,
)
from experiments.records.compare import TRAIN, Variant
from experiments.records.reading import Run
from experiments.records.summarize import seeds_above, spread
from experiments.records.text_table import Page

TOLERANCE = 1.02
"""A final loss of more than this times the baseline's counts as above it."""
AGAINST = (
    "variant",
    "iterations to the baseline's final loss",
    "final loss / baseline's",
    "at equal evaluations",
    "at equal seconds",
    "of the processor",
    "on unseen points",
    "seeds > 2 % above",
    "accepted",
    "relative L2 / baseline's",
)
"""The last column is left out where the solution is not known."""
OTHER_LOSS = "other loss"
LEGEND = (
    "Median over the seeds [minimum .. maximum]; a diverged run counts as infinitely bad. Loss: on the points of the "
    "last draw, with the evaluated weights; each variant has its own points. Iterations: evaluations of the gradient "
    "or of a Jacobian after which no recorded loss is above the baseline's final one on the same seed; the loss jumps "
    "when points are drawn again, so the baseline may have been below its final loss before. At equal evaluations (of "
    "the loss, trials included), seconds, or seconds of the processor: the losses where both have spent the smaller of "
    "the two budgets, interpolated; no schedule was adapted to it. Unseen points: the final loss on a draw that "
    "training never sees, and its ratio to the baseline's. Seconds: training alone. Seeds above include diverged runs; "
    "where only the baseline diverged, a seed is unknown. Other loss: the weight or kind of the conditions, or the law "
    "of the interior points, is not that of the baseline: the losses cannot be compared, the errors can. Accepted: "
    "accelerations accepted and not taken back, of those tried; with 0 a run repeats that without acceleration."
)


def summarize_pinn(groups: list[Group]) -> str:
    """Writes `summary.md` beside the records and returns the same as text for a terminal."""
    folder = groups[0].folder
    title = f"{folder.parent.name}, {folder.name}"
    cautions = {f"{group.trained}: {group.degenerate}" for group in groups if group.degenerate}
    title += f" - DEGENERATE EQUATION: {'; '.join(sorted(cautions))}" if cautions else ""
    page = Page(title)
    for group in groups:
        against = group.baseline.label if group.baseline is not None else f"{group.name} (not run)"
        page.section(f"{group.caution} - " * bool(group.caution) + f"{group.trained}, compared with {against}")
        if group.degenerate:
            page.say(group.degenerate, strong=True)
        page.say(f"{settings_line(group)}.")
        for header, rows in _tables(group):
            page.table(header, rows)
        diverged = diverged_note(group.variants)
        if diverged:
            page.say(f"Diverged: {diverged}.")
    whole = replace(groups[0], runs=[run for group in groups for run in group.runs])
    page.say(LEGEND)
    page.say(f"Source: {whole.source_line()}")
    return page.write(folder)


def _tables(group: Group) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Headers and rows: what each variant reached, the comparison with the baseline, and the learning rates."""
    measured = [(variant, measure(variant, group)) for variant in group.variants]
    errors = [f"relative L2 ({name})" for name in group.predictors]
    tables = [
        (
            ("variant", "final training loss", "on unseen points", *errors, "evaluations", "seconds"),
            _result_rows(group, measured),
        )
    ]
    if group.baseline is not None and len(group.variants) > 1:
        count = len(AGAINST) - (group.main_set is None)
        rows = [_comparison_row(group, variant, measures)[:count] for variant, measures in measured]
        tables.append((AGAINST[:count], rows))
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
        unseen = spread(measures.unseen, "{:.2e}", "diverged")
        rows.append((variant.label, loss, unseen, *errors, evaluations, spread(measures.seconds, "{:.1f}", "diverged")))
    names = dict.fromkeys(name for rivals in group.predictors.values() for name in rivals)
    for name in names:
        errors = [f"{rivals.get(name, np.nan):.2e}" for rivals in group.predictors.values()]
        rows.append((f"no network: {name}", "-", "-", *errors, "-", "-"))
    return rows


def _comparison_row(group: Group, variant: Variant, measures: Measures) -> tuple[str, ...]:
    accepted = accepted_candidates(variant)
    if not measures.shared:
        return (variant.label, "no seed in common", *"------", accepted, "-")
    iterations = spread(measures.iterations, "{:.0f}")
    if variant is group.baseline:
        return (variant.label, iterations, *"------", accepted, "-")
    error = spread(measures.error_ratio, "{:.3g}", "diverged")
    if has_other_loss(variant, group):
        return (variant.label, *(OTHER_LOSS,) * 7, accepted, error)
    ratios = (measures.ratio, *measures.at_equal.values(), measures.unseen_ratio)
    above = seeds_above(measures.ratio, TOLERANCE)
    return (variant.label, iterations, *(spread(each, "{:.3g}", "diverged") for each in ratios), above, accepted, error)


def _learning_rate_rows(group: Group, runs: list[Run]) -> list[tuple[str, ...]]:
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
