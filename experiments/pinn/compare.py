"""What the figures and the tables of physics-informed networks share: records, groups, and measures by seed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pinn.equations import EQUATIONS
from experiments.records.compare import (
    SECONDS,
    TRAIN,
    Records,
    Variant,
    commits_of,
    family_of,
    grouped,
    role_of,
    seeds_of,
)
from experiments.records.reading import Run, read_runs, say
from experiments.runs.config import expand_runs, load_config
from experiments.runs.experiment import Experiment
from experiments.settings.run_config import identity_of

CONFIGS = Path(__file__).parents[1] / "configs"

EVALUATIONS = "metrics/evaluations"
UNSEEN = "metrics/validation/loss"
_UNKNOWN = np.full(1, np.nan)
ERROR = "relative_l2_"
"""Prefix of the errors at the end; the series begin with "metrics/validation/" in front of it."""
OF_POINTS = ("graded",)
"""Options of the suite's equations that say where points are drawn: the solution is the same."""
UNTOLD = ("amplitude", "deviation")
"""Options that change a solution and are not told by the label of the equation."""


@dataclass(frozen=True)
class Group(Records):
    """Variants of one equation that are compared with the same baseline.

    Attributes:
        name: of the baseline.
        variants: in the order of the configuration, the baseline included, whatever it is compared with itself.
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


Key = tuple[str, str, str]
"""Of a group: its baseline, its equation in words, and what else tells its solution."""


def read_groups(folder: Path, experiment: Experiment, note: Callable[[str], None] = say) -> list[Group]:
    """Reads the records of a folder and groups them by solution and baseline, in the order of the configuration.

    A variant belongs to the group of its baseline, and to that of its own name, if another one is compared with it.

    Args:
        folder: results/<experiment>/<scale>.
        experiment: reads the configuration that the records are compared with.
        note: gets a line about each record that cannot be read.

    Raises:
        ValueError: records that do not belong together: one variant, or the settings that all variants share, differ.
        OSError: none of the records can be read.
    """
    runs = read_runs(folder, note)
    main, studies = grouped(runs)
    _check_variants(folder, main)
    _check_shared(folder, [run for group in main.values() for run in group])
    variants = []
    for name, of_variant in sorted(main.items(), key=lambda item: (item[1][0].attributes["variant_index"], item[0])):
        definition = of_variant[0].config["variant"]
        variants.append(
            Variant(
                name=name,
                label=definition["label"],
                role=role_of(definition),
                family=family_of(definition["optimizer"]),
                runs={run.attributes["seed"]: run for run in of_variant},
            )
        )
    is_as_configured = _are_as_configured(folder, runs, experiment)
    groups = []
    for key in dict.fromkeys(_key(first_run(variant)) for variant in variants):
        members = [variant for variant in variants if key in _keys(variant)]
        own = [run for variant in members for run in variant.runs.values()]
        attributes = own[0].attributes
        of_group = {study: [run for run in some if _key(run) == key] for study, some in studies.items()}
        groups.append(
            Group(
                folder=folder,
                studies={study: some for study, some in of_group.items() if some},
                data_source=attributes["data_source"],
                seeds=seeds_of(own),
                commits=commits_of(own),
                name=key[0],
                variants=members,
                equation=key[1],
                degenerate=attributes["degenerate"].removeprefix("degenerate: "),
                predictors=json.loads(attributes["predictors"]),
                is_as_configured=is_as_configured,
            )
        )
    if not groups:
        raise ValueError(f"{folder} holds runs of studies alone: run its variants as well")
    return groups


def first_run(variant: Variant) -> Run:
    """One run of a variant, for what is the same in all of them."""
    return next(iter(variant.runs.values()))


def _key(run: Run) -> Key:
    """The group of a run."""
    return (run.attributes["baseline"], *solution_of(run))


def _keys(variant: Variant) -> tuple[Key, Key]:
    """The group of a variant, and the one whose baseline it is, which there need not be."""
    run = first_run(variant)
    return _key(run), (variant.name, *solution_of(run))


def solution_of(run: Run) -> tuple[str, str]:
    """The equation in words, and a text that is the same for two runs if their equations and solutions are.

    Options of the suite's equations are compared by value, defaults filled in, without those of the points. What the
    options of a user's equation mean is not known: any change of them, or of its file, makes another one.
    """
    label, problem = run.attributes["equation"], run.config["problem"]
    if problem["equation"] not in EQUATIONS:
        return label, run.attributes["data_digest"]
    parameters = inspect.signature(EQUATIONS[problem["equation"]]).parameters
    defaults = {name: f"{parameter.default:.9g}" for name, parameter in parameters.items() if name not in OF_POINTS}
    options = {name: f"{problem['options'][name]:.9g}" for name in defaults if name in problem["options"]}
    untold = [f", {name} {value}" for name, value in options.items() if name in UNTOLD and value != defaults[name]]
    return label + "".join(untold), json.dumps([problem["equation"], defaults | options], sort_keys=True)


def objective_of(variant: Variant) -> tuple[Any, ...]:
    """What the recorded loss is, in expectation: losses are divided by each other where this is the same.

    Numbers of points, sampler and dtype change how it is estimated. Slope weights are left out of recorded losses.
    """
    problem = first_run(variant).config["problem"]
    weight = problem["condition_weight"] if problem["num_conditions"] > 0 else None
    points = [float(problem["options"].get(name, 0)) for name in OF_POINTS]
    if problem["equation"] not in EQUATIONS:
        points = []  # within a group all of their options are the same
    return (problem["conditions"], weight, problem["adaptive_pool"], *points)


def has_other_loss(variant: Variant, group: Group) -> bool:
    """Whether the loss of a variant is another one than that of the baseline, if it was run."""
    return group.baseline is not None and objective_of(variant) != objective_of(group.baseline)


def accepted_candidates(variant: Variant) -> str:
    """ "12 of 39": accelerations accepted and not taken back, of those tried, medians over seeds; "-" without any."""
    counts = [
        (_last(run, "accepted") - _last(run, "reverted"), _last(run, "attempts"))
        for run in variant.runs.values()
        if "acceleration/accepted" in run.series
    ]
    return "{:.0f} of {:.0f}".format(*np.median(counts, axis=0)) if counts else "-"


def _last(run: Run, counter: str) -> float:
    """The count at the end; that of a diverged run is the last one that is known."""
    values = run.series.get(f"acceleration/{counter}", np.zeros(1))
    return float(values.max(where=np.isfinite(values), initial=0.0))


def _are_as_configured(folder: Path, runs: list[Run], experiment: Experiment) -> bool:
    """Whether the configuration's file has the settings of all runs, seeds apart; True if there is no such file."""
    path = CONFIGS / folder.parent.name / f"{folder.name}.yaml"
    if not path.is_file():
        return True
    try:
        known = {
            _without_seed(json.loads(run.as_json())) for run in expand_runs(load_config(path, lambda *_: experiment))
        }
    except ValueError:  # not of this version
        return False
    return all(_without_seed(run.config) in known for run in runs)


def _without_seed(config: dict[str, Any]) -> str:
    return identity_of({key: value for key, value in config.items() if key != "seed"})


def _check_variants(folder: Path, main: dict[str, list[Run]]) -> None:
    """The seeds of a variant must have the same settings and the same equation."""
    for runs in main.values():
        settings: dict[str, Run] = {}
        for run in runs:
            settings.setdefault(_without_seed(run.config) + run.attributes["data_digest"], run)
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
            same seed; inf for never, NaN (unknown) if only the baseline diverged or if the baseline has another loss.
            The loss jumps with the points and between steps: the baseline itself may pass its final loss early, and
            leave it again. This and the following over the shared seeds.
        ratio: final loss over the baseline's.
        at_evaluations: the same where both have spent the smaller of the two numbers of evaluations of the loss.
        at_seconds: likewise for training seconds.
        unseen: training loss on points that training never sees, at the end; NaN for records without it.
        unseen_ratio: the same over the baseline's.
        error_ratio: relative L2 error at the end on the main test set over the baseline's, whatever their losses are.
        shared: seeds that the baseline has too.
    """

    loss: np.ndarray
    errors: dict[str, np.ndarray]
    evaluations: np.ndarray
    seconds: np.ndarray
    iterations: np.ndarray
    ratio: np.ndarray
    at_evaluations: np.ndarray
    at_seconds: np.ndarray
    unseen: np.ndarray
    unseen_ratio: np.ndarray
    error_ratio: np.ndarray
    shared: tuple[int, ...]


def measure(variant: Variant, group: Group) -> Measures:
    """Measures a variant by itself and against the baseline of its group."""
    runs = [variant.runs[seed] for seed in sorted(variant.runs)]
    baseline = group.baseline
    shared = tuple(sorted(set(variant.runs) & set(baseline.runs))) if baseline is not None else ()
    pairs = [(variant.runs[seed], baseline.runs[seed]) for seed in shared] if baseline is not None else []
    other = has_other_loss(variant, group)
    rows = [(np.nan,) * 4 if other else _against(own, rival) for own, rival in pairs]
    iterations, ratio, at_evaluations, at_seconds = np.array(rows, dtype=float).reshape(-1, 4).T
    return Measures(
        loss=_ends(runs, TRAIN),
        errors={name: np.array([final_error(run, name) for run in runs]) for name in group.predictors},
        evaluations=_ends(runs, EVALUATIONS),
        seconds=_ends(runs, SECONDS),
        iterations=iterations,
        ratio=ratio,
        at_evaluations=at_evaluations,
        at_seconds=at_seconds,
        unseen=_ends(runs, UNSEEN),
        unseen_ratio=np.array([np.nan if other else _unseen_ratio(own, rival) for own, rival in pairs]),
        error_ratio=np.array([_error_ratio(own, rival, group.main_set) for own, rival in pairs]),
        shared=shared,
    )


def _ends(runs: Iterable[Run], series: str) -> np.ndarray:
    """Last values; NaN for records without the series."""
    return np.array([np.inf if run.diverged else run.series.get(series, _UNKNOWN)[-1] for run in runs])


def _unseen_ratio(own: Run, rival: Run) -> float:
    if own.diverged or rival.diverged:
        return np.inf if own.diverged else np.nan
    mine, other = (run.series.get(UNSEEN, _UNKNOWN)[-1] for run in (own, rival))
    return float("nan") if np.isnan([mine, other]).any() else _ratio(mine, other)


def final_error(run: Run, test_set: str) -> float:
    """The relative L2 error at the end; inf for a diverged run."""
    error = float(run.attributes[ERROR + test_set])
    return error if np.isfinite(error) and not run.diverged else np.inf


def _against(own: Run, rival: Run) -> tuple[float, ...]:
    """Iterations to the rival's final loss, and ratios of the losses: at the end, at equal cost."""
    if own.diverged or rival.diverged:
        return (np.inf if own.diverged else np.nan,) * 4
    goal = rival.series[TRAIN][-1]
    above = np.flatnonzero(~(own.series[TRAIN] <= goal))
    first = above[-1] + 1 if above.size else 0
    iterations = float(own.places[first]) if first < len(own.places) else np.inf
    ratios = [_ratio(own.series[TRAIN][-1], goal)]
    for cost in (EVALUATIONS, SECONDS):
        budget = min(own.series[cost][-1], rival.series[cost][-1])
        ratios.append(_ratio(_loss_at(own, cost, budget), _loss_at(rival, cost, budget)))
    return (iterations, *ratios)


def _error_ratio(own: Run, rival: Run, test_set: str | None) -> float:
    """The own error over the rival's; NaN (unknown) without a test set, or if only the rival diverged."""
    if test_set is None:
        return np.nan
    mine, other = final_error(own, test_set), final_error(rival, test_set)
    if np.isinf(mine) or np.isinf(other):
        return np.inf if np.isinf(mine) else np.nan
    return _ratio(mine, other)


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
    config = first_run(variant).config
    problem: dict[str, Any] = config["problem"]
    every = problem["resample_every"]
    words = problem["sampler"].replace("_", " ")
    drawn = f"{words}, drawn anew every {every}" if every is not None else f"{words}, fixed"
    return (
        f"{problem['num_points']} + {problem['num_conditions']} points ({drawn}), "
        f"{config['training']['iterations']} iterations, {problem['dtype']}"
    )
