"""Quadratic problems behind the defaults of `aadl.accelerate`: `python -m benchmarks.design_choices`.

Prints the tables of docs/method.md in Markdown (about two minutes on one core). All numbers are medians of three
seeds. Problem: n = 100, eigenvalues log-spaced in [1/kappa, 1], random orthogonal basis, solution standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

import aadl
from aadl.history import History
from benchmarks.tables import markdown

SEEDS = range(3)
MANY = 20_000


class Quadratic:
    """f(x) = (x - solution)' A (x - solution) / 2 with a parameter x that starts at zero."""

    def __init__(self, kappa: float, seed: int, size: int = 100) -> None:
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.logspace(-math.log10(kappa), 0, size, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        self.matrix = basis @ torch.diag(spectrum) @ basis.T
        self.solution = torch.randn(size, generator=generator, dtype=torch.float64)
        self.x = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.noise = torch.Generator().manual_seed(100 + seed)

    def gradient(self) -> torch.Tensor:
        return self.matrix @ (self.x.detach() - self.solution)

    def loss(self) -> float:
        error = self.x.detach() - self.solution
        return 0.5 * float(error @ self.matrix @ error)

    def noisy_gradient(self, sigma: float) -> torch.Tensor:
        return self.gradient() + sigma * torch.randn(self.x.shape, generator=self.noise, dtype=torch.float64)


def make_sgd(problem: Quadratic, sgd: dict[str, float], acceleration: dict[str, Any] | None) -> torch.optim.Optimizer:
    """SGD on the problem, accelerated unless `acceleration` is None."""
    optimizer = torch.optim.SGD([problem.x], **sgd)  # type: ignore[arg-type]
    return optimizer if acceleration is None else aadl.accelerate(optimizer, **acceleration)


def iterations(kappa: float, seed: int, sgd: dict[str, float], acceleration: dict[str, Any] | None) -> float:
    """Steps until the gradient is 1e-6 of its start; inf after MANY."""
    problem = Quadratic(kappa, seed)
    optimizer = make_sgd(problem, sgd, acceleration)
    goal = 1e-6 * float(problem.gradient().norm())
    for step in range(1, MANY + 1):
        problem.x.grad = problem.gradient()
        optimizer.step()
        if float(problem.gradient().norm()) <= goal:
            return step
    return math.inf


def noisy_losses(
    sigma: float, seed: int, sgd: dict[str, float], acceleration: dict[str, Any] | None, steps: int = 3000
) -> tuple[float, float, float]:
    """Loss at 200 steps, at 600 steps, and its mean over the last fifth of the steps (the floor)."""
    problem = Quadratic(1e3, seed)
    optimizer = make_sgd(problem, sgd, acceleration)
    losses = []
    for _ in range(steps):
        problem.x.grad = problem.noisy_gradient(sigma)
        optimizer.step()
        losses.append(problem.loss())
    tail = losses[-steps // 5 :]
    return losses[199], losses[599], sum(tail) / len(tail)


@contextmanager
def without_backward_check() -> Iterator[None]:
    """The library as it would be without rejecting candidates that point back."""
    original = History.combine

    def combine(history: History, *arguments: Any) -> torch.Tensor | None:
        advance = original(history, *arguments)
        return None if advance is None else torch.ones_like(advance)

    with patch.object(History, "combine", combine):
        yield


def over_seeds(measure: Callable[[int], float]) -> str:
    """Median over the seeds as text."""
    value = median(measure(seed) for seed in SEEDS)
    return "never" if math.isinf(value) else f"{value:.0f}"


def gradient_descent_table() -> None:
    """How often to accelerate, without and with the safeguard."""
    sgd, periods, rows = {"lr": 1.0}, (1, 2, 3, 5, 10), []
    for kappa in (1e3, 1e4):
        for name, safeguard in (("none", False), ("residual", "residual")):
            settings = {
                "history_depth": 5,
                "store_each_nth": 1,
                "average": False,
                "safeguard": safeguard,
                "reg_acc": 0.0,
            }
            counts = [
                over_seeds(lambda s, k=kappa, q=q, a=settings: iterations(k, s, sgd, a | {"frequency": q}))  # type: ignore[misc]
                for q in periods
            ]
            rows.append([f"{kappa:.0e}", name, *counts, over_seeds(lambda s, k=kappa: iterations(k, s, sgd, None))])  # type: ignore[misc]
    header = ["kappa", "safeguard", *(f"every {q}" for q in periods), "plain"]
    print(f"\nGradient descent, depth 5, steps to 1e-6 of the first residual\n\n{markdown(header, rows)}")


def heavy_ball_table() -> None:
    """What to do with momentum."""
    sgd, periods, rows = {"lr": 1.0, "momentum": 0.9}, (1, 2, 5, 10), []
    plain = over_seeds(lambda s: iterations(1e3, s, sgd, None))
    for coupling in ("params", "combine", "full"):
        for nth in (1, 5, 10):
            settings = {
                "history_depth": 5, "store_each_nth": nth, "average": False, "safeguard": False, "reg_acc": 0.0,
                "state_coupling": coupling,
            }  # fmt: skip
            counts = [
                over_seeds(lambda s, n=nth, q=q, a=settings: iterations(1e3, s, sgd, a | {"frequency": n * q}))  # type: ignore[misc]
                for q in periods
            ]
            guarded = settings | {"safeguard": "residual", "frequency": 2 * nth}
            rows.append([coupling, str(nth), *counts, over_seeds(lambda s, a=guarded: iterations(1e3, s, sgd, a))])  # type: ignore[misc]
    header = ["state_coupling", "store_each_nth", *(f"every {q}" for q in periods), "every 2, safeguard"]
    print(f"\nHeavy ball 0.9, kappa 1e3, depth 5, no safeguard (plain: {plain} steps)\n\n{markdown(header, rows)}")


def noise_table() -> None:
    """What noise does, and what the check of direction is for."""
    rows = []
    for sigma in (1e-3, 3e-3, 1e-2, 3e-2):
        for text, sgd in (("lr 0.2", {"lr": 0.2}), ("lr 0.02, momentum 0.9", {"lr": 0.02, "momentum": 0.9})):
            for name, acceleration, context in (
                ("plain", None, nullcontext()),
                ("defaults", {}, nullcontext()),
                ("without the check", {"average": False}, without_backward_check()),
                ("without any safeguard", {"average": False, "safeguard": False}, nullcontext()),
            ):
                with context:
                    runs = [noisy_losses(sigma, seed, sgd, acceleration) for seed in SEEDS]
                values = [f"{median(column):.1e}" for column in zip(*runs, strict=True)]
                rows.append([f"{sigma:g}", text, name, *values])
    header = ["sigma", "SGD", "variant", "loss at 200", "loss at 600", "floor"]
    print(f"\nNoisy gradients, kappa 1e3: loss on the way and at the end\n\n{markdown(header, rows)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    gradient_descent_table()
    heavy_ball_table()
    noise_table()
