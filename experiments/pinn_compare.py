"""What the figures and the tables of physics-informed networks share: records, groups, and measures by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.compare import SECONDS, TRAIN, Records, Variant, commits_of, family_of, grouped, role_of, seeds_of
from experiments.record import Run, read_runs

EVALUATIONS = "metrics/evaluations"
ERROR = "relative_l2_"
"""Prefix of the errors at the end; the series begin with "metrics/validation/" in front of it."""


@dataclass(frozen=True)
class Group(Records):
    """Variants of one equation that are compared with the same baseline.

    Attributes:
        name: of the baseline.
        variants: in the order of the configuration.
        equation: in words.
        degenerate: why the equation says little; empty: it does not.
        predictors: relative L2 errors of the trivial predictors, by test set; the first set is the main one.
    """

    name: str
    variants: list[Variant]
    equation: str
    degenerate: str
    predictors: dict[str, dict[str, float]]

    @property
    def baseline(self) -> Variant | None:
        """The variant that the others are compared with, None if it was not run."""
        return next((variant for variant in self.variants if variant.name == self.name), None)

    @property
    def main_set(self) -> str | None:
        """Name of the main test set; None for an equation without a known solution."""
        return next(iter(self.predictors), None)

    @property
    def caution(self) -> str:
        """Names an equation that says little."""
        return "DEGENERATE" if self.degenerate else ""

    @property
    def explanation(self) -> str:
        """Why it does."""
        return self.degenerate

    @property
    def subject(self) -> str:
        """The equation."""
        return self.equation


def read_groups(folder: Path) -> list[Group]:
    """The records of a folder by equation and baseline, in the order of the configuration.

    Raises:
        ValueError: records that do not belong together: one variant, or the settings that all variants share, differ.
        OSError: an unreadable record.
    """
    runs = read_runs(folder)
    main, studies = grouped(runs)
    _check_variants(folder, main)
    _check_shared(folder, [run for group in main.values() for run in group])
    members: dict[tuple[str, str], list[Variant]] = {}
    for name, of_variant in sorted(main.items(), key=lambda item: (item[1][0].attributes["variant_index"], item[0])):
        first = of_variant[0]
        definition = first.config["variant"]
        variant = Variant(
            name=name,
            label=definition["label"],
            role=role_of(definition),
            family=family_of(definition["optimizer"]),
            runs={run.attributes["seed"]: run for run in of_variant},
        )
        members.setdefault((first.attributes["baseline"], first.attributes["data_digest"]), []).append(variant)
    groups = []
    for (baseline, digest), variants in members.items():
        own = [run for variant in variants for run in variant.runs.values()]
        attributes = own[0].attributes
        of_group = {
            study: [run for run in some if (run.attributes["baseline"], run.attributes["data_digest"])
                    == (baseline, digest)]
            for study, some in studies.items()
        }  # fmt: skip
        groups.append(
            Group(
                folder=folder,
                studies={study: some for study, some in of_group.items() if some},
                data_source=attributes["data_source"],
                seeds=seeds_of(own),
                commits=commits_of(own),
                name=baseline,
                variants=variants,
                equation=attributes["equation"],
                degenerate=attributes["degenerate"].removeprefix("degenerate: "),
                predictors=json.loads(attributes["predictors"]),
            )
        )
    if not groups:
        raise ValueError(f"{folder} holds runs of studies alone: run its variants as well")
    return groups


def _check_variants(folder: Path, main: dict[str, list[Run]]) -> None:
    """The seeds of a variant must have the same settings and the same equation."""
    for runs in main.values():
        settings: dict[str, Run] = {}
        for run in runs:
            config = {key: value for key, value in run.config.items() if key != "seed"}
            settings.setdefault(json.dumps([config, run.attributes["data_digest"]], sort_keys=True), run)
        if len(settings) > 1:
            _refuse(folder, "settings", [*settings.values()])


def _check_shared(folder: Path, runs: list[Run]) -> None:
    """A setting must be the same in all variants that do not override it."""
    for part in ("problem", "training"):
        seen: dict[str, dict[str, Run]] = {}
        for run in runs:
            overridden = run.config["variant"].get("overrides", {}).get(part, {})
            for key, value in run.config[part].items():
                if key not in overridden:
                    seen.setdefault(key, {}).setdefault(json.dumps(value, sort_keys=True), run)
        for key, values in seen.items():
            if len(values) > 1:
                _refuse(folder, f"{part}.{key}", [*values.values()])


def _refuse(folder: Path, what: str, runs: list[Run]) -> None:
    raise ValueError(
        f"{folder} holds records with different {what}, for instance {runs[0].path} and {runs[1].path}: "
        "run the experiment again, or keep trials apart with --set scale=NAME"
    )


@dataclass(frozen=True)
class Measures:
    """What the table says of one variant, by seed. A diverged run counts as infinitely bad.

    Attributes:
        loss: training loss at the end.
        errors: relative L2 errors at the end, by test set.
        evaluations: of the loss, trials included; inf for a diverged run.
        seconds: of training; likewise.
        iterations: first evaluated iteration from which on the loss is never above the final one of the baseline on the
            same seed; inf for never, NaN (unknown) if only the baseline diverged. The loss jumps with the points and
            between steps: the baseline itself may pass its final loss early, and leave it again. This and the following
            over the shared seeds.
        share: the same over the iterations of the baseline.
        ratio: final loss over the baseline's.
        at_evaluations: the same where both have spent the smaller of the two numbers of evaluations of the loss.
        at_seconds: likewise for training seconds.
        shared: seeds that the baseline has too.
    """

    loss: np.ndarray
    errors: dict[str, np.ndarray]
    evaluations: np.ndarray
    seconds: np.ndarray
    iterations: np.ndarray
    share: np.ndarray
    ratio: np.ndarray
    at_evaluations: np.ndarray
    at_seconds: np.ndarray
    shared: tuple[int, ...]


def measure(variant: Variant, group: Group) -> Measures:
    """Measures a variant by itself and against the baseline of its group."""
    runs = [variant.runs[seed] for seed in sorted(variant.runs)]
    baseline = group.baseline
    shared = tuple(sorted(set(variant.runs) & set(baseline.runs))) if baseline is not None else ()
    rows = [_against(variant.runs[seed], baseline.runs[seed]) for seed in shared] if baseline is not None else []
    iterations, share, ratio, at_evaluations, at_seconds = np.array(rows, dtype=float).reshape(-1, 5).T
    return Measures(
        loss=_ends(runs, TRAIN),
        errors={name: np.array([final_error(run, name) for run in runs]) for name in group.predictors},
        evaluations=_ends(runs, EVALUATIONS),
        seconds=_ends(runs, SECONDS),
        iterations=iterations,
        share=share,
        ratio=ratio,
        at_evaluations=at_evaluations,
        at_seconds=at_seconds,
        shared=shared,
    )


def _ends(runs: Iterable[Run], series: str) -> np.ndarray:
    return np.array([np.inf if run.diverged else run.series[series][-1] for run in runs])


def final_error(run: Run, test_set: str) -> float:
    """The relative L2 error at the end; inf for a diverged run."""
    error = float(run.attributes[ERROR + test_set])
    return error if np.isfinite(error) and not run.diverged else np.inf


def _against(own: Run, rival: Run) -> tuple[float, ...]:
    """Iterations to the rival's final loss, also as a share, and ratios of the losses: at the end, at equal cost."""
    if own.diverged or rival.diverged:
        return (np.inf if own.diverged else np.nan,) * 5
    goal = rival.series[TRAIN][-1]
    above = np.flatnonzero(~(own.series[TRAIN] <= goal))
    first = above[-1] + 1 if above.size else 0
    iterations = float(own.places[first]) if first < len(own.places) else np.inf
    ratios = [_ratio(own.series[TRAIN][-1], goal)]
    for cost in (EVALUATIONS, SECONDS):
        budget = min(own.series[cost][-1], rival.series[cost][-1])
        ratios.append(_ratio(_loss_at(own, cost, budget), _loss_at(rival, cost, budget)))
    return (iterations, iterations / rival.places[-1], *ratios)


def _ratio(own: float, rival: float) -> float:
    if own == rival:
        return 1.0
    return own / rival if rival > 0 else np.inf


def _loss_at(run: Run, cost: str, budget: float) -> float:
    """The training loss where the budget is spent, its logarithm interpolated between the evaluations.

    With the last evaluation before it two equal runs would differ by a whole interval, for their clocks differ.
    """
    tiny = np.finfo(float).tiny
    logarithms = np.log(np.maximum(run.series[TRAIN], tiny))
    return float(np.exp(np.interp(budget, run.series[cost], logarithms)))


def value_within(run: Run, series: str, cost: str, budget: float) -> float:
    """The last value of a series that was there when not more than the budget was spent; inf for a diverged run."""
    if run.diverged:
        return np.inf
    within = np.flatnonzero(run.series[cost] <= budget)
    return float(run.series[series][within[-1]]) if within.size else np.inf


def diverged_note(variants: Iterable[Variant]) -> str:
    """ "Adam: seed 3 at iteration 120; L-BFGS: ..."; empty if no run diverged."""
    notes = []
    for variant in variants:
        seeds = [
            f"seed {seed} at iteration {run.diverged_iteration}"
            for seed, run in sorted(variant.runs.items())
            if run.diverged
        ]
        if seeds:
            notes.append(f"{variant.label}: {', '.join(seeds)}")
    return "; ".join(notes)


def settings_line(group: Group) -> str:
    """Points and budget of the baseline, or of the first variant without one."""
    variant = group.baseline or group.variants[0]
    config = next(iter(variant.runs.values())).config
    problem: dict[str, Any] = config["problem"]
    every = problem["resample_every"]
    words = problem["sampler"].replace("_", " ")
    drawn = f"{words}, drawn anew every {every}" if every is not None else f"{words}, fixed"
    return (
        f"{problem['num_points']} + {problem['num_conditions']} points ({drawn}), "
        f"{config['training']['iterations']} iterations, {problem['dtype']}"
    )
