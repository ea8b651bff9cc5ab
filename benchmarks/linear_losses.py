"""Accelerated against plain training where the updates of an optimizer are piecewise constant or nearly so.

Linear models under losses with constant slopes are where extrapolation is least justified: differences of updates are
rounding noise, or the kink of a single row. For every loss, optimizer, dtype and batch the table has, over the seeds,

    end    mean loss on all data over the last 50 steps, accelerated over plain (median, maximum)
    way    largest ratio of the accelerated loss to the largest loss of the plain run from that step on, or in its last
           50 steps

Losses below FLOOR times the first one count as that.

    python -m benchmarks.linear_losses --seeds 20
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import accumulate, product, starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

import aadl
from benchmarks.tables import head, line, markdown

FEATURES, ROWS, BATCH, LAST = 8, 40, 10, 50
FLOOR = 1e-6
"""Smaller losses, in units of the first one, count as this: nothing is left to learn there."""


def _huber(delta: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def loss(error: Tensor) -> tuple[Tensor, Tensor]:
        slope = error.clamp(-delta, delta)
        return slope * (error - slope / 2), slope

    return loss


def _smooth_l1(error: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _huber(0.25)(error)
    return value / 0.25, slope / 0.25


def _pinball(quantile: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def loss(error: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.where(error > 0, 1 - quantile, -quantile).to(error.dtype)
        return slope * error, slope

    return loss


def _chebyshev(error: Tensor) -> tuple[Tensor, Tensor]:
    """The largest error of all rows, whose slope only that row has; the means over the rows are right so."""
    worst = int(error.abs().argmax())
    slope = torch.zeros_like(error)
    slope[worst] = len(error) * error[worst].sign()
    return error[worst].abs().expand_as(error), slope


LOSSES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "l1": lambda error: (error.abs(), error.sign()),
    "huber 0.1": _huber(0.1),
    "huber 1": _huber(1.0),
    "huber 10": _huber(10.0),
    "smooth l1": _smooth_l1,
    "pinball 0.9": _pinball(0.9),
    "chebyshev": _chebyshev,
    "hinge": lambda margin: ((1 - margin).clamp(min=0), -(margin < 1).to(margin.dtype)),
}
"""Value and slope for each row, of prediction - target (of prediction x label for those of MARGIN)."""
MARGIN = ("hinge", "logistic")
SMOOTH: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "power 1.5": lambda error: (error.abs() ** 1.5, 1.5 * error.abs().sqrt() * error.sign()),
    "squares": lambda error: (error**2, 2 * error),
    "quartic": lambda error: (0.01 * error**4, 0.04 * error**3),
    "cauchy": lambda error: ((1 + error**2).log(), 2 * error / (1 + error**2)),
    "log cosh": lambda error: (softplus(2 * error) - error - math.log(2), error.tanh()),
    "pinball 0.05": _pinball(0.05),
    "logistic": lambda margin: (softplus(-margin), -(-margin).sigmoid()),
}
"""Further losses, of `benchmarks.hunt`."""


class SignDescent(torch.optim.Optimizer):
    """x <- x - lr sign(0.9 m + 0.1 gradient), m <- 0.99 m + 0.01 gradient: Lion (Chen et al., arXiv 2302.06675).

    Without momentum x <- x - lr sign(gradient).
    """

    def __init__(self, params: Any, lr: float, momentum: bool) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if group["momentum"]:
                    momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    update = torch.lerp(p.grad, momentum, 0.9)
                    momentum.lerp_(p.grad, 0.01)
                p.sub_(group["lr"] * update.sign())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "signsgd": lambda p: SignDescent(p, lr=3e-3, momentum=False),
    "lion": lambda p: SignDescent(p, lr=3e-3, momentum=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
}


class Case(NamedTuple):
    """What is trained."""

    loss: str
    optimizer: str
    dtype: torch.dtype
    batch: int


def train(
    case: Case,
    seed: int,
    steps: int,
    settings: dict[str, Any] | None,
    make: Callable[[Any], torch.optim.Optimizer] | None = None,
    clip: Callable[[list[Tensor]], Any] = lambda parameters: None,
) -> tuple[list[float], dict[str, Any]]:
    """Loss on all data after every step, and the statistics of the acceleration.

    Args:
        case: what is trained.
        seed: of the data, the weights and the batches.
        steps: of the optimizer.
        settings: arguments of `aadl.accelerate`; None for plain training.
        make: makes the optimizer of weight and bias; that of the case unless given.
        clip: changes the gradients before every step.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, FEATURES, generator=generator).to(case.dtype)
    target = 2 * inputs.sum(1) + 10
    margin = case.loss in MARGIN
    if margin:  # a tenth of the labels is wrong, so that no plane separates them
        target = inputs.sum(1).sign() * torch.where(torch.arange(ROWS) % 10 == 0, -1, 1)
    weight = (torch.rand(FEATURES, generator=generator) - 0.5).to(case.dtype).requires_grad_()
    bias = torch.zeros(1, dtype=case.dtype, requires_grad=True)
    optimizer = (make or OPTIMIZERS[case.optimizer])([weight, bias])
    if settings is not None:
        aadl.accelerate(optimizer, **settings)
    loss = (LOSSES | SMOOTH)[case.loss]

    @torch.no_grad()
    def evaluate(rows: Tensor | slice, gradient: bool) -> Tensor:
        x, y = inputs[rows], target[rows]
        prediction = x @ weight + bias
        value, slope = loss(prediction * y if margin else prediction - y)
        if gradient:
            slope = slope * y if margin else slope
            weight.grad, bias.grad = x.T @ slope / len(y), slope.mean().view(1)
            clip([weight, bias])
        return value.mean()

    losses, everything = [], slice(None)
    for step in range(steps):
        if step % (ROWS // case.batch) == 0:
            order = torch.randperm(ROWS, generator=generator)[: ROWS // case.batch * case.batch].view(-1, case.batch)
        rows = everything if case.batch == ROWS else order[step % (ROWS // case.batch)]
        if settings is not None and settings.get("safeguard") == "loss":
            optimizer.step(partial(evaluate, rows, True))  # type: ignore[arg-type]
        else:
            evaluate(rows, True)
            optimizer.step()
        losses.append(float(evaluate(everything, False)))
    return losses, {} if settings is None else dict(aadl.accelerator_of(optimizer).statistics)


def ratios(plain: list[float], accelerated: list[float]) -> tuple[float, float]:
    """(end, way) as in the description of the table."""
    floor = FLOOR * plain[0]
    plain, accelerated = ([max(value, floor) for value in losses] for losses in (plain, accelerated))
    end = statistics.mean(accelerated[-LAST:]) / statistics.mean(plain[-LAST:])
    ahead = reversed([*accumulate(reversed(plain), max, initial=max(plain[-LAST:]))][1:])
    return end, max(a / b for a, b in zip(accelerated, ahead, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", default="", help="cases whose row starts with this text")
    parser.add_argument("--safeguard", choices=("residual", "loss"), default="residual")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    worst: dict[str, list[float]] = {}
    print(head(["loss", "optimizer", "dtype", "batch", "end", "largest", "way", "accepted", "reverted"]))
    for case in starmap(Case, product(LOSSES, OPTIMIZERS, (torch.float32, torch.float64), (ROWS, BATCH))):
        name = line([case.loss, case.optimizer, str(case.dtype)[6:], str(case.batch)])
        if not name[2:].startswith(arguments.only):
            continue
        ends, ways, accepted, reverted = [], [], 0, 0
        for seed in range(arguments.seeds):
            plain, _ = train(case, seed, arguments.steps, None)
            accelerated, counts = train(case, seed, arguments.steps, {"safeguard": arguments.safeguard})
            end, way = ratios(plain, accelerated)
            ends.append(end)
            ways.append(way)
            accepted += counts["accepted"]
            reverted += counts["reverted"]
        numbers = [statistics.median(ends), max(ends), max(ways)]
        print(name, *(f"{number:.3f} |" for number in numbers), accepted, "|", reverted, "|", flush=True)
        worst[case.loss] = list(map(max, worst.get(case.loss, numbers), numbers))
    print("\nThe worst of each loss\n")
    rows = [[loss, *(f"{number:.2f}" for number in numbers)] for loss, numbers in worst.items()]
    print(markdown(["loss", "median end", "end", "way"], rows))


if __name__ == "__main__":
    main()
