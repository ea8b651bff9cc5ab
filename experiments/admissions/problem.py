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
from experiments.training.problem import Description, Problem, Residuals

Batch = tuple[Tensor, Tensor]


def read_data(path: str | None) -> tuple[GraduateAdmissions, str]:
    """The table and a short hash of its values."""
    data = load(path)
    digest = hashlib.sha256(data.features.tobytes() + data.target.tobytes()).hexdigest()[:16]
    return data, digest


def describe(config: GraduateAdmissionsConfig) -> Description:
    """The table, before any run.

    Raises:
        ValueError: the table is not as it must be.
        OSError: the table's file cannot be read.
    """
    data, digest = read_data(config.data_path)
    return Description(data.source, digest, len(split(data, config.validation_fraction, config.split_seed)[0]))


def build(config: RunConfig, ranks: Ranks) -> Problem:
    """The regression problem of one run.

    Features are standardized by the mean and the deviation of the training set; the target stays as it is. The seed of
    the run sets the initial weights and the order of the batches. A rank takes every world_size-th row of a batch, so
    the mean of the ranks' gradients is the gradient of the whole batch.

    Raises:
        ValueError: the table is not as it must be, or a batch cannot be divided among the ranks.
        OSError: the table's file cannot be read.
    """
    problem, training = config.problem, config.training
    assert isinstance(problem, GraduateAdmissionsConfig) and isinstance(training, TrainingConfig)
    data, digest = read_data(problem.data_path)
    train_rows, validation_rows = split(data, problem.validation_fraction, problem.split_seed)
    device = device_of(ranks)
    batch_size = training.batch_size
    for size in (batch_size, len(train_rows) % batch_size):
        if size % ranks.world_size:
            raise ValueError(f"a batch of {size} rows cannot be divided evenly among {ranks.world_size} ranks")

    mean = data.features[train_rows].mean(axis=0)
    deviation = data.features[train_rows].std(axis=0)
    deviation[deviation == 0] = 1.0

    def tensors(rows: np.ndarray) -> Batch:
        features = (data.features[rows] - mean) / deviation
        target = data.target[rows, None]
        return (
            torch.as_tensor(features, dtype=torch.float32, device=device),
            torch.as_tensor(target, dtype=torch.float32, device=device),
        )

    train_set, validation_set = tensors(train_rows), tensors(validation_rows)
    torch.manual_seed(config.seed)
    sizes = (data.features.shape[1], *problem.hidden_sizes, 1)
    model = MLP(sizes, problem.activation).to(device)

    def epoch_batches(epoch: int, first: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(train_rows), generator=generator).to(device)
        for indices in order.split(batch_size)[first:]:
            own = indices[ranks.rank :: ranks.world_size]
            yield train_set[0][own], train_set[1][own]

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(network(batch[0]), batch[1])

    def least_squares(probe_rows: int | None = None, check_rows: int | None = None) -> Residuals:
        order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(config.seed)).to(device)
        check, probe = order[: check_rows or 0], order[check_rows or 0 :][:probe_rows]

        def on(rows: Tensor) -> Callable[[], Tensor]:
            features, target = (tensor[rows[ranks.rank :: ranks.world_size]] for tensor in train_set)

            def residuals() -> Tensor:
                with torch.no_grad():
                    error: Tensor = model(features) - target
                return error.flatten()

            return residuals

        return Residuals(on(probe), on(check) if len(check) else None)

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {
            "metrics/train/loss": float(loss(network, train_set)),
            "metrics/validation/loss": float(loss(network, validation_set)),
        }

    return Problem(model, epoch_batches, loss, evaluate, data.source, digest, least_squares=least_squares)
