"""Configurations: YAML to the frozen dataclasses of `experiments.settings.run_config`, all validation included.

Every mistake in a file or an override raises ValueError here, before data or a device is touched. The message names the
key, the value and what is allowed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, replace
from pathlib import Path
from typing import Any

import torch

from data_loaders.collocation import MAX_SOBOL_COUNT, MAX_SOBOL_DIMENSION
from experiments.images.settings import (
    CADENCES,
    NOMINAL_STEPS,
    ImageConfig,
    ImageTrainingConfig,
    check_image_settings,
    in_steps,
)
from experiments.pinn.equation import load_equation
from experiments.settings.checks import (
    NAME,
    SEEDS,
    TEXT,
    Component,
    as_mapping,
    check_acceleration,
    check_optimizer,
    check_scheduler,
    integer,
    needs_residuals,
    number,
    optimizer_class,
    optimizers,
    optional,
    parse_value,
    read_component,
    read_settings,
    refuse_unknown,
    schedulers,
    solves_residuals,
    takes,
)
from experiments.settings.launch_settings import LaunchSettings
from experiments.settings.run_config import (
    EXPERIMENTS,
    PROBES,
    TRAININGS,
    BatchSizeStudy,
    ExperimentConfig,
    LearningRateStudy,
    PinnConfig,
    PinnTrainingConfig,
    ProblemConfig,
    PublishedConfig,
    RunConfig,
    SaveConfig,
    SecondStage,
    TrainingConfig,
    VariantConfig,
)
from experiments.settings.yaml_file import parse_setting, read_yaml
from experiments.training.optimizers import LINE_SEARCHES, is_schedule_free


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads and checks a configuration.

    Args:
        path: YAML file.
        overrides: texts `key=value`, the key with dots (`training.epochs=5`), the value in YAML. `seeds=0-9` sets the
            seeds; `variants=plain,other` keeps the named variants and, since they may need the others, no study, which
            is said on stderr. So are the variants that have a setting for themselves, which an override of the
            setting of all does not change.

    Raises:
        ValueError: unknown key, wrong type, value out of range, invalid YAML.
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
    try:
        config = parse_config(raw, Path(path).parent, selected)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for text in overrides:
        _tell_missed(config, text.partition("=")[0].strip())
    return config


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


def parse_config(
    raw: Mapping[str, Any], folder: str | Path = ".", only: Sequence[str] | None = None
) -> ExperimentConfig:
    """Checks a raw mapping, as YAML gives it, and returns the configuration.

    An experiment has one of the names of `EXPERIMENTS`, or any name if `problem.equation` is a Python file.

    Args:
        raw: the mapping.
        folder: where its file is; the path of a user's equation starts there.
        only: names of the variants to keep, in this order, without studies (said on stderr); None keeps all.

    Raises:
        ValueError: unknown key, wrong type, value out of range; the message names the key.
    """
    top = {
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
    refuse_unknown(raw, {key: default for key, (_, default) in top.items()}, "")
    values: dict[str, Any] = {}
    for key, (kind, default) in top.items():
        value = raw.get(key, default)
        if value is MISSING:
            raise ValueError(f"{key} is missing" + (f"; it must be {kind.allowed}" if kind else ""))
        values[key] = value if kind is None or (key not in raw) else parse_value(value, kind, key)
    raw_problem = as_mapping(values["problem"], "problem")
    raw_training = as_mapping(values["training"], "training")
    problem_class = _problem_class(values["experiment"], raw_problem)
    training = _training(problem_class, raw_training, "training")
    if not isinstance(values["variants"], Mapping) or not values["variants"]:
        raise ValueError(f"variants must be a mapping from names to settings, got {values['variants']!r}")
    names = list(values["variants"])
    for name in only or ():
        if name not in names:
            raise ValueError(f"--set variants: unknown variant {name!r}; there are: {', '.join(names)}")
    if only is not None and values["studies"]:
        print("--set variants leaves out the studies of the configuration", file=sys.stderr)
        values["studies"] = None
    baseline = values["baseline"] or names[0]
    variants = {}
    for name in names if only is None else only:
        parse_value(name, NAME, "a name in variants")
        variant = _variant(values["variants"][name], f"variants.{name}", problem_class)
        variants[name] = replace(variant, baseline=variant.baseline or baseline, index=names.index(name))
    learning_rate, batch_size = _studies(values["studies"], problem_class)
    for key, named in (
        ("studies.learning_rate.variants", learning_rate.variants if learning_rate else ()),
        ("studies.batch_size.variant", (batch_size.variant,) if batch_size else ()),
        ("baseline", (baseline,)),
        *((f"variants.{name}.baseline", (variant.baseline,)) for name, variant in variants.items()),
    ):
        for name in named:
            if name not in names:
                raise ValueError(f"{key}: unknown variant {name!r}; there are: {', '.join(names)}")
    config = ExperimentConfig(
        experiment=values["experiment"],
        scale=values["scale"],
        seeds=values["seeds"],
        problem=_problem(problem_class, raw_problem, "problem", folder),
        training=training,
        variants=variants,
        learning_rate=learning_rate,
        batch_size=batch_size,
        expected_minutes=values["expected_minutes"],
        num_ranks=values["num_ranks"],
        save=read_settings(SaveConfig, values["save"], "save"),
        launch=read_settings(LaunchSettings, values["launch"], "launch"),
    )
    if learning_rate is not None:
        for name in learning_rate.variants:
            _check_rates(variants[name], learning_rate.rates, f"studies.learning_rate: variants.{name}")
    for name, variant in variants.items():
        problem, training = variant_settings(config, variant, f"variants.{name}.")
        stages = [variant.optimizer, *([variant.then.optimizer] if variant.then is not None else [])]
        accelerations = [variant.acceleration, *([variant.then.acceleration] if variant.then is not None else [])]
        if isinstance(problem, PinnConfig) and any(map(solves_residuals, accelerations)):
            _check_residuals_stay(problem, f"variants.{name}")
        for optimizer in stages if isinstance(problem, PinnConfig) and problem.slope_weight else ():
            if not needs_residuals(optimizer.name):
                raise ValueError(
                    f"variants.{name}: problem.slope_weight must be false for {optimizer.name}, which does not "
                    "linearize; it must be an optimizer that does, as LevenbergMarquardt"
                )
        if isinstance(problem, ImageConfig):
            check_image_settings(problem, training)
            if training.reference_batch is not None and "lr" not in variant.optimizer.arguments:
                raise ValueError(f"variants.{name}.optimizer.lr must be given, for training.reference_batch scales it")
            if training.precision == "float16" and variant.optimizer.arguments.get("fused"):
                # It skips an overflow within the step, unseen: an acceleration would take it for a step of length zero.
                raise ValueError(f"variants.{name}.optimizer.fused must be false with precision float16, got true")
        if variant.then is not None and variant.then.after >= training.iterations:
            raise ValueError(
                f"variants.{name}.then.after must be below the {training.iterations} iterations of the run, "
                f"got {variant.then.after}"
            )
    return config


def _check_residuals_stay(problem: PinnConfig, where: str) -> None:
    """Residuals on other points, or of other weights, do not belong into one history."""
    if problem.slope_weight:
        raise ValueError(
            f"{where}: problem.slope_weight must be false with nonlinear_gmres, because it changes the weights at "
            "each linearization, got true"
        )
    if problem.resample_every is not None and problem.history_on_resample != "reset":
        raise ValueError(
            f"{where}: problem.history_on_resample must be reset with nonlinear_gmres where points are redrawn, got "
            f"{problem.history_on_resample!r}"
        )


def _check_rates(variant: VariantConfig, rates: Sequence[float], where: str) -> None:
    """Refuses a study of an optimizer that has no learning rate, or refuses one of the rates."""
    if not takes(variant.optimizer.name, "lr"):
        raise ValueError(f"{where} must have an optimizer with a learning rate lr, got {variant.optimizer.name}")
    for rate in rates:
        check_optimizer(_with_rate(variant, rate).optimizer, f"{where} with lr {rate:g}")


def _with_rate(variant: VariantConfig, rate: float) -> VariantConfig:
    arguments = {**variant.optimizer.arguments, "lr": rate}
    return replace(variant, optimizer=replace(variant.optimizer, arguments=arguments))


def _problem_class(experiment: str, raw_problem: Mapping[str, Any]) -> type[ProblemConfig]:
    if experiment in EXPERIMENTS:
        return EXPERIMENTS[experiment]
    equation = raw_problem.get("equation")
    if isinstance(equation, str) and equation.endswith(".py"):
        return PinnConfig
    raise ValueError(
        f"experiment must be one of {', '.join(EXPERIMENTS)}, got {experiment!r}; any other name needs a "
        "Python file as problem.equation"
    )


def variant_settings(config: ExperimentConfig, variant: VariantConfig, where: str = "") -> tuple[Any, Any]:
    """The settings of the problem and of the training of one variant: those of the experiment, with its overrides.

    An override replaces a setting as a whole, `options` included.
    """
    problem, training = config.problem, config.training
    overrides = variant.overrides
    if isinstance(problem, PinnConfig) and overrides.get("problem"):
        raw = {**asdict(problem), **overrides["problem"]}
        folder = raw.pop("folder")
        if "folder" in overrides["problem"]:
            raw["folder"] = folder  # no setting: it is refused as any unknown key
        problem = _problem(PinnConfig, raw, f"{where}problem", problem.folder)
    if isinstance(training, PinnTrainingConfig) and overrides.get("training"):
        raw = asdict(training)
        if training.scheduler is not None:
            raw["scheduler"] = {"name": training.scheduler.name, **training.scheduler.arguments}
        training = _training(PinnConfig, {**raw, **overrides["training"]}, f"{where}training")
    return problem, training


def _problem(problem_class: type[ProblemConfig], raw: Mapping[str, Any], where: str, folder: str | Path) -> Any:
    """The settings of the problem; a PINN's equation is made once, so that what it refuses is refused here."""
    config = read_settings(problem_class, raw, where)
    if not isinstance(config, PinnConfig):
        return config
    try:
        equation = load_equation(config.equation, config.options, folder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    columns = equation.num_space + 1
    largest = max(config.num_points, config.num_conditions, config.adaptive_pool or 0)
    if config.sampler == "sobol" and columns > MAX_SOBOL_DIMENSION:
        raise ValueError(
            f"{where}.sampler must not be sobol for an equation of {columns} dimensions: Sobol points have at most "
            f"{MAX_SOBOL_DIMENSION}"
        )
    if config.sampler == "sobol" and largest > MAX_SOBOL_COUNT:
        raise ValueError(f"{where}: there are at most {MAX_SOBOL_COUNT} Sobol points, got {largest}")
    if config.conditions == "soft" and config.num_conditions == 0:
        raise ValueError(f"{where}.num_conditions must be an integer >= 1 with soft conditions, got 0")
    if config.conditions == "hard" and equation.lift(equation.sample(_CENTER.repeat(1, columns))) is None:
        raise ValueError(f"{where}.conditions must be soft, for {equation.label} offers no lift, got 'hard'")
    if config.adaptive_pool is not None and config.resample_every is None:
        raise ValueError(f"{where}.adaptive_pool must be null where resample_every is, got {config.adaptive_pool}")
    if config.adaptive_pool is not None and config.adaptive_pool < config.num_points:
        raise ValueError(
            f"{where}.adaptive_pool must be at least num_points = {config.num_points}, got {config.adaptive_pool}"
        )
    return replace(config, folder=str(folder))


_CENTER = torch.full((1, 1), 0.5, dtype=torch.float64)


def _training(problem_class: type[ProblemConfig], raw: Mapping[str, Any], where: str) -> Any:
    training = read_settings(TRAININGS[problem_class], raw, where)
    if getattr(training, "scheduler", None) is None:
        return training
    scheduler = read_component(training.scheduler, schedulers(), f"{where}.scheduler")
    check_scheduler(scheduler, f"{where}.scheduler")
    return replace(training, scheduler=scheduler)


def _studies(raw: Any, problem_class: type[ProblemConfig]) -> tuple[LearningRateStudy | None, BatchSizeStudy | None]:
    studies = as_mapping(raw, "studies")
    known = {"learning_rate": None}
    if problem_class is not PinnConfig:
        known["batch_size"] = None
    refuse_unknown(studies, known, "studies")
    learning_rate = batch_size = None
    if studies.get("learning_rate") is not None:
        learning_rate = read_settings(LearningRateStudy, studies["learning_rate"], "studies.learning_rate")
    if studies.get("batch_size") is not None:
        batch_size = read_settings(BatchSizeStudy, studies["batch_size"], "studies.batch_size")
    return learning_rate, batch_size


def _variant(raw: Any, where: str, problem_class: type[ProblemConfig]) -> VariantConfig:
    raw, is_pinn = as_mapping(raw, where), problem_class is PinnConfig
    known = {"label": None, "optimizer": MISSING, "acceleration": None, "published": None, "ema_decay": None}
    if problem_class is ImageConfig:
        known["mean_epochs"] = None
    if is_pinn:
        known |= {"problem": None, "training": None, "then": None, "baseline": None}
    refuse_unknown(raw, known, where)
    optimizer, acceleration = _optimizer(raw, where, problem_class)
    published = then = None
    cadences: dict[str, str] = {}
    if raw.get("published") is not None:
        settings = as_mapping(raw["published"], f"{where}.published")
        if problem_class is ImageConfig:
            cadences = {name: settings[name] for name in CADENCES if isinstance(settings.get(name), str)}
            settings = in_steps(settings, NOMINAL_STEPS, f"{where}.published")
        published = read_settings(PublishedConfig, settings, f"{where}.published")
    if raw.get("ema_decay") is not None and raw.get("mean_epochs") is not None:
        raise ValueError(f"{where}: ema_decay and mean_epochs exclude each other")
    if acceleration is not None and published is not None:
        raise ValueError(f"{where}: acceleration and published exclude each other")
    if raw.get("then") is not None:
        stage = as_mapping(raw["then"], f"{where}.then")
        refuse_unknown(stage, {"after": MISSING, "optimizer": MISSING, "acceleration": None}, f"{where}.then")
        after = parse_value(stage.get("after"), integer(1), f"{where}.then.after")
        if is_schedule_free(optimizer_class(optimizer.name)):
            raise ValueError(f"{where}.then must be null after {optimizer.name}, whose result is no point of its path")
        then = SecondStage(after, *_optimizer(stage, f"{where}.then", problem_class))
    return VariantConfig(
        label=parse_value(raw.get("label", where.rpartition(".")[2]), TEXT, f"{where}.label"),
        optimizer=optimizer,
        acceleration=acceleration,
        published=published,
        published_cadences=cadences,
        ema_decay=parse_value(raw.get("ema_decay"), optional(number(0.0, 1.0)), f"{where}.ema_decay"),
        mean_epochs=parse_value(raw.get("mean_epochs"), optional(integer(1)), f"{where}.mean_epochs"),
        then=then,
        overrides={
            key: dict(as_mapping(raw[key], f"{where}.{key}")) for key in ("problem", "training") if raw.get(key)
        },
        baseline=parse_value(raw.get("baseline"), optional(NAME), f"{where}.baseline") or "",
    )


def _optimizer(
    raw: Mapping[str, Any], where: str, problem_class: type[ProblemConfig]
) -> tuple[Component, dict[str, Any] | None]:
    """The optimizer and the acceleration of a stage."""
    if raw.get("optimizer") is None:
        raise ValueError(f"{where}.optimizer is missing; it must be a mapping with the name of an optimizer of torch")
    known = {
        name: kind for name, kind in optimizers().items() if problem_class is PinnConfig or not needs_residuals(name)
    }
    if problem_class is ImageConfig:
        for kind in LINE_SEARCHES:  # they need gradients where no batch was differentiated
            del known[kind.__name__]
    optimizer = read_component(raw["optimizer"], known, f"{where}.optimizer")
    check_optimizer(optimizer, f"{where}.optimizer")
    acceleration = None
    if raw.get("acceleration") is not None:
        acceleration = dict(as_mapping(raw["acceleration"], f"{where}.acceleration"))
        is_image = problem_class is ImageConfig
        settings = in_steps(acceleration, NOMINAL_STEPS, f"{where}.acceleration") if is_image else acceleration
        if is_image and solves_residuals(acceleration):
            raise ValueError(
                f"{where}.acceleration.acceleration_type must not be nonlinear_gmres, for the loss of classes is no "
                f"sum of squares, got {acceleration['acceleration_type']!r}"
            )
        check_acceleration(optimizer, settings, f"{where}.acceleration", PROBES[problem_class])
    return optimizer, acceleration


def _check_probe(acceleration: Mapping[str, Any], num_rows: int, where: str) -> None:
    """Rows on which residuals are solved for, and others that check, out of the training set."""
    probe, check = (acceleration.get(name) for name in ("probe_rows", "check_rows"))
    if (probe or 1) + (check or 0) > num_rows:
        raise ValueError(
            f"{where}: probe_rows and check_rows must be at most the {num_rows} rows of the training set together, got "
            f"{probe} and {check}"
        )


def _training_of_study(
    training: TrainingConfig | ImageTrainingConfig, num_rows: int, size: int, steps: int
) -> TrainingConfig | ImageTrainingConfig:
    """Training of about `steps` steps with batches of this size, whose updates are measured."""
    if isinstance(training, TrainingConfig):
        epochs = max(1, round(steps / math.ceil(num_rows / size)))
        return replace(training, batch_size=size, epochs=epochs, measure_updates=True)
    if size > num_rows:
        raise ValueError(f"a batch of {size} images is larger than the training set of {num_rows}")
    epochs = max(1, round(steps / (num_rows // size)))  # only whole batches of images are trained on
    return replace(
        training, batch_size=size, batch_size_per_rank=None, epochs=epochs, evaluate_every=epochs, measure_updates=True
    )


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
            problem=problem,
            training=changes.get("training", training),
            variant=changes.get("definition", config.variants[variant]),
        )

    if num_rows is not None and isinstance(config.training, TrainingConfig):
        largest = max(config.training.batch_size, *(config.batch_size.sizes if config.batch_size else (1,)))
        if largest > num_rows:
            raise ValueError(f"a batch of {largest} rows is larger than the training set of {num_rows}")
        for name, definition in config.variants.items():
            _check_probe(definition.acceleration or {}, num_rows, f"variants.{name}.acceleration")
    runs = [run(variant, seed) for seed in config.seeds for variant in config.variants]
    if config.learning_rate is not None:
        for seed in config.learning_rate.seeds:
            for variant in config.learning_rate.variants:
                for rate in config.learning_rate.rates:
                    definition = _with_rate(config.variants[variant], rate)
                    runs.append(run(variant, seed, f"{variant}--lr-{rate:g}", "learning_rate", definition=definition))
    if config.batch_size is not None:
        assert num_rows is not None and not isinstance(config.training, PinnTrainingConfig)
        study = config.batch_size
        for seed in study.seeds:
            for size in study.sizes:
                training = _training_of_study(config.training, num_rows, size, study.steps)
                runs.append(run(study.variant, seed, f"{study.variant}--batch-{size}", "batch_size", training=training))
    return runs
