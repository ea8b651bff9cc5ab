"""The table of image classification, from HDF5 records alone."""

from __future__ import annotations

import numpy as np

from experiments.records.compare import SECONDS, VALIDATION, Comparison, Variant, plain_of
from experiments.records.reading import Run
from experiments.records.summarize import spread
from experiments.records.text_table import Page

TOP1, TOP5, STALE_TOP1 = (f"metrics/validation/{name}" for name in ("top1", "top5", "stale_top1"))
INPUT, ACCELERATION, EVALUATION = (f"timing/{name}_seconds" for name in ("input", "acceleration", "evaluation"))
NUM_IMAGES = "metrics/validation/num_images"
RATE = "timing/images_per_second"
PARTS = ("network", "acceleration", "input", "evaluation")
HEADER = (
    "variant",
    "final validation loss",
    "top-1 (%)",
    "top-5 (%)",
    "top-1, stale statistics (%)",
    "epochs to plain's final validation loss",
    "seconds to it",
    "images/s",
    "time in AA, input, evaluation (%)",
    "candidates taken of tried",
)


def total_seconds(run: Run) -> np.ndarray:
    """Seconds of training and evaluation up to each epoch."""
    return run.series[SECONDS] + _or_zero(run, EVALUATION)


def images_per_second(run: Run) -> float:
    """Median over the epochs but the first, in which machinery warms up; with acceleration and waiting for input."""
    rates = run.series[RATE][1:]
    known = rates[np.isfinite(rates)]
    return float(np.median(known[1:] if len(known) > 1 else known)) if len(known) else np.nan


def cost_shares(variant: Variant) -> dict[str, np.ndarray]:
    """Shares of the time of a run by part, over the seeds; evaluation includes new statistics of BatchNorm."""
    rows = []
    for run in variant.runs.values():
        evaluation, acceleration, waiting = (_last(_or_zero(run, name)) for name in (EVALUATION, ACCELERATION, INPUT))
        training = _last(run.series[SECONDS])
        parts = np.array([training - acceleration - waiting, acceleration, waiting, evaluation])
        rows.append(parts / (training + evaluation))
    return dict(zip(PARTS, np.array(rows).T, strict=True))


def _or_zero(run: Run, name: str) -> np.ndarray:
    return run.series.get(name, np.zeros(len(run.places)))


def _last(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else np.nan


def summarize_images(comparison: Comparison) -> str:
    """Writes `summary.md` beside the records and returns the same as text for a terminal."""
    page = Page(f"{comparison.folder.parent.name}, {comparison.folder.name}")
    for family, variants in comparison.families.items():
        page.section(family)
        page.table(HEADER, [_row(variant, plain_of(variants)) for variant in variants])
    run = comparison.variants[0].first
    about = run.attributes
    page.say(
        f"{about['classification']}, {about['num_classes']} classes, {about['num_train_images']} training and "
        f"{about['num_validation_images']} validation images, batches of {about['batch_images']}, "
        f"{run.config['training']['epochs']} epochs, {about['world_size']} ranks, {about['devices']}. Median over the "
        f"seeds [minimum .. maximum]. Every accuracy counts {_counted(comparison)}; all but the stale one are with "
        "statistics of BatchNorm computed for the weights. Seconds include the evaluations; images/s do not."
    )
    page.say(f"Source: {comparison.source_line()}")
    return page.write(comparison.folder)


def _counted(comparison: Comparison) -> str:
    """Which validation images an accuracy counts, in words."""
    runs = [run for variant in comparison.variants for run in variant.runs.values() if not run.diverged]
    shares = [(int(run.series[NUM_IMAGES][-1]), int(run.attributes["num_validation_images"])) for run in runs]
    if all(counted == total for counted, total in shares):
        return "all validation images once"
    counted, total = min(shares)
    return f"every validation image that can be read once ({counted} of {total})"


def _row(variant: Variant, plain: Variant | None) -> tuple[str, ...]:

    def final(name: str, factor: float = 1.0, worst: float = np.inf) -> np.ndarray:
        values = [factor * run.series[name][-1] if not run.diverged else worst for run in variant.runs.values()]
        return np.array(values)

    shares = cost_shares(variant)
    percent = ", ".join(f"{100 * float(np.nanmedian(shares[part])):.1f}" for part in PARTS[1:])
    epochs = seconds = "-"
    if plain is not None:
        reached = np.array(
            [_reached(run, plain.runs[seed]) for seed, run in variant.runs.items() if seed in plain.runs]
        )
        if len(reached):
            epochs, seconds = spread(reached[:, 0], "{:.0f}"), spread(reached[:, 1], "{:.0f}")
    taken = "-"
    if variant.role.startswith(("aadl", "published")):
        counts = [
            tuple(int(_last(_or_zero(run, f"acceleration/{name}"))) for name in ("accepted", "reverted", "attempts"))
            for run in variant.runs.values()
        ]
        accepted, reverted, attempts = (int(np.median(column)) for column in zip(*counts, strict=True))
        taken = f"{accepted} of {attempts}" + (f", {reverted} taken back" if reverted else "")
    return (
        variant.label,
        spread(final(VALIDATION), "{:.3f}", "diverged"),
        spread(final(TOP1, 100, np.nan), "{:.1f}"),
        spread(final(TOP5, 100, np.nan), "{:.1f}"),
        spread(final(STALE_TOP1, 100, np.nan), "{:.1f}"),
        epochs,
        seconds,
        spread(np.array([images_per_second(run) for run in variant.runs.values()]), "{:.0f}"),
        percent,
        taken,
    )


def _reached(run: Run, plain: Run) -> tuple[float, float]:
    """First epoch, and seconds until then, with a validation loss not above plain's final one; inf for never."""
    if plain.diverged:
        return np.nan, np.nan
    places = np.flatnonzero(run.series[VALIDATION] <= plain.series[VALIDATION][-1])
    if run.diverged or not places.size:
        return np.inf, np.inf
    return float(places[0]), float(total_seconds(run)[places[0]])
