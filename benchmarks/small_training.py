"""Small trainings on the processor, with and without acceleration: problems, schedules of the rate, and what counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau

import aadl
from benchmarks.fractals import Task, images_of
from data_loaders import graduate_admissions
from data_loaders.fractals.drawing import USUAL
from data_loaders.fractals.sets import VALIDATION

Set = tuple[Tensor, Tensor]
"""Inputs and targets."""

SCHEDULES: dict[str, Callable[[Optimizer, int, float], Any]] = {
    "constant": lambda optimizer, steps, rate: LambdaLR(optimizer, lambda step: 1.0),
    "linear": lambda optimizer, steps, rate: LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.0)),
    "cosine": lambda optimizer, steps, rate: CosineAnnealingLR(optimizer, steps),
    "warm-up": lambda optimizer, steps, rate: LinearLR(optimizer, 0.05, 1.0, max(steps // 5, 1)),
    "one cycle": lambda optimizer, steps, rate: OneCycleLR(
        optimizer, rate, total_steps=steps + 1, cycle_momentum=False
    ),
    "plateau": lambda optimizer, steps, rate: ReduceLROnPlateau(optimizer, factor=0.5, patience=max(steps // 50, 2)),
}


@dataclass(frozen=True)
class Problem:
    """What is trained: training and validation set, network, loss, steps, and where the search of the rate starts."""

    data: Callable[[], tuple[Set, Set]]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    first_rate: int = 0


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A perceptron."""
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Three convolutions with BatchNorm that halve the sides of images of 12 pixels, and a linear layer."""

    def halved(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*halved(3, 8, 5), *halved(8, 16, 3), *halved(16, 16, 3), nn.Flatten(), nn.Linear(64, 10))


@cache
def admissions() -> tuple[Set, Set]:
    """320 and 80 rows of seven features, standardized by the training rows, and the chance of admission."""
    data = graduate_admissions.load()
    train, validation = graduate_admissions.split(data)
    features, target = (torch.as_tensor(part, dtype=torch.float32) for part in (data.features, data.target[:, None]))
    features = (features - features[train].mean(0)) / features[train].std(0, correction=0)
    return (features[train], target[train]), (features[validation], target[validation])


@cache
def digits() -> tuple[Set, Set]:
    """1,437 and 360 images of 8 x 8 pixels, flat and in [-1, 1], and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("error: the digits need scikit-learn, which is missing: pip install scikit-learn") from None
    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 8 - 1, labels[order]
    return (pixels[360:], labels[360:]), (pixels[:360], labels[:360])


@cache
def fractals() -> tuple[Set, Set]:
    """240 and 160 images of 12 pixels, of ten classes, with half of the usual variation."""
    task = Task(size=12, variation=USUAL.times(0.5))
    return images_of(task, 0, 24), images_of(task, VALIDATION, 16)


PROBLEMS = {
    "admissions": Problem(admissions, lambda: mlp(7, 64, 64, 64, 1), functional.mse_loss, 300, -1),
    "digits": Problem(digits, lambda: mlp(64, 32, 10), functional.cross_entropy, 300, -1),
    "fractals": Problem(fractals, cnn, functional.cross_entropy, 200, -1),
}


@dataclass(frozen=True)
class Run:
    """Training and validation losses at every `every`-th step, and what the accelerator did."""

    losses: list[float]
    validation: list[float]
    accepted: int = 0
    attempts: int = 0
    averaged: int = 0
    closures: int = 0
    every: int = 4

    @property
    def final(self) -> float:
        """Mean loss over the last twentieth of the steps; infinite for a run that diverged."""
        tail = self.losses[-max(len(self.losses) // 20, 1) :]
        mean = sum(tail) / len(tail)
        return mean if math.isfinite(mean) else math.inf

    def reached(self, target: float) -> tuple[float, float]:
        """Steps after which the loss is at most `target` for the first time, and the validation loss there.

        Infinity and the last validation loss for a run that never comes to it.
        """
        place = next((place for place, loss in enumerate(self.losses) if loss <= target), None)
        if place is None:
            return math.inf, self.validation[-1]
        return self.every * (place + 1), self.validation[place]


def train(
    problem: Problem,
    batch: int,
    schedule: str,
    rate: float,
    seed: int,
    settings: dict[str, Any] | None = None,
    every: int = 4,
    generator: torch.Generator | None = None,
) -> Run:
    """One training by SGD with Nesterov momentum 0.9, accelerated where there are settings.

    Args:
        problem: what is trained.
        batch: rows of a batch; 0 for all of them.
        schedule: a name of `SCHEDULES`.
        rate: the learning rate it starts from.
        seed: of the weights and of the order of the rows.
        settings: arguments of `aadl.accelerate`.
        every: steps between two evaluations of the losses; 1 where the schedule asks for the loss.
        generator: gives the order of the rows; one of its own, seeded with `seed`, unless given.
    """
    (inputs, targets), validation = problem.data()
    torch.manual_seed(seed)
    generator = generator or torch.Generator().manual_seed(seed)
    model = problem.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
    statistics: Any = {"attempts": 0, "accepted": 0}
    if settings is not None:
        aadl.accelerate(optimizer, **settings)
        statistics = aadl.accelerator_of(optimizer).statistics
    scheduler = SCHEDULES[schedule](optimizer, problem.steps, rate)
    losses: list[float] = []
    validation_losses: list[float] = []
    averaged = closures = 0

    def batches() -> Iterator[Set]:
        while batch in (0, len(inputs)):
            yield inputs, targets
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for chosen in order[: len(order) // batch * batch].split(batch):
                yield inputs[chosen], targets[chosen]

    for step, (some, right) in zip(range(1, problem.steps + 1), batches(), strict=False):

        def closure(some: Tensor = some, right: Tensor = right) -> Tensor:
            nonlocal closures
            closures += 1
            optimizer.zero_grad()
            loss = problem.loss(model(some), right)
            loss.backward()
            return loss

        attempts = statistics["attempts"]
        optimizer.step(closure)
        averaged += statistics["attempts"] > attempts and bool(statistics["averaging"])
        if step % every == 0:
            with torch.no_grad():
                losses.append(float(problem.loss(model(inputs), targets)))
                validation_losses.append(float(problem.loss(model(validation[0]), validation[1])))
            if not math.isfinite(losses[-1]):
                break
        scheduler.step(*losses[-1:] if isinstance(scheduler, ReduceLROnPlateau) else ())
    return Run(losses, validation_losses, statistics["accepted"], statistics["attempts"], averaged, closures, every)
