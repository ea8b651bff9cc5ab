"""The table of an experiment, from HDF5 records alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.records.compare import SECONDS, TRAIN, VALIDATION, Comparison, Variant, plain_of
from experiments.records.text_table import Page


def header(loss_name: str) -> tuple[str, ...]:
    return (
        "variant",
        "epochs to plain's final loss",
        "seconds to it",
        f"final training {loss_name}",
        f"final validation {loss_name}",
        "seeds above plain",
        "time per epoch against plain",
    )


@dataclass(frozen=True)
class Measures:
    """What the table says of one variant; arrays over the seeds that the plain variant has too.

    Attributes:
        epochs: first epoch with a training loss not above the plain run's final one of the same seed; inf for never
            and for a diverged run, NaN (unknown) if only the plain run diverged.
        seconds: training seconds until then; inf and NaN likewise.
        train: final training loss, inf for a diverged run.
        validation: final validation loss.
        train_ratio: final training loss over the plain run's; inf and NaN likewise.
        overhead: training seconds (wall clock) over the plain run's, minus 1.
        seeds: which.
    """

    epochs: np.ndarray
    seconds: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    train_ratio: np.ndarray
    overhead: np.ndarray
    seeds: tuple[int, ...]


def measure(variant: Variant, plain: Variant) -> Measures:
    """Compares a variant with the plain one, seed by seed; ValueError where they have no seed in common."""
    seeds = tuple(sorted(set(variant.runs) & set(plain.runs)))
    if not seeds:
        raise ValueError(f"{variant.name} and {plain.name} have no seed in common: run both with the same seeds")
    rows = []
    for seed in seeds:
        own, rival = variant.runs[seed], plain.runs[seed]
        losses, goal = _finite(own.series[TRAIN]), float(_finite(rival.series[TRAIN])[-1])
        ratio = ratio_of(float(losses[-1]), goal)
        reached = np.flatnonzero(losses <= goal)
        epoch = ratio if not np.isfinite(ratio) else float(reached[0]) if reached.size else np.inf
        seconds = float(own.series[SECONDS][int(epoch)]) if np.isfinite(epoch) else epoch
        validation = _finite(own.series[VALIDATION])[-1]
        overhead = own.series[SECONDS][-1] / rival.series[SECONDS][-1] - 1.0  # NaN where one of them diverged
        rows.append((epoch, seconds, losses[-1], validation, ratio, overhead))
    epochs, seconds_to_it, train, validations, ratios, overheads = np.array(rows).T
    return Measures(epochs, seconds_to_it, train, validations, ratios, overheads, seeds)


def ratio_of(own: float, rival: float) -> float:
    """own / rival; inf if the own run diverged, NaN if only the rival did, or if one of the values is not known."""
    if np.isinf(own):
        return np.inf
    if np.isinf(rival) or np.isnan(own) or np.isnan(rival):
        return np.nan
    if own == rival:
        return 1.0
    return own / rival if rival > 0 else np.inf


def seeds_above(ratios: np.ndarray, limit: float) -> str:
    """ "1 of 5, 2 unknown": the seeds whose ratio is above the limit."""
    unknown = int(np.isnan(ratios).sum())
    return f"{int((ratios > limit).sum())} of {len(ratios)}" + (f", {unknown} unknown" if unknown else "")


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.inf)


def summarize(comparison: Comparison, loss_name: str = "loss") -> str:
    """Writes `summary.md` beside the records and returns the same as text for a terminal."""
    page = Page(f"{comparison.folder.parent.name}, {comparison.folder.name}")
    if comparison.is_surrogate:
        page.say(
            "SURROGATE DATA: random numbers with the statistics of the real file, which was not found.", strong=True
        )
    for family, variants in comparison.families.items():
        page.section(family)
        page.table(header(loss_name), family_rows(variants))
    page.say(
        "Median over the seeds [minimum .. maximum]. Seconds are training seconds, without evaluation. "
        f"'Above plain' counts seeds whose final training {loss_name} is higher than plain's or which diverged; a seed "
        "on which only plain diverged is unknown."
    )
    page.say(f"Source: {comparison.source_line()}")
    return page.write(comparison.folder)


def family_rows(variants: list[Variant]) -> list[tuple[str, ...]]:
    """Table rows of one family, plain first; without a plain variant only what needs no comparison is shown."""
    plain = plain_of(variants)
    rows: list[tuple[str, ...]] = []
    for variant in variants:
        measures = measure(variant, plain if plain is not None else variant)
        compared = plain is not None
        rows.append(
            (
                variant.label,
                spread(measures.epochs, "{:.0f}") if compared else "-",
                spread(measures.seconds, "{:.2f}") if compared else "-",
                spread(measures.train, "{:.2e}"),
                spread(measures.validation, "{:.2e}"),
                seeds_above(measures.train_ratio, 1.0) if compared and variant is not plain else "-",
                spread(measures.overhead, "{:+.0%}") if compared and variant is not plain else "-",
            )
        )
    return rows


def spread(values: np.ndarray, form: str, infinite: str = "never") -> str:
    """ "median [minimum .. maximum]"; `infinite` stands for infinity, and values that are not known are left out."""
    known = values[~np.isnan(values)]
    if not known.size:
        return "unknown"

    def show(value: float) -> str:
        return form.format(value) if np.isfinite(value) else infinite

    return f"{show(float(np.median(known)))} [{show(known.min())} .. {show(known.max())}]"
