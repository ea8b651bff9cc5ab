"""What determines a run, and an experiment of many: frozen dataclasses, with the allowed range of each setting.

`experiments.settings.config` reads them from YAML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_loaders.collocation import KINDS, MAX_POOL
from experiments.images.settings import ImageConfig, ImageTrainingConfig
from experiments.models.derivatives import RULES
from experiments.models.mlp import ACTIVATIONS
from experiments.settings.checks import (
    BOOLEAN,
    NAME,
    OPTIONS,
    SEEDS,
    SIZES,
    SOME_SIZES,
    TEXT,
    Component,
    Kind,
    choice,
    integer,
    number,
    optional,
    sequence,
    setting,
)
from experiments.settings.launch_settings import LaunchSettings

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


@dataclass(frozen=True)
class PinnConfig:
    """A physics-informed network: the equation, the network, and the points where the equation is asked for.

    Attributes:
        equation: a key of `experiments.pinn.burgers.EQUATIONS`, or a Python file, relative to the configuration's.
        options: arguments of the equation.
        hidden_sizes: widths of the hidden layers; the inputs are those of the equation, the output is one.
        activation: smooth, for the equation differentiates it twice.
        dtype: of weights and points. Points, sources and solutions are computed in float64 and rounded to it.
        conditions: "soft": the mean squared error on `num_conditions` points of the initial and boundary conditions is
            added to the loss, times `condition_weight`; "hard": the equation's lift meets them for every network.
        sampler: of the points.
        num_points: interior points, over all ranks.
        num_conditions: points of the conditions, over all ranks; 0 with hard conditions only.
        condition_weight: see `conditions`.
        resample_every: iterations after which all points are drawn anew; null: never.
        adaptive_pool: from the first resampling on, half of the interior points are drawn from this many fresh ones,
            more of them where the residual of the network is large (`adaptive_points`); null: none are.
        history_on_resample: "reset": the memories of L-BFGS and of aadl begin anew with the points; "keep": they stay.
            Neither the moments of Adam nor the window of the published scheme is touched.
        slope_weight: divides the residuals by 1 + |sum_i u_{x_i}| of the network at the last linearization, which keeps
            steep fronts from ruling the sum of squares; for optimizers that linearize. Recorded losses are without it.
        chunk_points: interior points that are differentiated at a time, which bounds the memory; null: a cache full.
        compile: whether torch.compile compiles the residual.
    """

    equation: str = setting(TEXT)
    options: dict[str, Any] = setting(OPTIONS, {})  # noqa: RUF009
    hidden_sizes: tuple[int, ...] = setting(SOME_SIZES, (20,) * 8)
    activation: str = setting(choice(*RULES), "tanh")
    dtype: str = setting(choice("float32", "float64"), "float32")
    conditions: str = setting(choice("soft", "hard"), "soft")
    sampler: str = setting(choice(*KINDS), "latin_hypercube")
    num_points: int = setting(integer(1), 4096)
    num_conditions: int = setting(integer(0), 400)
    condition_weight: float = setting(number(0.0), 1.0)
    resample_every: int | None = setting(optional(integer(1)), None)
    adaptive_pool: int | None = setting(optional(integer(1, MAX_POOL + 1)), None)
    history_on_resample: str = setting(choice("reset", "keep"), "reset")
    slope_weight: bool = setting(BOOLEAN, False)
    chunk_points: int | None = setting(optional(integer(1)), None)
    compile: bool = setting(BOOLEAN, False)
    folder: str = ""
    """Where the configuration's file is. No setting, and no part of a run's identity."""


@dataclass(frozen=True)
class TrainingConfig:
    """Training by epochs. `batch_size` counts rows over all ranks; the scheduler steps once an epoch."""

    epochs: int = setting(integer(1), 100)
    batch_size: int = setting(integer(1), 40)
    scheduler: Component | None = setting(SCHEDULER, None)  # noqa: RUF009
    measure_updates: bool = setting(BOOLEAN, False)


@dataclass(frozen=True)
class PinnTrainingConfig:
    """Training by iterations, which are evaluations of the gradient, however many of them a step takes.

    Attributes:
        iterations: the run ends with the step that reaches them.
        evaluate_every: iterations between two evaluations.
        scheduler: steps once an iteration.
        max_seconds: of training; the run ends with the step that reaches them. null: no limit.
        num_threads: of torch.
        measure_updates: whether the relative standard deviation of consecutive updates is recorded.
    """

    iterations: int = setting(integer(1), 2000)
    evaluate_every: int = setting(integer(1), 100)
    scheduler: Component | None = setting(SCHEDULER, None)  # noqa: RUF009
    max_seconds: float | None = setting(optional(number(0.0)), None)
    num_threads: int = setting(integer(1), 1)
    measure_updates: bool = setting(BOOLEAN, False)


ProblemConfig = GraduateAdmissionsConfig | PinnConfig | ImageConfig
AnyTrainingConfig = TrainingConfig | PinnTrainingConfig | ImageTrainingConfig

# The training settings of a kind of problem.
TRAININGS: dict[type[ProblemConfig], type[AnyTrainingConfig]] = {
    GraduateAdmissionsConfig: TrainingConfig,
    PinnConfig: PinnTrainingConfig,
    ImageConfig: ImageTrainingConfig,
}

# Keys of an acceleration by residuals ("nonlinear_gmres") that are the suite's, integers >= 1: `probe_rows` of the
# training set are those that it makes small, by default all but those of the check; a candidate must be better on
# `check_rows` others too, or on `check_points` others, which are redrawn with the points. By default nothing checks.
PROBES: dict[type[ProblemConfig], tuple[str, ...]] = {
    GraduateAdmissionsConfig: ("probe_rows", "check_rows"),
    PinnConfig: ("check_points",),
    ImageConfig: (),
}

# The experiments of the suite. Any other name is a user's equation, see `parse_config`.
EXPERIMENTS: dict[str, type[ProblemConfig]] = {
    "graduate_admissions": GraduateAdmissionsConfig,
    "burgers_2d": PinnConfig,
    "burgers_100d": PinnConfig,
    "imagenet": ImageConfig,
}


@dataclass(frozen=True)
class PublishedConfig:
    """Settings of the published scheme, see `experiments.training.published`."""

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
class SecondStage:
    """What goes on from an iteration on: another optimizer, without the scheduler."""

    after: int
    optimizer: Component
    acceleration: dict[str, Any] | None = None


@dataclass(frozen=True)
class VariantConfig:
    """One way to train: an optimizer, and at most one acceleration, and the weights that are evaluated.

    Attributes:
        ema_decay: of an exponential moving average of the weights, which is evaluated in their place.
        mean_epochs: the mean of the weights after every step of this many last epochs is evaluated; images only.
        then: the second stage, None for none.
        published_cadences: cadences of the published scheme that are given in epochs, as texts.
        overrides: settings of "problem" and "training" that this variant has for itself.
        baseline: name of the variant that it is compared with.
        index: its place among the variants of the configuration.
    """

    label: str
    optimizer: Component
    acceleration: dict[str, Any] | None = None
    published: PublishedConfig | None = None
    published_cadences: dict[str, str] = field(default_factory=dict)
    ema_decay: float | None = None
    mean_epochs: int | None = None
    then: SecondStage | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str = ""
    index: int = 0


@dataclass(frozen=True)
class LearningRateStudy:
    """Loss at the end of training against the learning rate.

    The rate is the `lr` of the first optimizer alone: `adam_lr` of MuonAdam and the second stage stay as they are.
    """

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
class SaveConfig:
    """What is saved of runs, and when. No part of a run's identity.

    Attributes:
        every_seconds: between two checkpoints of a run.
        keep: newest checkpoints of a run that are kept, besides the best one. After an evaluation that is better than
            that of the best checkpoint the run is saved at once, but not within 10 s of the last checkpoint, nor so
            often that it takes more than a twentieth of the time. Those of a finished run are removed.
        asynchronous: whether a thread writes them while the training goes on.
        agree_every: steps between two exchanges of the ranks about stopping and saving; more where steps are short and
            ranks many (`distributed.step_vote` says what one costs).
        weights: whether the record of a finished run holds the weights that were evaluated last (the averaged ones with
            `ema_decay`; images: with the statistics computed anew), see `record.read_weights`.
    """

    every_seconds: float = setting(number(0.0, closed_low=True), 300.0)
    keep: int = setting(integer(1, 1000), 2)
    asynchronous: bool = setting(BOOLEAN, False)
    agree_every: int = setting(integer(1, 10_001), 1)
    weights: bool = setting(BOOLEAN, False)


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment: every variant with every seed, and the studies.

    Attributes:
        num_ranks: processes that `reproduce` starts for it on one machine.
    """

    experiment: str
    scale: str
    seeds: tuple[int, ...]
    problem: ProblemConfig
    training: AnyTrainingConfig
    variants: dict[str, VariantConfig]
    learning_rate: LearningRateStudy | None = None
    batch_size: BatchSizeStudy | None = None
    expected_minutes: float | None = None
    num_ranks: int = 1
    save: SaveConfig = field(default_factory=SaveConfig)
    launch: LaunchSettings = field(default_factory=LaunchSettings)


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines one run. `name` is its folder; `study` is "" for the main comparison."""

    experiment: str
    scale: str
    name: str
    variant_name: str
    study: str
    seed: int
    problem: ProblemConfig
    training: AnyTrainingConfig
    variant: VariantConfig

    def as_json(self) -> str:
        """The configuration as JSON with sorted keys, for the record.

        Left out is where the file is, which variant the run is compared with, and its place. See `identity`.
        """
        raw = asdict(self)
        raw["problem"].pop("folder", None)
        for key in ("baseline", "index"):
            del raw["variant"][key]
        cadences = raw["variant"].pop("published_cadences")
        if cadences:
            raw["variant"]["published"] |= cadences
        for key in ("then", "overrides", "mean_epochs"):
            if not raw["variant"][key]:
                del raw["variant"][key]
        if not raw["problem"].get("exif_orientation"):  # records from before this setting stay the same runs
            raw["problem"].pop("exif_orientation", None)
        return json.dumps(raw, sort_keys=True)

    def identity(self) -> str:
        """What determines the run: two runs are the same if these texts are."""
        return identity_of(json.loads(self.as_json()))


def identity_of(recorded: Mapping[str, Any]) -> str:
    """The same of a recorded configuration: without the label and the overrides, whose effect the settings hold."""
    variant = {key: value for key, value in recorded["variant"].items() if key not in ("label", "overrides")}
    problem = recorded["problem"]
    if "statistics_images" in problem:  # images: where they lie and who decodes them changes no number
        problem = {key: value for key, value in problem.items() if key not in OF_THE_MACHINE}
    return json.dumps({**recorded, "variant": variant, "problem": problem}, sort_keys=True)


OF_THE_MACHINE = ("data_path", "num_workers", "start_method", "stage_folder", "stage_seconds")
"""Settings of images that are no part of a run's identity; the data itself is told apart by its digest. `stage_folder`
stands in older records alone."""
