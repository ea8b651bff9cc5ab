"""What the figures and the tables of physics-informed networks share: records, groups, and measures by seed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pinn.equations import EQUATIONS
from experiments.records.compare import SECONDS, TRAIN, Records, Variant, check_same, grouped
from experiments.records.reading import Run, read_runs, say
from experiments.records.summarize import ratio_of
from experiments.runs.config import expand_runs, load_config
from experiments.runs.experiment import Experiment
from experiments.settings.run_config import identity_of

CONFIGS = Path(__file__).parents[1] / "configs"

EVALUATIONS = "metrics/evaluations"
COSTS = (EVALUATIONS, SECONDS, "timing/training_cpu_seconds")
"""Series of what a training spends."""
UNSEEN = "metrics/validation/loss"
ERROR = "relative_l2_"
"""Prefix of the errors at the end; the series begin with "metrics/validation/" in front of it."""
OF_POINTS = ("graded",)
"""Options of the suite's equations that say where points are drawn: the solution is the same."""
NOT_IN_LABEL = ("amplitude", "deviation")
"""Options that change a solution without a change of the equation's label."""


@dataclass(frozen=True)
class Group(Records):
    """Variants of one equation that are compared with the same baseline.

    Attributes:
        name: of the baseline.
        variants: in the order of the configuration, the baseline included, whatever it is compared with itself.
        predictors: relative L2 errors of the trivial predictors, by test set; the first set is the main one.
    """

    name: str
    variants: list[Variant]
    predictors: dict[str, dict[str, float]]

    @property
    def baseline(self) -> Variant | None:
        """The variant that the others are compared with, None if it was not run."""
        return next((variant for variant in self.variants if variant.name == self.name), None)

    @property
    def main_set(self) -> str | None:
        """Name of the main test set; None for an equation without a known solution."""
        return next(iter(self.predictors), None)


Key = tuple[str, str, str]
"""Of a group: its baseline, its equation in words, and what else tells its solution."""


def read_groups(folder: Path, experiment: Experiment, note: Callable[[str], None] = say) -> list[Group]:
    """Reads the records of `results/<experiment>/<scale>` and groups them by solution and baseline, as configured.

    A variant belongs to the group of its baseline, and to that of its own name, if another one is compared with it.
    `note` gets a line about each record that cannot be read.

    Raises:
        ValueError: records that do not belong together: one variant, or the settings that all variants share, differ.
        OSError: none of the records can be read.
    """
    runs = read_runs(folder, note)
    variants, studies = grouped(runs)
    for variant in variants:
        own = list(variant.runs.values())
        check_same(folder, "settings", own, [(_without_seed(run.config), run.attributes["data_digest"]) for run in own])
    _check_shared(folder, [run for variant in variants for run in variant.runs.values()])
    variants.sort(key=lambda variant: (variant.first.attributes["variant_index"], variant.name))
    is_as_configured = _are_as_configured(folder, runs, experiment)
    groups = []
    for key in dict.fromkeys(_key(variant.first) for variant in variants):
        members = [variant for variant in variants if key in _keys(variant)]
        own = [run for variant in members for run in variant.runs.values()]
        attributes = own[0].attributes
        of_group = {study: [run for run in some if _key(run) == key] for study, some in studies.items()}
        groups.append(
            Group(
                folder=folder,
                runs=own,
                studies={study: some for study, some in of_group.items() if some},
                name=key[0],
                variants=members,
                trained=key[1],
                degenerate=attributes["degenerate"].removeprefix("degenerate: "),
                predictors=json.loads(attributes["predictors"]),
                is_as_configured=is_as_configured,
            )
        )
    if not groups:
        raise ValueError(f"{folder} holds runs of studies alone: run its variants as well")
    return groups


def _key(run: Run) -> Key:
    return (run.attributes["baseline"], *solution_of(run))


def _keys(variant: Variant) -> tuple[Key, Key]:
    """The group of a variant, and the one whose baseline it is, which there need not be."""
    run = variant.first
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
    more = [f", {name} {value}" for name, value in options.items() if name in NOT_IN_LABEL and value != defaults[name]]
    return label + "".join(more), json.dumps([problem["equation"], defaults | options], sort_keys=True)


def objective_of(variant: Variant) -> tuple[Any, ...]:
    """What the recorded loss is, in expectation: losses are divided by each other where this is the same.

    Numbers of points, sampler and dtype change how it is estimated. Slope weights are left out of recorded losses.
    """
    problem = variant.first.config["problem"]
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


def _check_shared(folder: Path, runs: list[Run]) -> None:
    """A setting must be the same in all variants that do not override it."""
    for part in ("problem", "training"):
        for key in dict.fromkeys(key for run in runs for key in run.config[part]):
            own = [run for run in runs if key not in run.config["variant"].get("overrides", {}).get(part, {})]
            own = [run for run in own if key in run.config[part]]
            values = [json.dumps(run.config[part][key], sort_keys=True) for run in own]
            check_same(folder, f"{part}.{key}", own, values)


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
        at_equal: the same where both have spent the smaller of the two budgets, by the series of the cost: evaluations
            of the loss, training seconds, and those of the processor, which other work on the machine hardly changes;
            NaN for records without it.
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
    at_equal: dict[str, np.ndarray]
    unseen: np.ndarray
    unseen_ratio: np.ndarray
    error_ratio: np.ndarray
    shared: tuple[int, ...]


def measure(variant: Variant, group: Group) -> Measures:
    """Measures a variant by itself and against the baseline of its group."""
    runs = [variant.runs[seed] for seed in sorted(variant.runs)]
    rivals = group.baseline.runs if group.baseline is not None else {}
    shared = tuple(sorted(set(variant.runs) & set(rivals)))
    has_same_loss = not has_other_loss(variant, group)

    def against(measured: Callable[[Run, Run], float]) -> np.ndarray:
        """A number for each shared seed, by the run and the rival; NaN where their losses are not the same."""
        return np.array([measured(variant.runs[seed], rivals[seed]) if has_same_loss else np.nan for seed in shared])

    def error(run: Run) -> float:
        return np.nan if group.main_set is None else final_error(run, group.main_set)

    return Measures(
        loss=np.array([_end(run, TRAIN) for run in runs]),
        errors={name: np.array([final_error(run, name) for run in runs]) for name in group.predictors},
        evaluations=np.array([_end(run, EVALUATIONS) for run in runs]),
        seconds=np.array([_end(run, SECONDS) for run in runs]),
        iterations=against(_iterations),
        ratio=against(partial(_ratio_at_end, TRAIN)),
        at_equal={cost: against(partial(_ratio_at_equal, cost)) for cost in COSTS},
        unseen=np.array([_end(run, UNSEEN) for run in runs]),
        unseen_ratio=against(partial(_ratio_at_end, UNSEEN)),
        error_ratio=np.array([ratio_of(error(variant.runs[seed]), error(rivals[seed])) for seed in shared]),
        shared=shared,
    )


def _end(run: Run, series: str) -> float:
    """The last value; inf for a diverged run, NaN for a record without the series."""
    return np.inf if run.diverged else float(run.series.get(series, [np.nan])[-1])


def final_error(run: Run, test_set: str) -> float:
    error = float(run.attributes[ERROR + test_set])
    return error if np.isfinite(error) and not run.diverged else np.inf


def _ratio_at_end(series: str, own: Run, rival: Run) -> float:
    return ratio_of(_end(own, series), _end(rival, series))


def _iterations(own: Run, rival: Run) -> float:
    """Iterations after which the loss stays at or below the final one of the rival."""
    if own.diverged or rival.diverged:
        return np.inf if own.diverged else np.nan
    above = np.flatnonzero(~(own.series[TRAIN] <= rival.series[TRAIN][-1]))
    first = above[-1] + 1 if above.size else 0
    return float(own.places[first]) if first < len(own.places) else np.inf


def _ratio_at_equal(cost: str, own: Run, rival: Run) -> float:
    """The ratio of the losses where both have spent the smaller of the two budgets.

    The logarithms of the losses are interpolated between the evaluations. With the last evaluation before the budget
    two equal runs would differ by a whole interval, because their clocks differ.
    """
    if own.diverged or rival.diverged:
        return np.inf if own.diverged else np.nan
    if cost not in own.series or cost not in rival.series:
        return np.nan
    budget = min(own.series[cost][-1], rival.series[cost][-1])
    losses = [np.log(np.maximum(run.series[TRAIN], np.finfo(float).tiny)) for run in (own, rival)]
    mine, other = (np.interp(budget, run.series[cost], loss) for run, loss in zip((own, rival), losses, strict=True))
    return ratio_of(float(np.exp(mine)), float(np.exp(other)))


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
    config = (group.baseline or group.variants[0]).first.config
    problem: dict[str, Any] = config["problem"]
    sizes, every = problem["hidden_sizes"], problem["resample_every"]
    alike = len(set(sizes)) == 1 and len(sizes) > 1
    network = f"{len(sizes)} x {sizes[0]}" if alike else "-".join(map(str, sizes))
    drawn = "fixed" if every is None else f"drawn again every {every}"
    return (
        f"MLP of {network}, {problem['num_points']} + {problem['num_conditions']} points "
        f"({problem['sampler'].replace('_', ' ')}, {drawn}), {config['training']['iterations']} iterations, "
        f"{problem['dtype']}"
    )
