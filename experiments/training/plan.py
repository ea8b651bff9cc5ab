"""How a run is divided: a class that says what an interval is, what it trains on, and what happens between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from experiments.settings.kinds import Component
from experiments.training.components import make_scheduler
from experiments.training.progress import Bar

if TYPE_CHECKING:
    from experiments.training.result import Result
    from experiments.training.train import Training

Scheduling = Callable[[torch.optim.Optimizer], LRScheduler]
"""A function that makes the learning-rate schedule of an optimizer."""


class Plan(ABC):
    """The division of a run into intervals, each of which ends with its entries in the series.

    A plan belongs to one run, of which it has the schedule and its own part of the state.

    Attributes:
        num_intervals: intervals of the whole run.
        measures_updates: whether the series have the relative standard deviation of consecutive updates.
        scheduler: the learning-rate schedule of the first optimizer, None for none.
    """

    def __init__(self, num_intervals: int, schedule: Scheduling | None, measures_updates: bool) -> None:
        self.num_intervals, self.measures_updates = num_intervals, measures_updates
        self._schedule = schedule
        self.scheduler: LRScheduler | None = None

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts the schedule on the first optimizer."""
        if self._schedule is not None:
            self.scheduler = self._schedule(optimizer)

    def step_scheduler(self, count: int = 1) -> None:
        for _ in range(count if self.scheduler is not None else 0):
            self.scheduler.step()  # type: ignore[union-attr]

    @abstractmethod
    def bar(self, enabled: bool) -> Bar:
        """The progress that is shown."""

    def done(self, run: Training) -> int:
        """What the bar counts, so far."""
        return run.interval - 1

    def begin(self, run: Training) -> None:
        """Prepares the first evaluation, before any step."""

    @abstractmethod
    def batches(self, run: Training) -> Iterator[Any]:
        """The batches of this rank for the rest of the present interval, one a step."""

    def prepare(self, run: Training, batch: Any) -> None:
        """Hands a batch to the closure, before the step."""
        run.closure.batch = batch

    def after_step(self, run: Training) -> None:
        """What follows each step."""

    def after_steps(self, run: Training) -> None:
        """What follows the last step of an interval, as a part of the training time."""

    @abstractmethod
    def judge(self, run: Training, losses: Tensor) -> tuple[dict[str, float], bool]:
        """Series of the losses of an interval, and whether they are finite."""

    def diverged_at(self, run: Training, losses: Tensor) -> int:
        """Where the present interval, whose losses are these, went wrong."""
        return run.interval

    def is_evaluated(self, run: Training) -> bool:
        """Whether an evaluation follows the present interval."""
        return True

    def measures(self, run: Training) -> dict[str, float]:
        """Series that need no evaluation."""
        return {}

    def place(self, run: Training) -> int:
        """Where the present interval ends on the axis of the series: an epoch or an iteration."""
        return run.interval

    def following(self, run: Training) -> int:
        """Number of the interval that follows the present one; above `num_intervals` at the end of the run."""
        return run.interval + 1

    @abstractmethod
    def result(self, run: Training, *, finished: bool, **more: Any) -> Result:
        """The series so far, padded with NaN to their full length where the run is finished, and what else is given."""

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict() if self.scheduler is not None else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def schedule_of(component: Component | None) -> Scheduling | None:
    """The schedule that a configuration names, None for none."""
    return None if component is None else partial(make_scheduler, component)
