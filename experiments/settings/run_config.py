"""What determines a run, and an experiment of many. It imports no torch.

`ExperimentConfig` is what a file holds. `experiments.runs.config` reads it, and checks what only torch can judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import not_
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, PrivateAttr, model_validator

from experiments.settings.kinds import Component, Different, Name, Named, Period, Seeds, Share, Text, Wait
from experiments.settings.launch_settings import LaunchSettings
from experiments.settings.schema import Settings, read_settings
from experiments.settings.suggestion import not_one_of

P = TypeVar("P", bound=Settings)
"""Settings of a problem."""
T = TypeVar("T", bound=Settings)
"""Settings of a training."""


class PublishedConfig(Settings):
    """Settings of the published scheme, see `experiments.training.published`."""

    relaxation: Annotated[float, Field(gt=0, le=1)] = 1.0
    wait_iterations: Wait = 1
    history_depth: Annotated[int, Field(ge=3)] = 5
    store_each_nth: Period = 1
    frequency: Period = 10
    reg_acc: NonNegativeFloat = 0.0
    average: bool = False
    average_tolerance: NonNegativeFloat = 0.1
    safeguard: bool = False


class SecondStage(Settings):
    """What goes on from an iteration on: another optimizer, without the scheduler."""

    after: PositiveInt
    optimizer: Named
    acceleration: dict[str, Any] | None = None


class VariantConfig(Settings):
    """One way to train: an optimizer, and at most one acceleration, and the weights that are evaluated.

    Attributes:
        label: for tables and figures; the name of the variant where the configuration has none.
        ema_decay: of an exponential moving average of the weights, which is evaluated in their place.
        mean_epochs: the mean of the weights after every step of this many last epochs is evaluated; images only.
        then: the second stage, None for none.
        problem, training: settings that this variant has for itself.
        baseline: name of the variant that it is compared with; that of the configuration where it has none.
    """

    label: Text = ""
    optimizer: Named
    acceleration: dict[str, Any] | None = None
    published: PublishedConfig | None = None
    ema_decay: Share | None = None
    # A record leaves these two out where they are not given: they are younger than the first records.
    mean_epochs: PositiveInt | None = Field(default=None, exclude_if=not_)
    then: SecondStage | None = Field(default=None, exclude_if=not_)
    problem: dict[str, Any] = Field(default={}, exclude=True)
    training: dict[str, Any] = Field(default={}, exclude=True)
    baseline: Name = Field(default="", exclude=True)
    _index: int = PrivateAttr(0)

    @property
    def index(self) -> int:
        """Its place among the variants of the configuration."""
        return self._index

    @model_validator(mode="after")
    def _exclude_each_other(self) -> VariantConfig:
        for one, other in (("ema_decay", "mean_epochs"), ("acceleration", "published")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} exclude each other")
        return self

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """The settings that this variant has for itself, by section."""
        return {part: own for part, own in (("problem", self.problem), ("training", self.training)) if own}

    def completed(self, name: str, baseline: str, index: int) -> VariantConfig:
        """The variant with what its configuration says of it elsewhere."""
        copy = self.model_copy(update={"label": self.label or name, "baseline": self.baseline or baseline})
        copy._index = index
        return copy

    def with_rate(self, rate: float) -> VariantConfig:
        optimizer = Component(self.optimizer.name, {**self.optimizer.arguments, "lr": rate})
        return self.model_copy(update={"optimizer": optimizer})


class LearningRateStudy(Settings):
    """Loss at the end of training against the learning rate.

    The rate is the `lr` of the first optimizer alone: `adam_lr` of MuonAdam and the second stage stay as they are.
    """

    variants: Different[Name]
    rates: Different[PositiveFloat]
    seeds: Seeds = (0, 1, 2)

    @staticmethod
    def run_name(variant: str, rate: float) -> str:
        """The folder of the runs of a variant at a rate."""
        return f"{variant}--lr-{rate:g}"


class BatchSizeStudy(Settings):
    """Relative standard deviation of consecutive updates against the batch size, over equally many steps."""

    variant: Name
    sizes: Different[PositiveInt]
    steps: Annotated[int, Field(ge=2)] = 800
    seeds: Seeds = (0, 1, 2)

    def run_name(self, size: int) -> str:
        """The folder of the runs with a batch size."""
        return f"{self.variant}--batch-{size}"


class Studies(Settings):
    """The studies of a configuration."""

    learning_rate: LearningRateStudy | None = None
    batch_size: BatchSizeStudy | None = None


class SaveConfig(Settings):
    """What is saved of runs, and when. No part of a run's identity.

    Attributes:
        every_seconds: between two checkpoints of a run.
        keep: newest checkpoints of a run that are kept; those of a finished run are removed.
        weights: whether the record of a finished run holds the weights that were evaluated last, see
            `records.reading.read_weights`.
        attempts: whether the record holds every attempt of the acceleration, see `records.reading.read_attempts`.
        tensorboard: whether the series are also written for TensorBoard, into a folder beside the record.
    """

    every_seconds: NonNegativeFloat = 300.0
    keep: Annotated[int, Field(ge=1, lt=1000)] = 2
    weights: bool = False
    attempts: bool = False
    tensorboard: bool = False

    removed_keys: ClassVar = dict.fromkeys(("asynchronous", "agree_every"), "leave it out")

    @property
    def parts(self) -> tuple[str, ...]:
        """Groups that the record of a finished run must have."""
        return tuple(name for name in ("weights", "attempts") if getattr(self, name))


class ExperimentConfig(Settings, Generic[P, T]):
    """Every variant with every seed, and the studies; `reproduce` starts `num_ranks` processes on one machine."""

    experiment: Name
    scale: Name
    seeds: Seeds
    problem: P
    training: T
    variants: Annotated[dict[Name, VariantConfig], Field(min_length=1)]
    baseline: Name = ""
    studies: Studies = Studies()
    expected_minutes: PositiveFloat | None = None
    num_ranks: Annotated[int, Field(ge=1, le=1024)] = 1
    save: SaveConfig = SaveConfig()
    launch: LaunchSettings = LaunchSettings()
    _context: Mapping[str, Any] = PrivateAttr()

    def model_post_init(self, context: Mapping[str, Any]) -> None:
        self._context = context

    @property
    def kind(self) -> Any:
        """The `experiments.runs.experiment.Experiment` whose settings `problem` and `training` are."""
        return self._context["kind"]

    @model_validator(mode="after")
    def _name_variants_that_exist(self) -> ExperimentConfig[P, T]:
        rates, sizes = self.studies.learning_rate, self.studies.batch_size
        named: dict[str, Sequence[str]] = {
            "baseline": [self.baseline],
            "studies.learning_rate.variants": rates.variants if rates else (),
            "studies.batch_size.variant": [sizes.variant] if sizes else (),
            **{f"variants.{name}.baseline": [variant.baseline] for name, variant in self.variants.items()},
        }
        for key, names in named.items():
            for name in names:
                if name and name not in self.variants:
                    raise ValueError(f"{key} {not_one_of(name, self.variants)}")
        return self

    def completed(self, only: Sequence[str] | None = None) -> ExperimentConfig[P, T]:
        """The configuration whose variants have a label, a baseline and their place.

        `only` names the variants to keep, in this order, without studies; ValueError where there is no such variant.
        """
        names = list(self.variants)
        for name in only or ():
            if name not in names:
                raise ValueError(f"variants {not_one_of(name, names)}")
        baseline = self.baseline or names[0]
        variants = {name: self.variants[name].completed(name, baseline, names.index(name)) for name in only or names}
        studies = self.studies if only is None else Studies()
        return self.model_copy(update={"variants": variants, "studies": studies})

    def settings_of(self, name: str) -> tuple[P, T]:
        """The settings of the problem and of the training of one variant: those of all, with its overrides.

        An override replaces a setting as a whole, `options` included; ValueError where it is refused.
        """

        def own(part: str) -> Any:
            settings, changes = getattr(self, part), getattr(self.variants[name], part)
            if not changes:
                return settings
            where = f"variants.{name}.{part}"
            return read_settings(type(settings), {**dict(settings), **changes}, where, self._context)

        return own("problem"), own("training")


@dataclass(frozen=True)
class RunConfig(Generic[P, T]):
    """Everything that determines one run, in the folder `name`; its `study` is "" for the main comparison.

    `kind` is the `experiments.runs.experiment.Experiment` whose settings `problem` and `training` are.
    """

    experiment: str
    scale: str
    name: str
    variant_name: str
    study: str
    seed: int
    kind: Any
    problem: P
    training: T
    variant: VariantConfig

    def as_json(self) -> str:
        """The configuration as JSON with sorted keys, for the record."""
        recorded = {key: value for key, value in vars(self).items() if key != "kind"}
        for part in ("problem", "training", "variant"):
            recorded[part] = recorded[part].model_dump()
        if self.variant.overrides:
            recorded["variant"]["overrides"] = self.variant.overrides
        return json.dumps(recorded, sort_keys=True)

    def identity(self) -> str:
        """What determines the run: two runs are the same if these texts are equal."""
        return self.identity_of(json.loads(self.as_json()))

    def identity_of(self, recorded: Mapping[str, Any]) -> str:
        """The identity of a recorded configuration, as comparable with this run's."""
        return identity_of(recorded, getattr(self.problem, "of_the_machine", ()))


def identity_of(recorded: Mapping[str, Any], of_the_machine: Sequence[str] = ()) -> str:
    """What determines a recorded run, whose configuration is as `RunConfig.as_json` writes it.

    It leaves out the label, the overrides, whose effect the settings hold, and `of_the_machine`, settings of the
    problem that change no number: where data lies and who reads it.
    """
    variant = {key: value for key, value in recorded["variant"].items() if key not in ("label", "overrides")}
    problem = {key: value for key, value in recorded["problem"].items() if key not in of_the_machine}
    return json.dumps({**recorded, "variant": variant, "problem": problem}, sort_keys=True)
