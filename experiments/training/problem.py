"""What an experiment is for the training loop, and what it knows of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn


class Field(NamedTuple):
    """Values on a grid, for the record; a field whose only dimension has its own name is a coordinate."""

    dimensions: tuple[str, ...]
    values: np.ndarray
    units: str
    long_name: str


class Description(NamedTuple):
    """What is known of the data before a run.

    Attributes:
        source: where it comes from.
        digest: short hash.
        num_rows: to train on, None where points are sampled.
        note: what everybody must know of results on it, "" for nothing.
    """

    source: str
    digest: str
    num_rows: int | None
    note: str = ""


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of its state_dict on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


Observer = Callable[[Tensor], None]
"""What is handed the residuals of an evaluation."""


class Residuals(NamedTuple):
    """Residuals of the loss at the present weights of the network, on the rows or points of this rank.

    Their squares, summed over all ranks, are the loss of these rows or points up to a factor.

    Attributes:
        solved: on those that an acceleration makes small.
        checked: on others, by which it is judged; None for no others.
    """

    solved: Callable[[], Tensor]
    checked: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """What the loop needs to know of an experiment.

    Attributes:
        model: the network, on its device, initialized from the run's seed.
        epoch_batches: (epoch from 1, step from 0) -> batches of this rank, from that step of the epoch on; None where
            `points` is given.
        loss: (model, batch) -> scalar, the mean over the batch.
        evaluate: model -> values by the name of their series, as "metrics/train/loss"; called in eval mode, no grad.
        data_source: where the data came from, "csv", "surrogate" or "computed".
        data_digest: short hash of the data, for telling whether two runs saw the same.
        points: (model, iteration) -> the batch at that iteration; the same object as long as the points are the same.
        backward: (model, batch, observe) -> loss, with gradients accumulated, both the mean over all ranks; `observe`,
            where it is not None, is handed the residuals of this evaluation, as `least_squares` has them. None for
            `loss` and its backward pass, and for DistributedDataParallel where there are several ranks.
        residuals: (model, batch) -> residuals r, (rows,), weighted so that the loss is sum r^2.
        linearize: (model, batch, observe) -> r and its Jacobian, (rows,) and (rows, parameters); `observe` as above.
        least_squares: settings of `run_config.PROBES` -> `Residuals` of this rank; None where the loss is no sum of
            squares.
        finish: model -> attributes of the record that are worth one evaluation, at the end.
        fields: model -> fields of the record.
        reset_on_new_data: whether L-BFGS and aadl begin anew when `points` gives other points.
        steps_per_epoch: of image classification.
        batch_images: images in a step, over all ranks.
        to_device: a batch as `epoch_batches` gives it -> the batch on the device; None where it is there.
        parameters: arguments of an optimizer -> what it is given; None for `model.parameters()`.
        export: model -> its weights for the record, called by all ranks; None for `weights_of`.
        close: ends what the problem has started.
        state: what the problem needs to go on, as a nested dictionary of tensors and plain values; None for nothing.
            All ranks call it.
        restore: puts such a state back and returns the batch that was the present one, None without `points`.
        synchronize: makes the ranks' copies of what is not trained (statistics of BatchNorm) the same, before a save.
        best_by: series by which the best checkpoint is chosen, the smaller the better.
        attributes: further attributes of the record.
    """

    model: nn.Module
    epoch_batches: Callable[[int, int], Iterable[Any]] | None
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    data_source: str
    data_digest: str
    points: Callable[[nn.Module, int], Any] | None = None
    backward: Callable[[nn.Module, Any, Observer | None], Tensor] | None = None
    residuals: Callable[[nn.Module, Any], Tensor] | None = None
    linearize: Callable[[nn.Module, Any, Observer | None], tuple[Tensor, Tensor]] | None = None
    least_squares: Callable[..., Residuals] | None = None
    finish: Callable[[nn.Module], dict[str, Any]] | None = None
    fields: Callable[[nn.Module], dict[str, Field]] | None = None
    reset_on_new_data: bool = False
    steps_per_epoch: int | None = None
    batch_images: int | None = None
    to_device: Callable[[Any], Any] | None = None
    parameters: Callable[[Mapping[str, Any]], Any] | None = None
    export: Callable[[nn.Module], dict[str, Tensor]] | None = None
    close: Callable[[], None] | None = None
    state: Callable[[], dict[str, Any]] | None = None
    restore: Callable[[Mapping[str, Any]], Any] | None = None
    synchronize: Callable[[], None] | None = None
    best_by: str = "metrics/validation/loss"
    attributes: Mapping[str, Any] = field(default_factory=dict)
