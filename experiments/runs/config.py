"""Configurations: YAML to the frozen dataclasses of an experiment, all validation included.

Every mistake in a file or an override raises ValueError here, before data or a device is touched. The message names the
key, the value and what is allowed.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

from experiments.records.tensorboard import check_tensorboard
from experiments.runs.experiment import Experiment
from experiments.settings.checks import (
    NAME,
    SEEDS,
    TEXT,
    Component,
    as_mapping,
    integer,
    number,
    optional,
    parse_value,
    read_settings,
    refuse_unknown,
    settings_of,
)
from experiments.settings.launch_settings import LaunchSettings
from experiments.settings.run_config import (
    BatchSizeStudy,
    ExperimentConfig,
    LearningRateStudy,
    PublishedConfig,
    RunConfig,
    SaveConfig,
    SecondStage,
    VariantConfig,
)
from experiments.settings.suggestion import did_you_mean
from experiments.settings.yaml_file import parse_setting, read_yaml
from experiments.training.components import (
    check_acceleration,
    check_optimizer,
    check_scheduler,
    optimizer_class,
    read_component,
    solves_residuals,
    takes,
)
from experiments.training.optimizers import is_schedule_free

FindExperiment = Callable[[str, Mapping[str, Any]], Experiment]
"""(name, raw settings of the problem) -> the experiment, see `experiments.catalog.find_experiment`."""


def load_config(path: str | Path, find: FindExperiment, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads and checks a configuration.

    Args:
        path: YAML file.
        find: finds its experiment.
        overrides: texts `key=value`, the key with dots (`training.epochs=5`), the value in YAML. `seeds=0-9` sets the
            seeds; `variants=plain,other` keeps the named variants and, since they may need the others, no study, which
            is said on stderr. So are the variants that have a setting for themselves, which an override of the
            setting of all does not change.

    Raises:
        ValueError: unknown key, wrong type, value out of range, invalid YAML.
        OSError: the file cannot be read.
    """
    raw, selected = read_overridden(path, overrides)
    try:
        config = parse_config(raw, find, Path(path).parent, selected)
    except ValueError as error:
        raise ValueError(f"{_to_blame(path, find, overrides)}: {error}") from None
    for text in overrides:
        _tell_missed(config, text.partition("=")[0].strip())
    return config


def _to_blame(path: str | Path, find: FindExperiment, overrides: Sequence[str]) -> str:
    """Names what a mistake comes from: the override without which the configuration is right, all of them, or the file.

    The whole is checked with and without each override, because a check that fails need not concern the overridden key.
    """

    def is_right(texts: Sequence[str]) -> bool:
        try:
            with redirect_stderr(io.StringIO()):
                raw, selected = read_overridden(path, texts)
                parse_config(raw, find, Path(path).parent, selected)
        except ValueError:
            return False
        return True

    guilty = [text for text in overrides if is_right([other for other in overrides if other != text])]
    if not guilty:
        guilty = list(overrides) if overrides and is_right(()) else []
    return " ".join(f"--set {text}" for text in guilty) or str(path)


def read_overridden(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], list[str] | None]:
    """The raw mapping of a file with the overrides put in, and the names of the variants to keep (None: all).

    Raises:
        ValueError: invalid YAML, or an override that is no `key=value` or is given twice.
        OSError: the file cannot be read.
    """
    raw = read_yaml(path)
    selected = None
    keys = [text.partition("=")[0].strip() for text in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"--set {key} is given {keys.count(key)} times: give it once")
    for text in overrides:
        key, _, value = text.partition("=")
        if key.strip() == "variants" and value.strip() and not value.lstrip().startswith("{"):
            selected = [name.strip() for name in value.split(",")]
        else:
            raw = _override(raw, text)
    return raw, selected


def _tell_missed(config: ExperimentConfig, key: str) -> None:
    """Says on stderr which variants an override does not reach, for they have the setting for themselves."""
    part, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    missed = [variant for variant, own in config.variants.items() if name in own.overrides.get(part, {})]
    if missed:
        print(f"--set {key}: these variants keep their own {part}.{name}: {', '.join(missed)}", file=sys.stderr)


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """One `key=value` put into the raw mapping; anchors are shared objects, so every level on the way is copied."""
    key, equals, value_text = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set needs key=value, as training.epochs=5, got {text!r}")
    try:
        value = parse_setting(value_text)
    except ValueError as error:
        raise ValueError(f"--set {key}: {error}") from None
    result = dict(raw)
    level = result
    for position, part in enumerate(keys[:-1]):
        below = level.get(part)
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ValueError(f"--set {key}: {'.'.join(keys[: position + 1])} is a value, not a group of settings")
        level[part] = dict(below)
        level = level[part]
    level[keys[-1]] = value
    return result


_TOP: dict[str, tuple[Any, Any]] = {
    "experiment": (NAME, MISSING),
    "scale": (NAME, MISSING),
    "seeds": (SEEDS, MISSING),
    "problem": (None, {}),
    "training": (None, {}),
    "variants": (None, MISSING),
    "baseline": (optional(NAME), None),
    "studies": (None, {}),
    "expected_minutes": (optional(number(0.0)), None),
    "num_ranks": (integer(1, 1025), 1),
    "save": (None, {}),
    "launch": (None, {}),
}
"""Kind and default of the keys of a configuration; sections have no kind, and their own functions read them."""


def parse_config(
    raw: Mapping[str, Any], find: FindExperiment, folder: str | Path = ".", only: Sequence[str] | None = None
) -> ExperimentConfig:
    """Checks a raw mapping, as YAML gives it, and returns the configuration.

    Args:
        raw: the mapping.
        find: finds its experiment.
        folder: where its file is; the path of a user's equation starts there.
        only: names of the variants to keep, in this order, without studies (said on stderr); None keeps all.

    Raises:
        ValueError: unknown key, wrong type, value out of range; the message names the key.
    """
    values = _top(raw)
    raw_problem = as_mapping(values["problem"], "problem")
    raw_training = as_mapping(values["training"], "training")
    kind = find(values["experiment"], raw_problem)
    training = kind.read_training(raw_training, "training")
    names = _names_of_variants(values["variants"], only or ())
    if only is not None and values["studies"]:
        print("--set variants leaves out the studies of the configuration", file=sys.stderr)
        values["studies"] = None
    baseline = values["baseline"] or names[0]
    variants = {}
    for name in names if only is None else only:
        parse_value(name, NAME, "a name in variants")
        variant = _variant(values["variants"][name], f"variants.{name}", kind)
        variants[name] = replace(variant, baseline=variant.baseline or baseline, index=names.index(name))
    learning_rate, batch_size = _studies(values["studies"], kind)
    for key, named in (
        ("studies.learning_rate.variants", learning_rate.variants if learning_rate else ()),
        ("studies.batch_size.variant", (batch_size.variant,) if batch_size else ()),
        ("baseline", (baseline,)),
        *((f"variants.{name}.baseline", (variant.baseline,)) for name, variant in variants.items()),
    ):
        for name in named:
            if name not in names:
                raise ValueError(_unknown_variant(key, name, names))
    config = ExperimentConfig(
        experiment=values["experiment"],
        scale=values["scale"],
        seeds=values["seeds"],
        kind=kind,
        problem=kind.read_problem(raw_problem, "problem", folder),
        training=training,
        variants=variants,
        learning_rate=learning_rate,
        batch_size=batch_size,
        expected_minutes=values["expected_minutes"],
        num_ranks=values["num_ranks"],
        save=read_settings(SaveConfig, values["save"], "save"),
        launch=read_settings(LaunchSettings, values["launch"], "launch"),
        folder=str(folder),
    )
    if config.save.tensorboard:
        check_tensorboard()
    if learning_rate is not None:
        for name in learning_rate.variants:
            _check_rates(variants[name], learning_rate.rates, f"studies.learning_rate: variants.{name}")
    for name, variant in variants.items():
        problem, training = variant_settings(config, variant, f"variants.{name}.")
        scheduler = getattr(training, "scheduler", None)
        if scheduler is not None:
            where = f"variants.{name}.training.scheduler"
            check_scheduler(scheduler, where, check_optimizer(variant.optimizer, where))
        kind.check(problem, training, variant, f"variants.{name}")
    return config


def _top(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all keys of a configuration; those of sections are not checked yet."""
    refuse_unknown(raw, {key: default for key, (_, default) in _TOP.items()}, "")
    values: dict[str, Any] = {}
    for key, (kind, default) in _TOP.items():
        value = raw.get(key, default)
        if value is MISSING:
            raise ValueError(f"{key} is missing" + (f"; it must be {kind.allowed}" if kind else ""))
        values[key] = value if kind is None or (key not in raw) else parse_value(value, kind, key)
    return values


def _names_of_variants(raw: Any, only: Sequence[str]) -> list[str]:
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError(f"variants must be a mapping from names to settings, got {raw!r}")
    names = list(raw)
    for name in only:
        if name not in names:
            raise ValueError(_unknown_variant("variants", name, names))
    return names


def _unknown_variant(where: str, name: str, names: Sequence[str]) -> str:
    return f"{where}: unknown variant {name!r}; there are: {', '.join(names)}{did_you_mean(name, names)}"


def _check_rates(variant: VariantConfig, rates: Sequence[float], where: str) -> None:
    """Refuses a study of an optimizer that has no learning rate, or refuses one of the rates."""
    if not takes(variant.optimizer.name, "lr"):
        raise ValueError(f"{where} must have an optimizer with a learning rate lr, got {variant.optimizer.name}")
    for rate in rates:
        check_optimizer(_with_rate(variant, rate).optimizer, f"{where} with lr {rate:g}")


def _with_rate(variant: VariantConfig, rate: float) -> VariantConfig:
    arguments = {**variant.optimizer.arguments, "lr": rate}
    return replace(variant, optimizer=replace(variant.optimizer, arguments=arguments))


def variant_settings(config: ExperimentConfig, variant: VariantConfig, where: str = "") -> tuple[Any, Any]:
    """The settings of the problem and of the training of one variant: those of the experiment, with its overrides.

    An override replaces a setting as a whole, `options` included.
    """
    problem, training, overrides = config.problem, config.training, variant.overrides
    if overrides.get("problem"):
        raw = as_raw(problem) | overrides["problem"]
        problem = config.kind.read_problem(raw, f"{where}problem", config.folder)
    if overrides.get("training"):
        training = config.kind.read_training(as_raw(training) | overrides["training"], f"{where}training")
    return problem, training


def as_raw(settings: Any) -> dict[str, Any]:
    """The settings as YAML gives them."""
    raw = {entry.name: getattr(settings, entry.name) for entry in settings_of(settings)}
    return {key: _raw_component(value) if isinstance(value, Component) else value for key, value in raw.items()}


def _raw_component(component: Component) -> dict[str, Any]:
    return {"name": component.name, **component.arguments}


def _studies(raw: Any, kind: Experiment) -> tuple[LearningRateStudy | None, BatchSizeStudy | None]:
    studies = as_mapping(raw, "studies")
    refuse_unknown(studies, dict.fromkeys(kind.studies), "studies")
    learning_rate = batch_size = None
    if studies.get("learning_rate") is not None:
        learning_rate = read_settings(LearningRateStudy, studies["learning_rate"], "studies.learning_rate")
    if studies.get("batch_size") is not None:
        batch_size = read_settings(BatchSizeStudy, studies["batch_size"], "studies.batch_size")
    return learning_rate, batch_size


def _variant(raw: Any, where: str, kind: Experiment) -> VariantConfig:
    raw = as_mapping(raw, where)
    known = {"label": None, "optimizer": MISSING, "acceleration": None, "published": None, "ema_decay": None}
    refuse_unknown(raw, known | dict.fromkeys(kind.variant_keys), where)
    optimizer, acceleration = _optimizer(raw, where, kind)
    published, cadences = _published(raw.get("published"), f"{where}.published", kind)
    if raw.get("ema_decay") is not None and raw.get("mean_epochs") is not None:
        raise ValueError(f"{where}: ema_decay and mean_epochs exclude each other")
    if acceleration is not None and published is not None:
        raise ValueError(f"{where}: acceleration and published exclude each other")
    return VariantConfig(
        label=parse_value(raw.get("label", where.rpartition(".")[2]), TEXT, f"{where}.label"),
        optimizer=optimizer,
        acceleration=acceleration,
        published=published,
        published_cadences=cadences,
        ema_decay=parse_value(raw.get("ema_decay"), optional(number(0.0, 1.0)), f"{where}.ema_decay"),
        mean_epochs=parse_value(raw.get("mean_epochs"), optional(integer(1)), f"{where}.mean_epochs"),
        then=_second_stage(raw.get("then"), optimizer, f"{where}.then", kind),
        overrides={
            key: dict(as_mapping(raw[key], f"{where}.{key}")) for key in ("problem", "training") if raw.get(key)
        },
        baseline=parse_value(raw.get("baseline"), optional(NAME), f"{where}.baseline") or "",
    )


def _published(raw: Any, where: str, kind: Experiment) -> tuple[PublishedConfig | None, dict[str, str]]:
    """Settings of the published scheme, and its cadences that are no numbers of steps."""
    if raw is None:
        return None, {}
    given = as_mapping(raw, where)
    settings = kind.in_steps(given, where)
    cadences = {name: given[name] for name in settings if settings[name] is not given[name]}
    return read_settings(PublishedConfig, settings, where), cadences


def _second_stage(raw: Any, first: Component, where: str, kind: Experiment) -> SecondStage | None:
    if raw is None:
        return None
    stage = as_mapping(raw, where)
    refuse_unknown(stage, {"after": MISSING, "optimizer": MISSING, "acceleration": None}, where)
    after = parse_value(stage.get("after"), integer(1), f"{where}.after")
    if is_schedule_free(optimizer_class(first.name)):
        raise ValueError(f"{where} must be null after {first.name}, whose result is no point of its path")
    return SecondStage(after, *_optimizer(stage, where, kind))


def _optimizer(raw: Mapping[str, Any], where: str, kind: Experiment) -> tuple[Component, dict[str, Any] | None]:
    """The optimizer and the acceleration of a stage."""
    if raw.get("optimizer") is None:
        raise ValueError(f"{where}.optimizer is missing; it must be a mapping with the name of an optimizer of torch")
    optimizer = read_component(raw["optimizer"], kind.optimizers(), f"{where}.optimizer")
    check_optimizer(optimizer, f"{where}.optimizer")
    if raw.get("acceleration") is None:
        return optimizer, None
    where = f"{where}.acceleration"
    acceleration = dict(as_mapping(raw["acceleration"], where))
    settings = kind.in_steps(acceleration, where)
    if solves_residuals(acceleration) and not kind.is_least_squares:
        raise ValueError(
            f"{where}.acceleration_type must not be nonlinear_gmres, because the loss is no sum of squares, got "
            f"{acceleration['acceleration_type']!r}"
        )
    check_acceleration(optimizer, settings, where, kind.probes)
    return optimizer, acceleration


def expand_runs(config: ExperimentConfig, *, num_rows: int | None = None) -> list[RunConfig]:
    """All runs of an experiment: seed by seed, so that what is compared runs close together in time.

    Args:
        config: the experiment.
        num_rows: training rows, None where there are none; the batch-size study turns its number of steps into epochs
            with it.

    Raises:
        ValueError: a batch that is larger than the training set.
    """
    settings = {name: variant_settings(config, variant) for name, variant in config.variants.items()}

    def run(variant: str, seed: int, name: str = "", study: str = "", **changes: Any) -> RunConfig:
        problem, training = settings[variant]
        return RunConfig(
            experiment=config.experiment,
            scale=config.scale,
            name=name or variant,
            variant_name=variant,
            study=study,
            seed=seed,
            kind=config.kind,
            problem=problem,
            training=changes.get("training", training),
            variant=changes.get("definition", config.variants[variant]),
        )

    if num_rows is not None:
        config.kind.check_rows(config, num_rows)
    runs = [run(variant, seed) for seed in config.seeds for variant in config.variants]
    if config.learning_rate is not None:
        for seed in config.learning_rate.seeds:
            for variant in config.learning_rate.variants:
                for rate in config.learning_rate.rates:
                    definition = _with_rate(config.variants[variant], rate)
                    name = config.learning_rate.run_name(variant, rate)
                    runs.append(run(variant, seed, name, "learning_rate", definition=definition))
    if config.batch_size is not None:
        assert num_rows is not None  # points are sampled where there is no such study
        study = config.batch_size
        for seed in study.seeds:
            for size in study.sizes:
                training = config.kind.training_of_study(config.training, num_rows, size, study.steps)
                runs.append(run(study.variant, seed, study.run_name(size), "batch_size", training=training))
    return runs
