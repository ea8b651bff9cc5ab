"""What an experiment is for the training loop: a class to subclass; and what is known of its data before a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.settings.kinds import Component
from experiments.training.closure import Closure
from experiments.training.components import make_optimizer

if TYPE_CHECKING:
    from experiments.training.plan import Plan
    from experiments.training.stage import Stage


class Field(NamedTuple):
    """One array of a record; a field of one dimension that has its own name is a coordinate axis."""

    dimensions: tuple[str, ...]
    values: np.ndarray
    units: str
    long_name: str


class Description(NamedTuple):
    """What is known of the data before a run.

    Attributes:
        source: where the data comes from.
        digest: short hash of the data.
        num_rows: rows to train on, None where points are sampled.
        note: what everybody must know of results on this data, "" for nothing.
    """

    source: str
    digest: str
    num_rows: int | None
    note: str = ""


Observer = Callable[[Tensor], None]
"""A function that receives the residuals of an evaluation."""


class Residuals(NamedTuple):
    """Residuals of the loss at the present weights of the network, on the rows or points of this rank.

    Their squares, summed over all ranks, are the loss of these rows or points up to a factor. An acceleration makes
    those that are `solved` small; those `checked`, on other rows or points, judge it (None: nothing does).
    """

    solved: Callable[[], Tensor]
    checked: Callable[[], Tensor] | None = None


class Problem(ABC):
    """One run as the training loop sees it: the model, what to train it on, its loss and its evaluation.

    A new kind of experiment subclasses it and defines `plan`, `loss` and `evaluate` (docs/new_experiment.md has one).
    Every other method has a default, which fits data that is in memory, torch's optimizers and gradients that
    DistributedDataParallel averages. A subclass overrides what differs. All ranks build the same problem and call its
    methods together, so a method may communicate.

    Attributes:
        model: the network, on its device, initialized from the run's seed.
        data_source: where the data comes from, as "csv", "surrogate" or "computed".
        data_digest: short hash of the data, which tells whether two runs saw the same.
        attributes: further attributes of the record.
        steps_per_epoch: optimizer steps in an epoch, where a cadence may be given as "2 epochs".
        times_acceleration: whether the record has the seconds that the acceleration takes.
    """

    steps_per_epoch: int | None = None
    times_acceleration = False

    def __init__(
        self, model: nn.Module, *, data_source: str, data_digest: str, attributes: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.data_source, self.data_digest = model, data_source, data_digest
        self.attributes = attributes or {}

    # ---- what every experiment defines ----

    @abstractmethod
    def plan(self) -> Plan:
        """The division of a run, which also yields the batches: a new `Epochs`, `Iterations` or another `Plan`."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch of this rank, a differentiable scalar; the mean over the ranks is that of the step."""

    @abstractmethod
    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Values by the name of their series, as "metrics/train/loss".

        The loop calls it in eval mode and without gradients. A series that begins with "timing/" holds seconds of this
        evaluation, which the loop adds up.
        """

    # ---- the step ----

    def closure(self, stages: Sequence[Stage], ranks: Ranks) -> Closure:
        """What the optimizers' steps get; by default one pass through the model, averaged over the ranks by torch."""
        model, device = self.model, device_of(ranks)
        if ranks.world_size > 1:
            model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        return Closure(self, model, stages)

    def backward(self, network: nn.Module, batch: Any, observe: Observer | None = None) -> Tensor:
        """The loss; its gradient is added to that of the parameters.

        `network` is the model as the closure trains it. `observe` receives the residuals of this evaluation, as those
        of `least_squares`; None where nobody asks.
        """
        loss = self.loss(network, batch)
        loss.backward()
        return loss

    def linearize(self, network: nn.Module, batch: Any, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Residuals r (rows,) with loss sum r^2, and their Jacobian (rows, parameters); ValueError for other losses."""
        raise ValueError(f"{type(self).__name__} has no residuals, which the optimizer needs")

    def residuals(self, network: nn.Module, batch: Any) -> Tensor:
        """The residuals of `linearize` alone, without gradients."""
        raise ValueError(f"{type(self).__name__} has no residuals, which the optimizer needs")

    def to_device(self, batch: Any) -> Any:
        return batch

    # ---- the optimizer and its acceleration ----

    def optimizer(self, component: Component) -> torch.optim.Optimizer:
        """The optimizer of a configuration over the parameters of the model."""
        return make_optimizer(component, self.model.parameters())

    def least_squares(self) -> Residuals:
        """The residuals for an acceleration; keyword arguments of a subclass become settings. ValueError for none."""
        raise ValueError(f"{type(self).__name__} has no residuals, which this acceleration needs")

    # ---- a run that stops and goes on ----

    def synchronize(self) -> None:
        """Makes the ranks' copies of what is not trained (statistics of BatchNorm) the same, before a save."""

    def state(self) -> dict[str, Any]:
        """What the problem needs to go on: a nested dictionary of tensors and plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> Any:
        """Puts a state back; returns the batch that was the present one where batches last longer than a step."""
        return None

    # ---- the end ----

    def finish(self, network: nn.Module) -> dict[str, Any]:
        """Attributes of the record that are worth one evaluation at the end."""
        return {}

    def fields(self, network: nn.Module) -> dict[str, Field]:
        return {}

    def export(self, network: nn.Module) -> dict[str, Tensor]:
        """The weights for the record, on the CPU."""
        return weights_of(network)

    def close(self) -> None:
        """Ends what the problem has started, as worker processes."""


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
