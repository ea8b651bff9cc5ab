"""Configurations: frozen dataclasses from YAML, all validation included.

Every mistake in a file or an override raises ValueError here, before data or a device is touched. The message names the
key, the value and what is allowed.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

import aadl
from experiments.models.mlp import ACTIVATIONS


@dataclass(frozen=True)
class Kind:
    """What a setting accepts: `allowed` completes "must be ...", `parse` returns the value or raises ValueError."""

    allowed: str
    parse: Callable[[Any], Any]


def integer(minimum: int) -> Kind:
    """An integer not below `minimum`; a bool is none."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError
        return value

    return Kind(f"an integer >= {minimum}", parse)


def number(low: float, high: float = math.inf, *, closed_low: bool = False) -> Kind:
    """A finite number in (low, high), or [low, high) with `closed_low`; a bool is none."""

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError
        if not (low < value < high or (closed_low and value == low)):
            raise ValueError
        return float(value)

    opening = "[" if closed_low else "("
    return Kind(f"a finite number in {opening}{low:g}, {high:g})", parse)


def choice(*options: str) -> Kind:
    """One of the given words."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError
        return value

    return Kind("one of " + ", ".join(options), parse)


def sequence(item: Kind) -> Kind:
    """A list, not empty and without repetition, of items of one kind."""

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError
        items = tuple(item.parse(entry) for entry in value)
        if len(set(items)) < len(items):
            raise ValueError
        return items

    return Kind(f"a list without repetition, each entry {item.allowed}", parse)


def optional(kind: Kind) -> Kind:
    """The kind, or null."""
    return Kind(f"{kind.allowed}, or null", lambda value: None if value is None else kind.parse(value))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return tuple(integer(1).parse(entry) for entry in value)


def _seeds(value: Any) -> tuple[int, ...]:
    """`3`, `[0, 1, 2]`, `"0-9"` or `"0,2,4-6"`."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        expanded: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None:
                raise ValueError
            first, last = int(match[1]), int(match[2] or match[1])
            expanded.extend(range(first, last + 1))
        value = expanded
    parsed: tuple[int, ...] = sequence(integer(0)).parse(value)
    return parsed


TEXT = Kind("a text that is not empty", _text)
BOOLEAN = Kind("true or false", _boolean)
SEEDS = Kind('one or several different integers >= 0, as 3, [0, 1, 2] or "0-9"', _seeds)
# Names become folders of results.
NAME = Kind(
    "a name of letters, digits, '_', '.' and '-' that starts with a letter",
    lambda value: re.fullmatch(r"[A-Za-z][\w.-]*", value, re.ASCII)[0],  # type: ignore[index]
)


# Checked against the signature of the class afterwards.
SCHEDULER = Kind("a mapping with the name of a scheduler of torch", lambda value: value)


def setting(kind: Kind, default: Any = MISSING) -> Any:
    """A dataclass field that carries its kind."""
    return field(default=default, metadata={"kind": kind})


@dataclass(frozen=True)
class GraduateAdmissionsConfig:
    """The regression problem: data, split and network."""

    split_seed: int = setting(integer(0), 42)
    validation_fraction: float = setting(number(0.0, 1.0), 0.2)
    hidden_sizes: tuple[int, ...] = setting(Kind("a list of integers >= 1", _sizes), (64, 64, 64))
    activation: str = setting(choice(*ACTIVATIONS), "relu")
    data_path: str | None = setting(optional(TEXT), None)


PROBLEMS = {"graduate_admissions": GraduateAdmissionsConfig}


@dataclass(frozen=True)
class Component:
    """A class of torch by name, with its keyword arguments: an optimizer or a learning-rate scheduler."""

    name: str
    arguments: dict[str, Any]


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
                if key.value in seen and key.start_mark.buffer is not None:
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
            seeds; `variants=plain,other` keeps the named variants and, since they may need the others, no study.

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
    _refuse_unknown(raw, {key: default for key, (_, default) in top.items()}, "")
    values: dict[str, Any] = {}
    for key, (kind, default) in top.items():
        value = raw.get(key, default)
        if value is MISSING:
            raise ValueError(f"{key} is missing" + (f"; it must be {kind.allowed}" if kind else ""))
        values[key] = value if kind is None or (key not in raw) else _parse(value, kind, key)
    training = read_settings(TrainingConfig, values["training"], "training")
    if training.scheduler is not None:
        scheduler = _component(training.scheduler, torch.optim.lr_scheduler, "training.scheduler")
        training = replace(training, scheduler=scheduler)
        check_scheduler(scheduler)
    if not isinstance(values["variants"], Mapping) or not values["variants"]:
        raise ValueError(f"variants must be a mapping from names to settings, got {values['variants']!r}")
    variants = {
        _parse(name, NAME, "a name in variants"): _variant(settings, f"variants.{name}")
        for name, settings in values["variants"].items()
    }
    studies = values["studies"] or {}
    _refuse_unknown(_mapping(studies, "studies"), {"learning_rate": None, "batch_size": None}, "studies")
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


def read_settings(cls: type[Any], raw: Any, where: str) -> Any:
    """A settings dataclass from a raw mapping.

    Args:
        cls: dataclass whose fields were made by `setting`.
        raw: mapping from YAML, or None for all defaults.
        where: key of the mapping, for messages.

    Raises:
        ValueError: unknown or missing key, or a value that the key's kind refuses.
    """
    raw = _mapping(raw, where)
    _refuse_unknown(raw, {entry.name: entry.default for entry in fields(cls)}, where)
    values = {}
    for entry in fields(cls):
        key = f"{where}.{entry.name}"
        if entry.name in raw:
            values[entry.name] = _parse(raw[entry.name], entry.metadata["kind"], key)
        elif entry.default is MISSING:
            raise ValueError(f"{key} is missing; it must be {entry.metadata['kind'].allowed}")
    return cls(**values)


def _parse(value: Any, kind: Kind, key: str) -> Any:
    try:
        return kind.parse(value)
    except (ValueError, TypeError):
        raise ValueError(f"{key} must be {kind.allowed}, got {value!r}") from None


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, got {raw!r}")
    return raw


def _refuse_unknown(raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    for key in raw:
        if key not in defaults:
            valid = ", ".join(
                name if default in (MISSING, inspect.Parameter.empty) else f"{name} (default {default!r})"
                for name, default in defaults.items()
            )
            raise ValueError(f"unknown key {f'{where}.' if where else ''}{key}; valid keys are: {valid}")


def _variant(raw: Any, where: str) -> VariantConfig:
    raw = _mapping(raw, where)
    known = {"label": None, "optimizer": MISSING, "acceleration": None, "published": None, "ema_decay": None}
    _refuse_unknown(raw, known, where)
    if raw.get("optimizer") is None:
        raise ValueError(f"{where}.optimizer is missing; it must be a mapping with the name of an optimizer of torch")
    optimizer = _component(raw["optimizer"], torch.optim, f"{where}.optimizer")
    check_optimizer(optimizer, f"{where}.optimizer")
    acceleration = published = None
    if raw.get("acceleration") is not None:
        acceleration = dict(_mapping(raw["acceleration"], f"{where}.acceleration"))
        check_acceleration(optimizer, acceleration, f"{where}.acceleration")
    if raw.get("published") is not None:
        published = read_settings(PublishedConfig, raw["published"], f"{where}.published")
    if acceleration is not None and published is not None:
        raise ValueError(f"{where}: acceleration and published exclude each other")
    decay_kind = optional(number(0.0, 1.0))
    return VariantConfig(
        label=_parse(raw.get("label", where.rpartition(".")[2]), TEXT, f"{where}.label"),
        optimizer=optimizer,
        acceleration=acceleration,
        published=published,
        ema_decay=_parse(raw.get("ema_decay"), decay_kind, f"{where}.ema_decay"),
    )


def _component(raw: Any, module: Any, where: str) -> Component:
    """A class of `module` with a `step` method, its arguments checked against its signature."""
    raw = dict(_mapping(raw, where))
    classes = {
        name: member
        for name, member in vars(module).items()
        if inspect.isclass(member) and hasattr(member, "step") and name not in ("Optimizer", "LRScheduler")
    }
    name = raw.pop("name", None)
    if name not in classes:
        raise ValueError(f"{where}.name must be one of {', '.join(sorted(classes))}, got {name!r}")
    parameters = list(inspect.signature(classes[name]).parameters.values())[1:]
    _refuse_unknown(raw, {"name": MISSING} | {entry.name: entry.default for entry in parameters}, where)
    _refuse_not_finite(raw, where)
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Component(name, arguments)


def _refuse_not_finite(raw: Mapping[str, Any], where: str) -> None:
    for key, value in raw.items():
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"{where}.{key} must be finite, got {value!r}")


def make_optimizer(component: Component, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of torch over the given parameters."""
    optimizer: torch.optim.Optimizer = getattr(torch.optim, component.name)(parameters, **component.arguments)
    return optimizer


def make_scheduler(component: Component, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate scheduler of torch over the given optimizer."""
    scheduler: torch.optim.lr_scheduler.LRScheduler = getattr(torch.optim.lr_scheduler, component.name)(
        optimizer, **component.arguments
    )
    return scheduler


def check_optimizer(component: Component, where: str) -> torch.optim.Optimizer:
    """Builds the optimizer on one dummy weight, so that what torch refuses is refused before training."""
    for key in ("lr", "momentum", "weight_decay", "eps"):
        value = component.arguments.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}.{key} must be a number, got {value!r}")
    try:
        return make_optimizer(component, [torch.nn.Parameter(torch.zeros(2))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}") from None


def check_scheduler(component: Component) -> None:
    """Builds the scheduler on a dummy optimizer, so that what torch refuses is refused before training."""
    try:
        make_scheduler(component, torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"training.scheduler: {error}") from None


def accelerate(optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> None:
    """`aadl.accelerate` with arguments from YAML, in which `history_dtype` is the name of a dtype of torch."""
    dtype = arguments.get("history_dtype")
    if isinstance(dtype, str):
        arguments = {**arguments, "history_dtype": getattr(torch, dtype, dtype)}
    aadl.accelerate(optimizer, **arguments)


def check_acceleration(optimizer: Component, arguments: Mapping[str, Any], where: str) -> None:
    """Checks the names against the signature of `aadl.accelerate`, then lets the library judge the values."""
    parameters = list(inspect.signature(aadl.accelerate).parameters.values())[1:]
    # The process group is no setting: the library takes the one of the launch.
    defaults = {entry.name: entry.default for entry in parameters if entry.name != "process_group"}
    _refuse_unknown(arguments, defaults, where)
    try:
        accelerate(check_optimizer(optimizer, where), arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


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
