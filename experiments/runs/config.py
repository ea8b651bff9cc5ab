"""Configurations: from a YAML file and `--set` to a checked `ExperimentConfig`, and from that to its runs.

Every mistake raises ValueError here, before data or a device is touched. The message names the file or the `--set`, the
key, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.records.reading import say
from experiments.records.tensorboard import check_tensorboard
from experiments.runs.experiment import Experiment
from experiments.settings.kinds import Component, Name, in_steps
from experiments.settings.overrides import read_overridden
from experiments.settings.run_config import ExperimentConfig, RunConfig, SecondStage, VariantConfig
from experiments.settings.schema import at, read_settings, refuse_unknown
from experiments.training.components import (
    check_acceleration,
    check_component,
    check_optimizer,
    check_scheduler,
    optimizer_class,
    solves_residuals,
    takes,
)
from experiments.training.optimizers import is_schedule_free

FindExperiment = Callable[[str, Mapping[str, Any]], Experiment]
"""(name, raw settings of the problem) -> the experiment, see `experiments.catalog.find_experiment`."""
Note = Callable[[str], None]
"""Takes a line for the user."""
OF_SOME_EXPERIMENTS = ("mean_epochs", "then", "baseline", "problem", "training")
"""Keys of a variant that `Experiment.variant_keys` may allow."""


def load_config(
    path: str | Path, find: FindExperiment, overrides: Sequence[str] = (), note: Note | None = None
) -> ExperimentConfig:
    """Reads and checks a configuration; `find` finds its experiment.

    Overrides are texts `key=value`, the key with dots (`training.epochs=5`), the value in YAML. `seeds=0-9` sets the
    seeds; `variants=plain,other` keeps the named variants and, since they may need the others, no study. `note` is
    called with a line about each study and variant that an override does not reach; None prints the line on stderr.

    Raises:
        ValueError: unknown key, wrong type, value out of range, invalid YAML.
        OSError: the file cannot be read.
    """

    raw, selected = read_overridden(path, overrides)
    try:
        config = parse_config(raw, find, Path(path).parent, selected)
    except ValueError as error:
        raise ValueError(f"{_source_of(str(error), path, find, overrides)}: {error}") from None
    if selected is not None and raw.get("studies"):
        (note or say)("--set variants leaves out the studies of the configuration")
    for text in overrides:
        _say_what_is_not_reached(config, text.partition("=")[0].strip(), note or say)
    return config


def _source_of(mistake: str, path: str | Path, find: FindExperiment, overrides: Sequence[str]) -> str:
    """What brings a mistake in: the file, if it has it by itself, or the first override with which it is there."""
    sources = [str(path), *(f"--set {text}" for text in overrides)]
    for number in range(len(overrides)):
        raw, selected = read_overridden(path, overrides[:number])
        try:
            parse_config(raw, find, Path(path).parent, selected)
        except ValueError as error:
            if str(error) == mistake:
                return sources[number]
    return sources[-1]


def _say_what_is_not_reached(config: ExperimentConfig, key: str, note: Note) -> None:
    """Names the variants that an override does not reach, because they have the setting for themselves."""
    part, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    own = [variant for variant, settings in config.variants.items() if name in settings.overrides.get(part, {})]
    if own:
        note(f"--set {key}: these variants keep their own {part}.{name}: {', '.join(own)}")


def parse_config(
    raw: Mapping[str, Any], find: FindExperiment, folder: str | Path = ".", only: Sequence[str] | None = None
) -> ExperimentConfig:
    """Checks a raw mapping, as YAML gives it, and returns the configuration.

    Args:
        raw: the mapping.
        find: finds its experiment.
        folder: where its file is; the path of a user's equation starts there.
        only: names of the variants to keep and to check, in this order, without studies; None keeps all.

    Raises:
        ValueError: unknown key, wrong type, value out of range; the message names the key.
    """
    if "experiment" not in raw:
        raise ValueError("experiment is missing")
    raw = {"problem": {}, "training": {}, **raw}
    problem = raw["problem"] if isinstance(raw["problem"], Mapping) else {}
    kind = find(read_settings(Name, raw["experiment"], "experiment"), problem)
    _refuse_keys_of_other_experiments(raw, kind)
    form = ExperimentConfig[kind.problem_settings, kind.training_settings]  # type: ignore[name-defined]
    config: ExperimentConfig = read_settings(form, raw, context={"kind": kind, "folder": str(folder)})
    if config.save.tensorboard:
        check_tensorboard()
    config = config.completed(only)
    for name in config.variants:
        _check_variant(config, name)
    return config


def _refuse_keys_of_other_experiments(raw: Mapping[str, Any], kind: Experiment) -> None:
    """Comes before the settings are read, because their classes know the keys of all experiments."""
    keys = {
        key: field.default
        for key, field in VariantConfig.model_fields.items()
        if key in kind.variant_keys or key not in OF_SOME_EXPERIMENTS
    }
    variants, studies = raw.get("variants"), raw.get("studies")
    for name, variant in variants.items() if isinstance(variants, Mapping) else ():
        if isinstance(variant, Mapping):
            with at(f"variants.{name}"):
                refuse_unknown(variant, keys)
    if isinstance(studies, Mapping):
        with at("studies"):
            refuse_unknown(studies, dict.fromkeys(kind.studies))


def _check_variant(config: ExperimentConfig, name: str) -> None:
    """Refuses what only torch, aadl or the experiment can judge."""
    kind, variant, where = config.kind, config.variants[name], f"variants.{name}"
    _check_stage(variant, kind, where)
    if variant.published is not None:
        with at(f"{where}.published"):
            in_steps(variant.published.model_dump(), kind.nominal_steps)
    if variant.then is not None:
        _check_stage(variant.then, kind, f"{where}.then")
        if is_schedule_free(optimizer_class(variant.optimizer.name)):
            raise ValueError(
                f"{where}.then must be null after {variant.optimizer.name}, whose result is no point of its path"
            )
    problem, training = config.settings_of(name)
    scheduler = getattr(training, "scheduler", None)
    if scheduler is not None:
        if not takes(variant.optimizer.name, "lr"):
            raise ValueError(
                f"{where}.training.scheduler must be null for {variant.optimizer.name}, which has no learning rate, "
                f"got {scheduler.name}"
            )
        with at(f"{where}.training.scheduler" if "scheduler" in variant.training else "training.scheduler"):
            check_scheduler(scheduler, check_optimizer(variant.optimizer))
    with at(where):
        kind.check(problem, training, variant)
    study = config.studies.learning_rate
    if study is None or name not in study.variants:
        return
    if not takes(variant.optimizer.name, "lr"):
        raise ValueError(
            f"studies.learning_rate: {where} must have an optimizer with a learning rate lr, got "
            f"{variant.optimizer.name}"
        )
    for rate in study.rates:
        with at(f"studies.learning_rate: {where} with lr {rate:g}"):
            check_optimizer(variant.with_rate(rate).optimizer)


def _check_stage(stage: VariantConfig | SecondStage, kind: Experiment, where: str) -> None:
    with at(f"{where}.optimizer"):
        check_component(stage.optimizer, kind.optimizers())
        check_optimizer(stage.optimizer)
    if stage.acceleration is None:
        return
    with at(f"{where}.acceleration"):
        if solves_residuals(stage.acceleration) and not kind.is_least_squares:
            raise ValueError(
                "acceleration_type must not be nonlinear_gmres, because the loss is no sum of squares, got "
                f"{stage.acceleration['acceleration_type']!r}"
            )
        check_acceleration(stage.optimizer, in_steps(stage.acceleration, kind.nominal_steps), kind.probes)


def expand_runs(config: ExperimentConfig, *, num_rows: int | None = None) -> list[RunConfig]:
    """All runs of an experiment: seed by seed, so that what is compared runs close together in time.

    The batch-size study turns its number of steps into epochs of `num_rows` training rows, None where there are none.
    ValueError for a batch that is larger than the training set.
    """
    settings = {name: config.settings_of(name) for name in config.variants}

    def run(variant: str, seed: int) -> RunConfig:
        problem, training = settings[variant]
        definition = config.variants[variant]
        return RunConfig(
            config.experiment, config.scale, variant, variant, "", seed, config.kind, problem, training, definition
        )

    if num_rows is not None:
        config.kind.check_rows(config, num_rows)
    runs = [run(variant, seed) for seed in config.seeds for variant in config.variants]
    if (rates := config.studies.learning_rate) is not None:
        for seed in rates.seeds:
            for variant in rates.variants:
                for rate in rates.rates:
                    own, name = run(variant, seed), rates.run_name(variant, rate)
                    runs.append(replace(own, name=name, study="learning_rate", variant=own.variant.with_rate(rate)))
    if (sizes := config.studies.batch_size) is not None:
        assert num_rows is not None  # points are sampled where there is no such study
        for seed in sizes.seeds:
            for size in sizes.sizes:
                training = config.kind.training_of_study(config.training, num_rows, size, sizes.steps)
                own, name = run(sizes.variant, seed), sizes.run_name(size)
                runs.append(replace(own, name=name, study="batch_size", training=training))
    return runs


def complete_settings(
    config: ExperimentConfig, raw: Mapping[str, Any], selected: Sequence[str] | None = None
) -> dict[str, Any]:
    """The settings of a configuration, with which a file makes the same runs.

    A relative path of an equation starts at the folder of the file, so the new file belongs beside the old one.

    Args:
        config: the configuration.
        raw: the mapping that it was read from.
        selected: names of the variants that it keeps, without studies; None for all.
    """
    settings = dict(raw)
    for section in ("problem", "training", "save", "launch"):
        settings[section] = {key: _as_raw(value) for key, value in getattr(config, section)}
    settings["seeds"] = list(config.seeds)
    if selected is not None:
        settings["variants"] = {name: _with_baseline(raw["variants"][name], selected) for name in selected}
        settings.pop("studies", None)
        if settings.get("baseline") not in selected:
            settings.pop("baseline", None)
    return settings


def _as_raw(value: Any) -> Any:
    return {"name": value.name, **value.arguments} if isinstance(value, Component) else value


def _with_baseline(variant: Mapping[str, Any], selected: Sequence[str]) -> dict[str, Any]:
    """The variant without a baseline that is left out; the baseline changes no number."""
    return {key: value for key, value in variant.items() if key != "baseline" or value in selected}
