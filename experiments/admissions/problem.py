"""Graduate admissions: regression of the chance of admission from seven scores, the paper's first experiment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from data_loaders.graduate_admissions import GraduateAdmissions, load, split
from experiments.admissions.settings import GraduateAdmissionsConfig, TrainingConfig
from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.models.mlp import MLP
from experiments.settings.run_config import RunConfig
from experiments.training.epochs import Epochs
from experiments.training.plan import schedule_of
from experiments.training.problem import Description, Problem, Residuals

Batch = tuple[Tensor, Tensor]
"""Standardized features (rows, 7), and the chance of admission (rows, 1)."""


def read_data(path: str | None) -> tuple[GraduateAdmissions, str]:
    """The table and a short hash of its values."""
    data = load(path)
    digest = hashlib.sha256(data.features.tobytes() + data.target.tobytes()).hexdigest()[:16]
    return data, digest


def describe(config: GraduateAdmissionsConfig) -> Description:
    """Reads the table before any run, and says where it is from and how many rows are trained on."""
    data, digest = read_data(config.data_path)
    return Description(data.source, digest, len(split(data, config.validation_fraction, config.split_seed)[0]))


class AdmissionsProblem(Problem):
    """The mean squared error of a network on two sets that are in memory.

    Features are standardized by the mean and the deviation of the training set; the target stays as it is. A rank takes
    every world_size-th row of a batch, so the mean of the ranks' gradients is the gradient of the whole batch. The
    run's seed sets the initial weights and the order of the batches.

    Raises:
        ValueError: the table is not as it must be, or a batch cannot be divided among the ranks.
        OSError: the table's file cannot be read.
    """

    def __init__(self, run: RunConfig[GraduateAdmissionsConfig, TrainingConfig], ranks: Ranks) -> None:
        problem, training = run.problem, run.training
        data, digest = read_data(problem.data_path)
        train_rows, validation_rows = split(data, problem.validation_fraction, problem.split_seed)
        for size in (training.batch_size, len(train_rows) % training.batch_size):
            if size % ranks.world_size:
                raise ValueError(f"a batch of {size} rows cannot be divided evenly among {ranks.world_size} ranks")
        device = device_of(ranks)
        mean = data.features[train_rows].mean(axis=0)
        deviation = data.features[train_rows].std(axis=0)
        deviation[deviation == 0] = 1.0

        def tensors(rows: np.ndarray) -> Batch:
            features, target = (data.features[rows] - mean) / deviation, data.target[rows, None]
            return (
                torch.as_tensor(features, dtype=torch.float32, device=device),
                torch.as_tensor(target, dtype=torch.float32, device=device),
            )

        torch.manual_seed(run.seed)
        model = MLP((data.features.shape[1], *problem.hidden_sizes, 1), problem.activation).to(device)
        super().__init__(model, data_source=data.source, data_digest=digest)
        self._train_set, self._validation_set, self._training = tensors(train_rows), tensors(validation_rows), training
        self._seed, self._own = run.seed, slice(ranks.rank, None, ranks.world_size)

    def plan(self) -> Epochs:
        training = self._training
        schedule = schedule_of(training.scheduler)
        return Epochs(self.batches, training.epochs, schedule, measures_updates=training.measure_updates)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of this rank in an epoch, from a step on; seed and epoch determine their order."""
        for rows in self._order(self._seed * 1_000_003 + epoch).split(self._training.batch_size)[first:]:
            yield self._of_this_rank(rows)

    def _order(self, seed: int) -> Tensor:
        features = self._train_set[0]
        return torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)

    def _of_this_rank(self, rows: Tensor) -> Batch:
        features, target = self._train_set
        return features[rows[self._own]], target[rows[self._own]]

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(network(batch[0]), batch[1])

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        return {
            "metrics/train/loss": float(self.loss(network, self._train_set)),
            "metrics/validation/loss": float(self.loss(network, self._validation_set)),
        }

    def least_squares(self, probe_rows: int | None = None, check_rows: int | None = None) -> Residuals:
        """The errors on rows of the training set.

        Args:
            probe_rows: rows that an acceleration solves for; None for all but those of the check.
            check_rows: further rows that judge the acceleration; None for no check.
        """
        order = self._order(self._seed)
        check, probe = order[: check_rows or 0], order[check_rows or 0 :][:probe_rows]
        return Residuals(self._errors_on(probe), self._errors_on(check) if len(check) else None)

    def _errors_on(self, rows: Tensor) -> Callable[[], Tensor]:
        features, target = self._of_this_rank(rows)

        def errors() -> Tensor:
            with torch.no_grad():
                error: Tensor = self.model(features) - target
            return error.flatten()

        return errors
