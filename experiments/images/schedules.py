"""Learning rates that change from step to step."""

from __future__ import annotations

import bisect
import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from experiments.images.settings import ImageTrainingConfig


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
