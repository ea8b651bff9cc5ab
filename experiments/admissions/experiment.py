"""Graduate admissions as an experiment of the suite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.admissions import problem
from experiments.admissions.settings import GraduateAdmissionsConfig, TrainingConfig
from experiments.distributed.ranks import Ranks
from experiments.runs.experiment import Experiment
from experiments.settings.run_config import ExperimentConfig, RunConfig
from experiments.training.problem import Description, Problem


class AdmissionsExperiment(Experiment[GraduateAdmissionsConfig, TrainingConfig]):
    """Regression of the chance of admission: `probe_rows` of the training set are those whose residuals are made small.

    A candidate must be better on `check_rows` others too; by default all other rows are solved for and nothing checks.
    """

    problem_settings = GraduateAdmissionsConfig
    training_settings = TrainingConfig
    studies = ("learning_rate", "batch_size")
    probes = ("probe_rows", "check_rows")
    is_least_squares = True
    loss_name = "MSE"

    def describe(self, settings: GraduateAdmissionsConfig) -> Description:
        return problem.describe(settings)

    def build(self, run: RunConfig[GraduateAdmissionsConfig, TrainingConfig], ranks: Ranks) -> Problem:
        return problem.AdmissionsProblem(run, ranks)

    def check_rows(self, config: ExperimentConfig[GraduateAdmissionsConfig, TrainingConfig], num_rows: int) -> None:
        study = config.studies.batch_size
        largest = max(config.training.batch_size, *(study.sizes if study else (1,)))
        if largest > num_rows:
            raise ValueError(f"a batch of {largest} rows is larger than the training set of {num_rows}")
        for name, variant in config.variants.items():
            _check_probe(variant.acceleration or {}, num_rows, f"variants.{name}.acceleration")

    def training_of_study(self, training: TrainingConfig, num_rows: int, size: int, steps: int) -> TrainingConfig:
        epochs = max(1, round(steps / math.ceil(num_rows / size)))
        return training.model_copy(update={"batch_size": size, "epochs": epochs, "measure_updates": True})

    def trained(self, problem: Mapping[str, Any]) -> str:
        hidden = "-".join(map(str, problem["hidden_sizes"]))
        return f"MLP 7-{hidden}-1 on graduate admissions"


def _check_probe(acceleration: Mapping[str, Any], num_rows: int, where: str) -> None:
    """Rows on which residuals are solved for, and others that check, out of the training set."""
    probe, check = (acceleration.get(name) for name in AdmissionsExperiment.probes)
    if (probe or 1) + (check or 0) > num_rows:
        raise ValueError(
            f"{where}: probe_rows and check_rows must be at most the {num_rows} rows of the training set together, got "
            f"{probe} and {check}"
        )


EXPERIMENT = AdmissionsExperiment()
