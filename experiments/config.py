"""Configurations: frozen dataclasses from YAML, all validation included.

Every mistake in a file or an override raises ValueError here, before data or a device is touched. The message names the
key, the value and what is allowed.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.checks import (
    BOOLEAN,
    NAME,
    SEEDS,
    SIZES,
    TEXT,
    Component,
    Kind,
    as_mapping,
    check_acceleration,
    check_optimizer,
    check_scheduler,
    choice,
    integer,
    number,
    optional,
    parse_value,
    read_component,
    read_settings,
    refuse_unknown,
    sequence,
    setting,
)
from experiments.models.mlp import ACTIVATIONS

# Checked against the signature of the class afterwards.
SCHEDULER = Kind("a mapping with the name of a scheduler of torch", lambda value: value)


@dataclass(frozen=True)
class GraduateAdmissionsConfig:
    """The regression problem: data, split and network."""

    split_seed: int = setting(integer(0, 2**32), 42)
    validation_fraction: float = setting(number(0.0, 1.0), 0.2)
    hidden_sizes: tuple[int, ...] = setting(SIZES, (64, 64, 64))
    activation: str = setting(choice(*ACTIVATIONS), "relu")
    data_path: str | None = setting(optional(TEXT), None)


PROBLEMS = {"graduate_admissions": GraduateAdmissionsConfig}


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop. `batch_size` counts rows over all ranks; the scheduler steps once an epoch."""

    epochs: int = setting(integer(1), 100)
    batch_size: int = setting(integer(1), 40)
    scheduler: Component | None = setting(SCHEDULER, None)  # noqa: RUF009
    measure_updates: bool = setting(BOOLEAN, False)


@dataclass(frozen=True)
class PublishedConfig:
    """Settings of the published scheme, see `experiments.published`."""

    relaxation: float = setting(number(0.0, 1.0 + 1e-12), 1.0)
    wait_iterations: int = setting(integer(0), 1)
    history_depth: int = setting(integer(3), 5)
    store_each_nth: int = setting(integer(1), 1)
    frequency: int = setting(integer(1), 10)
    reg_acc: float = setting(number(0.0, closed_low=True), 0.0)
    average: bool = setting(BOOLEAN, False)
    average_tolerance: float = setting(number(0.0, closed_low=True), 0.1)
    safeguard: bool = setting(BOOLEAN, False)


@dataclass(frozen=True)
class VariantConfig:
    """One way to train: an optimizer, and at most one acceleration, and the weights that are evaluated."""

    label: str
    optimizer: Component
    acceleration: dict[str, Any] | None = None
    published: PublishedConfig | None = None
    ema_decay: float | None = None


@dataclass(frozen=True)
class LearningRateStudy:
    """Loss at the end of training against the learning rate."""

    variants: tuple[str, ...] = setting(sequence(NAME))
    rates: tuple[float, ...] = setting(sequence(number(0.0)))
    seeds: tuple[int, ...] = setting(SEEDS, (0, 1, 2))


@dataclass(frozen=True)
class BatchSizeStudy:
    """Relative standard deviation of consecutive updates against the batch size, over equally many steps."""

    variant: str = setting(NAME)
    sizes: tuple[int, ...] = setting(sequence(integer(1)))
    steps: int = setting(integer(2), 800)
    seeds: tuple[int, ...] = setting(SEEDS, (0, 1, 2))


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment: every variant with every seed, and the studies."""

    experiment: str
    scale: str
    seeds: tuple[int, ...]
    problem: GraduateAdmissionsConfig
    training: TrainingConfig
    variants: dict[str, VariantConfig]
    learning_rate: LearningRateStudy | None = None
    batch_size: BatchSizeStudy | None = None
    expected_minutes: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines one run. `name` is its folder; `study` is "" for the main comparison."""

    experiment: str
    scale: str
    name: str
    variant_name: str
    study: str
    seed: int
    problem: GraduateAdmissionsConfig
    training: TrainingConfig
    variant: VariantConfig

    def as_json(self) -> str:
        """The configuration as JSON with sorted keys: two runs are the same if these texts are."""
        return json.dumps(asdict(self), sort_keys=True)


class _Loader(yaml.SafeLoader):
    """Safe loader that reads `1e-3` as a number (YAML 1.1 wants `1.0e-3`) and refuses a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"key {key.value!r} stands twice in one mapping (line {key.start_mark.line + 1})")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads and checks a configuration.

    Args:
        path: YAML file.
        overrides: texts `key=value`, the key with dots (`training.epochs=5`), the value in YAML. `seeds=0-9` sets the
            seeds; `variants=plain,other` keeps the named variants and, since they may need the others, no study, which
            is said on stderr.

    Raises:
        ValueError: unknown key, wrong type, value out of range, invalid YAML.
        OSError: the file cannot be read.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {raw!r}")
    for text in overrides:
        raw = _override(raw, text)
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """One `key=value` put into the raw mapping; anchors are shared objects, so every level on the way is copied."""
    key, equals, value_text = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set needs key=value, as training.epochs=5, got {text!r}")
    try:
        value = yaml.load(value_text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise ValueError(f"--set {key}: {value_text!r} is not a YAML value") from None
    if keys == ["variants"] and isinstance(value, str):
        names = [name.strip() for name in value.split(",")]
        known = raw.get("variants") or {}
        for name in names:
            if name not in known:
                raise ValueError(f"--set variants: unknown variant {name!r}; there are: {', '.join(known)}")
        if raw.get("studies"):
            print("--set variants leaves out the studies of the configuration", file=sys.stderr)
        return {**raw, "variants": {name: known[name] for name in names}, "studies": None}
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


def parse_config(raw: Mapping[str, Any]) -> ExperimentConfig:
    """Checks a raw mapping, as YAML gives it, and returns the configuration.

    Raises:
        ValueError: unknown key, wrong type, value out of range; the message names the key.
    """
    top = {
        "experiment": (choice(*PROBLEMS), MISSING),
        "scale": (NAME, MISSING),
        "seeds": (SEEDS, MISSING),
        "problem": (None, {}),
        "training": (None, {}),
        "variants": (None, MISSING),
        "studies": (None, {}),
        "expected_minutes": (optional(number(0.0)), None),
    }
    refuse_unknown(raw, {key: default for key, (_, default) in top.items()}, "")
    values: dict[str, Any] = {}
    for key, (kind, default) in top.items():
        value = raw.get(key, default)
        if value is MISSING:
            raise ValueError(f"{key} is missing" + (f"; it must be {kind.allowed}" if kind else ""))
        values[key] = value if kind is None or (key not in raw) else parse_value(value, kind, key)
    training = read_settings(TrainingConfig, values["training"], "training")
    if training.scheduler is not None:
        scheduler = read_component(training.scheduler, torch.optim.lr_scheduler, "training.scheduler")
        training = replace(training, scheduler=scheduler)
        check_scheduler(scheduler)
    if not isinstance(values["variants"], Mapping) or not values["variants"]:
        raise ValueError(f"variants must be a mapping from names to settings, got {values['variants']!r}")
    variants = {
        parse_value(name, NAME, "a name in variants"): _variant(settings, f"variants.{name}")
        for name, settings in values["variants"].items()
    }
    studies = values["studies"] or {}
    refuse_unknown(as_mapping(studies, "studies"), {"learning_rate": None, "batch_size": None}, "studies")
    learning_rate = batch_size = None
    if studies.get("learning_rate") is not None:
        learning_rate = read_settings(LearningRateStudy, studies["learning_rate"], "studies.learning_rate")
    if studies.get("batch_size") is not None:
        batch_size = read_settings(BatchSizeStudy, studies["batch_size"], "studies.batch_size")
    for key, names in (
        ("studies.learning_rate.variants", learning_rate.variants if learning_rate else ()),
        ("studies.batch_size.variant", (batch_size.variant,) if batch_size else ()),
    ):
        for name in names:
            if name not in variants:
                raise ValueError(f"{key}: unknown variant {name!r}; there are: {', '.join(variants)}")
    return ExperimentConfig(
        experiment=values["experiment"],
        scale=values["scale"],
        seeds=values["seeds"],
        problem=read_settings(PROBLEMS[values["experiment"]], values["problem"], "problem"),
        training=training,
        variants=variants,
        learning_rate=learning_rate,
        batch_size=batch_size,
        expected_minutes=values["expected_minutes"],
    )


def _variant(raw: Any, where: str) -> VariantConfig:
    raw = as_mapping(raw, where)
    known = {"label": None, "optimizer": MISSING, "acceleration": None, "published": None, "ema_decay": None}
    refuse_unknown(raw, known, where)
    if raw.get("optimizer") is None:
        raise ValueError(f"{where}.optimizer is missing; it must be a mapping with the name of an optimizer of torch")
    optimizer = read_component(raw["optimizer"], torch.optim, f"{where}.optimizer")
    check_optimizer(optimizer, f"{where}.optimizer")
    acceleration = published = None
    if raw.get("acceleration") is not None:
        acceleration = dict(as_mapping(raw["acceleration"], f"{where}.acceleration"))
        check_acceleration(optimizer, acceleration, f"{where}.acceleration")
    if raw.get("published") is not None:
        published = read_settings(PublishedConfig, raw["published"], f"{where}.published")
    if acceleration is not None and published is not None:
        raise ValueError(f"{where}: acceleration and published exclude each other")
    decay_kind = optional(number(0.0, 1.0))
    return VariantConfig(
        label=parse_value(raw.get("label", where.rpartition(".")[2]), TEXT, f"{where}.label"),
        optimizer=optimizer,
        acceleration=acceleration,
        published=published,
        ema_decay=parse_value(raw.get("ema_decay"), decay_kind, f"{where}.ema_decay"),
    )


def expand_runs(config: ExperimentConfig, *, num_rows: int) -> list[RunConfig]:
    """All runs of an experiment: seed by seed, so that what is compared runs close together in time.

    Args:
        config: the experiment.
        num_rows: training rows; the batch-size study turns its number of steps into epochs with it.

    Raises:
        ValueError: a batch that is larger than the training set.
    """

    def run(variant: str, seed: int, name: str = "", study: str = "", **changes: Any) -> RunConfig:
        return RunConfig(
            experiment=config.experiment,
            scale=config.scale,
            name=name or variant,
            variant_name=variant,
            study=study,
            seed=seed,
            problem=config.problem,
            training=changes.get("training", config.training),
            variant=changes.get("definition", config.variants[variant]),
        )

    sizes = (config.training.batch_size, *(config.batch_size.sizes if config.batch_size else ()))
    if max(sizes) > num_rows:
        raise ValueError(f"a batch of {max(sizes)} rows is larger than the training set of {num_rows}")
    runs = [run(variant, seed) for seed in config.seeds for variant in config.variants]
    if config.learning_rate is not None:
        for seed in config.learning_rate.seeds:
            for variant in config.learning_rate.variants:
                for rate in config.learning_rate.rates:
                    definition = config.variants[variant]
                    arguments = {**definition.optimizer.arguments, "lr": rate}
                    definition = replace(definition, optimizer=replace(definition.optimizer, arguments=arguments))
                    runs.append(run(variant, seed, f"{variant}--lr-{rate:g}", "learning_rate", definition=definition))
    if config.batch_size is not None:
        study = config.batch_size
        for seed in study.seeds:
            for size in study.sizes:
                epochs = max(1, round(study.steps / math.ceil(num_rows / size)))
                training = replace(config.training, batch_size=size, epochs=epochs, measure_updates=True)
                runs.append(run(study.variant, seed, f"{study.variant}--batch-{size}", "batch_size", training=training))
    return runs
