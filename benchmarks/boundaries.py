"""Losses with a boundary behind which gradients look as before it: `python -m benchmarks.boundaries`.

Full-batch trainings of six numbers without a closure, 610 steps, so that the last candidate is judged. Of the trainings
whose plain run ends finite the table has how many end at nan with acceleration, and the median of what it gains over
what the plain run gains from the start. They run twice: *unseen* takes gradients by torch.autograd.grad, so that the
accelerator sees no losses, *seen* by loss.backward() (about three minutes on one core).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import aadl
from benchmarks.tables import markdown

SEEDS, STEPS, SIZE = range(5, 15), 610, 6
Problem = tuple[Callable[[Tensor], Tensor], Tensor]
"""A loss, and where the training starts."""


def box(generator: torch.Generator) -> Problem:
    """A linear loss, and logarithmic barriers at -1 and 1."""
    slopes = torch.randn(SIZE, generator=generator)
    return lambda x: slopes @ x - 0.01 * (1 - x * x).log().sum(), torch.zeros(SIZE)


def polytope(generator: torch.Generator) -> Problem:
    """A linear loss, and logarithmic barriers at twelve planes."""
    normals, offsets = torch.randn(12, SIZE, generator=generator), torch.rand(12, generator=generator) + 0.5
    slopes = torch.randn(SIZE, generator=generator)
    return lambda x: slopes @ x - 0.01 * (offsets - normals @ x).log().sum(), torch.zeros(SIZE)


def polytope_squares(generator: torch.Generator) -> Problem:
    """The same with the squared distance to a point."""
    normals, offsets = torch.randn(12, SIZE, generator=generator), torch.rand(12, generator=generator) + 0.5
    point = 2 * torch.randn(SIZE, generator=generator)
    return lambda x: (x - point).square().sum() / 2 - 0.01 * (offsets - normals @ x).log().sum(), torch.zeros(SIZE)


def poisson(generator: torch.Generator) -> Problem:
    """Counts whose rates are linear in the weights."""
    rows = torch.rand(20, SIZE, generator=generator)
    counts = torch.poisson(5 * rows.sum(1), generator=generator)
    return lambda x: (rows @ x - counts * (rows @ x).log()).mean(), torch.rand(SIZE, generator=generator)


def variances(generator: torch.Generator) -> Problem:
    """Means and variances of three normal distributions, of which the variances are trained as they are."""
    samples = torch.randn(50, 3, generator=generator) * torch.tensor([0.01, 0.1, 1.0])
    start = torch.cat([torch.zeros(3), torch.ones(3)])
    return lambda x: (x[3:].log() + (samples - x[:3]).square() / x[3:]).mean(), start


PROBLEMS = (box, polytope, polytope_squares, poisson, variances)
OPTIMIZERS: tuple[tuple[Callable[..., torch.optim.Optimizer], float], ...] = (
    (torch.optim.Adam, 3e-3), (torch.optim.Adam, 1e-2), (torch.optim.RMSprop, 3e-3), (torch.optim.SGD, 1e-3),
    (torch.optim.SGD, 1e-2),
)  # fmt: skip


def gain(problem: Problem, make: Callable[..., torch.optim.Optimizer], rate: float, way: str) -> float:
    """How far the loss has fallen at the end; nan where it is not finite.

    Args:
        problem: what is trained.
        make: makes the optimizer.
        rate: its learning rate.
        way: "plain", "unseen" or "seen".
    """
    loss, start = problem
    weights = torch.nn.Parameter(start.clone())
    optimizer: Any = make([weights], lr=rate)
    if way != "plain":
        aadl.accelerate(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if way == "unseen":
            (weights.grad,) = torch.autograd.grad(loss(weights), weights)
        else:
            loss(weights).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(start) - loss(weights))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # nothing was accepted
    rows = []
    for make_problem in PROBLEMS:
        ends: dict[str, list[float]] = {"unseen": [], "seen": []}
        for make, rate in OPTIMIZERS:
            for seed in SEEDS:
                problem = make_problem(torch.Generator().manual_seed(seed))
                plain = gain(problem, make, rate, "plain")
                for way in ends if math.isfinite(plain) else ():
                    ends[way].append(gain(problem, make, rate, way) / plain)
        row = [make_problem.__name__, str(len(ends["seen"]))]
        for ratios in ends.values():
            finite = [ratio if math.isfinite(ratio) else -math.inf for ratio in ratios]
            row += [str(finite.count(-math.inf)), f"{median(finite):.3g}"]
        rows.append(row)
    print(markdown(["loss", "trainings", "nan, unseen", "gain, unseen", "nan, seen", "gain, seen"], rows))


if __name__ == "__main__":
    main()
