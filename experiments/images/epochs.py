"""Epochs of many steps with images that are loaded on the way: rates step by step, and the time that goes where."""

from __future__ import annotations

import bisect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from experiments.images.settings import ImageTrainingConfig
from experiments.training.epochs import Epochs
from experiments.training.plan import Scheduling
from experiments.training.progress import Bar

if TYPE_CHECKING:
    from experiments.training.train import Training

INPUT = "timing/input_seconds"


class ImageEpochs(Epochs):
    """Passes over a set of images; the schedule steps after each step of the optimizer.

    The series have the seconds of waiting for images and of evaluations, images per second, and the learning rate. A
    step has `batch_images` over all ranks; the last epoch always has an evaluation.
    """

    def __init__(
        self,
        batches: Callable[[int, int], Iterable[Any]],
        num_epochs: int,
        schedule: Scheduling,
        *,
        steps_per_epoch: int,
        batch_images: int,
        evaluate_every: int,
        measures_updates: bool,
    ) -> None:
        super().__init__(batches, num_epochs, schedule, measures_updates=measures_updates)
        self._steps_per_epoch, self._batch_images = steps_per_epoch, batch_images
        self._evaluate_every = evaluate_every

    def bar(self, enabled: bool) -> Bar:
        return Bar(self.num_intervals * self._steps_per_epoch, "steps", enabled, images=self._batch_images)

    def done(self, run: Training) -> int:
        return run.num_steps

    def begin(self, run: Training) -> None:
        run.seconds[INPUT] = 0.0

    def _loaded(self, run: Training) -> Iterator[Any]:
        """The batches on the device; the time that this process waits for them is counted."""
        batches = iter(self._batches(run.interval, run.step))
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            run.add_seconds(INPUT, time.perf_counter() - start)
            if batch is None:
                return
            yield run.problem.to_device(batch)

    def after_step(self, run: Training) -> None:
        with warnings.catch_warnings():
            # GradScaler often skips the first step, and the schedule goes on all the same.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.step_scheduler()

    def after_steps(self, run: Training) -> None:
        """Nothing: the schedule has stepped already."""

    def is_evaluated(self, run: Training) -> bool:
        return run.interval % self._evaluate_every == 0 or run.interval == self.num_intervals

    def measures(self, run: Training) -> dict[str, float]:
        values = {"metrics/learning_rate": run.closure.learning_rate}
        if run.losses:
            before = run.series["timing/training_seconds"][-1]
            seconds = run.clock.values()["timing/training_seconds"] - before
            values["timing/images_per_second"] = len(run.losses) * self._batch_images / seconds
        return values


# ---- rates ----------------------------------------------------------------------------------------------------------


def share(training: ImageTrainingConfig, epoch: float, warmup_start: float) -> float:
    """The learning rate at a time `epoch` >= 0 since the start, over the full one.

    With W = warmup_epochs, E = epochs, s = warmup_start, f = final_share and x = (epoch - W) / (E - W):

        epoch < W:    s + (1 - s) epoch / W
        cosine:       f + (1 - f) (1 + cos(pi x)) / 2
        polynomial:   f + (1 - f) (1 - x)^power
        step:         gamma^(number of milestones <= epoch)
    """
    if epoch < training.warmup_epochs:
        return warmup_start + (1 - warmup_start) * epoch / training.warmup_epochs
    x = min(1.0, (epoch - training.warmup_epochs) / (training.epochs - training.warmup_epochs))
    rest = 1 - training.final_share
    if training.schedule == "cosine":
        return training.final_share + rest * (1 + math.cos(math.pi * x)) / 2
    if training.schedule == "polynomial":
        return training.final_share + rest * (1 - x) ** training.power
    if training.schedule == "step":
        return training.gamma ** bisect.bisect_right(training.milestones, epoch)
    return 1.0


def scaled_rate(training: ImageTrainingConfig, batch: int) -> float:
    """What the optimizer's learning rate is multiplied by for batches of this size (Goyal et al. 2017, sec. 2.1)."""
    return batch / training.reference_batch if training.reference_batch is not None else 1.0


def step_scheduler(
    optimizer: torch.optim.Optimizer, training: ImageTrainingConfig, steps_per_epoch: int, batch: int
) -> LambdaLR:
    """The schedule over an optimizer, whose rate is that of `batch` images already; steps with the optimizer.

    Without a `warmup_start` the rise begins with the rate of the reference batch.
    """
    start = training.warmup_start
    if start is None:
        start = min(1.0, 1 / scaled_rate(training, batch))

    def at(step: int) -> float:
        return share(training, step / steps_per_epoch, start)

    return LambdaLR(optimizer, at)
