"""What determines a run, and an experiment of many: frozen dataclasses, with the allowed range of each setting.

`experiments.runs.config` reads them from YAML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from experiments.settings.checks import (
    BOOLEAN,
    NAME,
    SEEDS,
    Component,
    integer,
    number,
    recorded_settings,
    sequence,
    setting,
)
from experiments.settings.launch_settings import LaunchSettings


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

    @staticmethod
    def run_name(variant: str, rate: float) -> str:
        """The folder of the runs of a variant at a rate."""
        return f"{variant}--lr-{rate:g}"


@dataclass(frozen=True)
class BatchSizeStudy:
    """Relative standard deviation of consecutive updates against the batch size, over equally many steps."""

    variant: str = setting(NAME)
    sizes: tuple[int, ...] = setting(sequence(integer(1)))
    steps: int = setting(integer(2), 800)
    seeds: tuple[int, ...] = setting(SEEDS, (0, 1, 2))

    def run_name(self, size: int) -> str:
        """The folder of the runs with a batch size."""
        return f"{self.variant}--batch-{size}"


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
            `ema_decay`; images: with the statistics computed anew), see `records.reading.read_weights`.
        attempts: whether the record holds every attempt of the acceleration, see `records.reading.read_attempts`.
        tensorboard: whether the series are also written for TensorBoard, into a folder beside the record.
    """

    every_seconds: float = setting(number(0.0, closed_low=True), 300.0)
    keep: int = setting(integer(1, 1000), 2)
    asynchronous: bool = setting(BOOLEAN, False)
    agree_every: int = setting(integer(1, 10_001), 1)
    weights: bool = setting(BOOLEAN, False)
    attempts: bool = setting(BOOLEAN, False)
    tensorboard: bool = setting(BOOLEAN, False)

    @property
    def parts(self) -> tuple[str, ...]:
        """Groups that the record of a finished run must have."""
        return tuple(name for name in ("weights", "attempts") if getattr(self, name))


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment: every variant with every seed, and the studies.

    Attributes:
        kind: the `experiments.runs.experiment.Experiment` whose settings `problem` and `training` are.
        folder: where the configuration's file is, from which paths in it start.
        num_ranks: processes that `reproduce` starts for it on one machine.
    """

    experiment: str
    scale: str
    seeds: tuple[int, ...]
    kind: Any
    problem: Any
    training: Any
    variants: dict[str, VariantConfig]
    learning_rate: LearningRateStudy | None = None
    batch_size: BatchSizeStudy | None = None
    expected_minutes: float | None = None
    num_ranks: int = 1
    save: SaveConfig = field(default_factory=SaveConfig)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    folder: str = "."


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines one run.

    Attributes:
        name: folder of the run.
        study: the study that it belongs to, "" for the main comparison.
        kind: the `experiments.runs.experiment.Experiment` whose settings `problem` and `training` are.
    """

    experiment: str
    scale: str
    name: str
    variant_name: str
    study: str
    seed: int
    kind: Any
    problem: Any
    training: Any
    variant: VariantConfig

    def as_json(self) -> str:
        """The configuration as JSON with sorted keys, for the record.

        It leaves out the kind, what is no setting, the variant that the run is compared with, and its place.
        """
        raw = asdict(replace(self, kind=None))
        del raw["kind"]
        raw["problem"] = {name: raw["problem"][name] for name in recorded_settings(self.problem)}
        for key in ("baseline", "index"):
            del raw["variant"][key]
        cadences = raw["variant"].pop("published_cadences")
        if cadences:
            raw["variant"]["published"] |= cadences
        for key in ("then", "overrides", "mean_epochs"):
            if not raw["variant"][key]:
                del raw["variant"][key]
        return json.dumps(raw, sort_keys=True)

    def identity(self) -> str:
        """What determines the run: two runs are the same if these texts are equal."""
        return self.identity_of(json.loads(self.as_json()))

    def identity_of(self, recorded: Mapping[str, Any]) -> str:
        """The identity of a recorded configuration, as comparable with this run's."""
        return identity_of(recorded, getattr(self.problem, "of_the_machine", ()))


def identity_of(recorded: Mapping[str, Any], of_the_machine: Sequence[str] = ()) -> str:
    """What determines a recorded run.

    It leaves out the label, the overrides, whose effect the settings hold, and what changes no number.

    Args:
        recorded: the configuration, as `RunConfig.as_json` writes it.
        of_the_machine: settings of the problem that say where data lies and who reads it.
    """
    variant = {key: value for key, value in recorded["variant"].items() if key not in ("label", "overrides")}
    problem = {key: value for key, value in recorded["problem"].items() if key not in of_the_machine}
    return json.dumps({**recorded, "variant": variant, "problem": problem}, sort_keys=True)
