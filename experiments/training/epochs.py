"""Training by epochs: passes over a training set, an evaluation after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from experiments.training.plan import Plan, Scheduling
from experiments.training.progress import Bar
from experiments.training.result import Result, padded

if TYPE_CHECKING:
    from experiments.training.train import Training


class Epochs(Plan):
    """Passes over a training set; the schedule steps, and an evaluation follows, after each of them.

    Args:
        batches: (epoch from 1, step from 0) -> the batches of this rank, from that step of the epoch on.
        num_epochs: >= 1.
        schedule: makes the learning-rate schedule; None for a constant rate.
        measures_updates: see `Plan`.
    """

    def __init__(
        self,
        batches: Callable[[int, int], Iterable[Any]],
        num_epochs: int,
        schedule: Scheduling | None = None,
        *,
        measures_updates: bool = False,
    ) -> None:
        super().__init__(num_epochs, schedule, measures_updates)
        self._batches = batches

    def bar(self, enabled: bool) -> Bar:
        return Bar(self.num_intervals, "epochs", enabled)

    def batches(self, run: Training) -> Iterator[Any]:
        """Yields the batches of the epoch that are left; ValueError if the epoch has no batches at all."""
        yield from self._loaded(run)
        if not run.losses:
            raise ValueError(f"epoch {run.interval} has no batches, so that nothing is trained")

    def _loaded(self, run: Training) -> Iterator[Any]:
        for batch in self._batches(run.interval, run.step):
            yield run.problem.to_device(batch)

    def after_steps(self, run: Training) -> None:
        self.step_scheduler()

    def judge(self, run: Training, losses: Tensor) -> tuple[dict[str, float], bool]:
        mean = float(run.mean_over_ranks(losses.mean()))
        return {"metrics/train/minibatch_loss": mean}, math.isfinite(mean)

    def result(self, run: Training, *, finished: bool, **more: Any) -> Result:
        length = self.num_intervals + 1 if finished else run.interval
        return Result(padded(run.series, length), run.diverged_at, run.num_steps, **more)
