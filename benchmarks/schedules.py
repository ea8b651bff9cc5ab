"""Learning rates that change at every step: what acceleration keeps of its gain, on the graduate-admissions MLP.

For each schedule, number of steps and batch size, over the seeds (median [minimum .. maximum]):

    reached   fraction of the steps after which the accelerated run has plain's final training loss
    loss      final training loss over plain's

    python -m benchmarks.schedules --seeds 5
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau

import aadl
from data_loaders import graduate_admissions

Schedule = Callable[[Optimizer, int, float], Any]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda optimizer, steps, rate: LambdaLR(optimizer, lambda step: 1.0),
    "linear": lambda optimizer, steps, rate: LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.0)),
    "cosine": lambda optimizer, steps, rate: CosineAnnealingLR(optimizer, steps),
    "warm-up": lambda optimizer, steps, rate: LinearLR(optimizer, 0.05, 1.0, max(steps // 5, 1)),
    "one cycle": lambda optimizer, steps, rate: OneCycleLR(
        optimizer, rate, total_steps=steps + 1, cycle_momentum=False
    ),
    "plateau": lambda optimizer, steps, rate: ReduceLROnPlateau(optimizer, factor=0.5, patience=max(steps // 50, 2)),
}


def rows() -> tuple[Tensor, Tensor]:
    """Standardized features (320, 7) and target (320, 1) of the training set."""
    data = graduate_admissions.load()
    train, _ = graduate_admissions.split(data)
    features = torch.as_tensor(data.features[train], dtype=torch.float32)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    return features, torch.as_tensor(data.target[train, None], dtype=torch.float32)


def train(
    table: tuple[Tensor, Tensor],
    schedule: Schedule,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    settings: dict[str, int] | None,
) -> list[float]:
    """Training loss on all rows after every step, accelerated where there are settings."""
    torch.manual_seed(seed)
    sizes = (7, 64, 64, 64, 1)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
    if settings is not None:
        aadl.accelerate(optimizer, **settings)  # type: ignore[arg-type]
    scheduler = schedule(optimizer, steps, rate)
    losses, order = [], torch.arange(len(table[0]))
    for step in range(steps):
        place = step * batch % len(order)
        if place == 0 and batch < len(order):
            order = torch.randperm(len(order))
        inputs, target = (part[order[place : place + batch]] for part in table)

        def closure(inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), target)
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            losses.append(float(nn.functional.mse_loss(model(table[0]), table[1])))
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(losses[-1])
        else:
            scheduler.step()
    return losses


def reached(losses: Sequence[float], target: float) -> float:
    """Fraction of the steps after which the loss is at most `target`, or infinity."""
    return next((step / len(losses) for step, loss in enumerate(losses, 1) if loss <= target), math.inf)


def summary(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f} .. {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 200, 2000])
    parser.add_argument("--batches", type=int, nargs="+", default=[320, 40])
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--store-each-nth", type=int, default=10)
    parser.add_argument("--frequency", type=int, default=20)
    arguments = parser.parse_args()
    settings = {"store_each_nth": arguments.store_each_nth, "frequency": arguments.frequency}
    torch.set_num_threads(1)
    table = rows()
    print(f"SGD, Nesterov 0.9, learning rate {arguments.rate:g}, seeds {arguments.first} to "
          f"{arguments.first + arguments.seeds - 1}, {settings}\n\n| schedule | steps | batch | reached | loss |\n|"
          + " --- |" * 5)  # fmt: skip
    for batch in arguments.batches:
        for steps in arguments.steps:
            for name in arguments.schedules:
                fractions, ratios = [], []
                for seed in range(arguments.first, arguments.first + arguments.seeds):
                    run = SCHEDULES[name], steps, batch, arguments.rate, seed
                    plain, fast = train(table, *run, None), train(table, *run, settings)
                    fractions.append(reached(fast, plain[-1]))
                    ratios.append(fast[-1] / plain[-1])
                print(f"| {name} | {steps} | {batch} | {summary(fractions)} | {summary(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
