"""DeepXDE's Burgers example, plain and accelerated by residuals: `python -m benchmarks.deepxde_burgers`.

The problem, points and network are those of the example in DeepXDE's documentation (2540 points inside, 80 on the
boundary, 160 at the start, FNN 2-20x3-1, Adam 1e-3), with `--iterations` steps and a rate that falls along a cosine.
DeepXDE draws the points once. It needs `pip install deepxde` and runs with its PyTorch backend.

Prints, for each seed, the final loss, the squared residual of the equation on 20,000 fresh points, and the relative L2
error against the exact solution on the 256 x 100 grid of the example's data; then medians of the ratios to plain.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import aadl
from benchmarks.tables import head, line
from experiments.pinn.burgers import cole_hopf

os.environ.setdefault("DDE_BACKEND", "pytorch")  # read when deepxde is imported
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "defaults": {},
    "strong": {"frequency": 2, "momentum": "zero", "reg_acc": 1e-4},
}
NU = 0.01 / math.pi


def observed_squares(optimizer_of: Callable[[], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The adapter: the mean of squares as DeepXDE's loss function, which hands its residuals over on the way."""

    def loss(target: Tensor, prediction: Tensor) -> Tensor:
        residuals = (prediction - target) / math.sqrt(target.numel())
        optimizer = optimizer_of()
        if optimizer is not None:
            aadl.accelerator_of(optimizer).observe(residuals)
        return residuals.square().sum()

    return loss


def train(dde: Any, settings: dict[str, Any] | None, seed: int, iterations: int) -> dict[str, float]:
    """One run: final loss, loss on fresh points, error, seconds."""
    dde.config.set_random_seed(seed)
    domain = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99))

    def equation(x: Tensor, u: Tensor) -> Tensor:
        u_x, u_t = dde.grad.jacobian(u, x, i=0, j=0), dde.grad.jacobian(u, x, i=0, j=1)
        result: Tensor = u_t + u * u_x - NU * dde.grad.hessian(u, x, i=0, j=0)
        return result

    walls = dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_boundary: on_boundary)
    start = dde.icbc.IC(domain, lambda x: -np.sin(np.pi * x[:, :1]), lambda _, on_initial: on_initial)
    data = dde.data.TimePDE(domain, equation, [walls, start], num_domain=2540, num_boundary=80, num_initial=160)
    model = dde.Model(data, dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal"))
    accelerated: list[Any] = []
    loss = observed_squares(lambda: accelerated[0] if accelerated else None)
    model.compile("adam", lr=1e-3, loss=loss, verbose=0, decay=("cosine", iterations, 0))
    if settings is not None:
        accelerated.append(aadl.accelerate(model.opt, "nonlinear_gmres", **settings))
    begin = time.perf_counter()
    model.train(iterations=iterations, display_every=iterations, verbose=0)
    seconds = time.perf_counter() - begin
    final = float(np.sum(model.losshistory.loss_train[-1]))
    fresh = model.predict(domain.random_points(20_000), operator=equation)
    return {"loss": final, "fresh": float(np.mean(fresh**2)), "error": error_of(model.predict), "seconds": seconds}


def error_of(predict: Callable[[np.ndarray], np.ndarray]) -> float:
    """Relative L2 error of u(points), points (N, 2) of x and t, on the grid of DeepXDE's example."""
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 256), np.linspace(0, 0.99, 100)), -1).reshape(-1, 2)
    truth = cole_hopf(torch.from_numpy(grid), NU).numpy()
    return float(np.linalg.norm(predict(grid) - truth) / np.linalg.norm(truth))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="DeepXDE's Burgers example, plain and accelerated by the residuals.")
    parser.add_argument("--seeds", default="5-14", help="first-last (default 5-14)")
    parser.add_argument("--iterations", type=int, default=10_000)
    options = parser.parse_args(arguments)
    try:
        dde = importlib.import_module("deepxde")
    except ImportError:
        raise SystemExit("error: this benchmark needs DeepXDE: pip install deepxde") from None
    torch.set_num_threads(1)
    first, _, last = options.seeds.partition("-")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    print(head(["seed", "variant", "final loss", "equation on fresh points", "relative L2", "seconds"]))
    for seed in range(int(first), int(last or first) + 1):
        for name, settings in VARIANTS.items():
            run = train(dde, settings, seed, options.iterations)
            runs[name].append(run)
            print(line([str(seed), name, *(f"{value:.3g}" for value in run.values())]), flush=True)
    print("\n" + head(["against plain, median", "loss", "fresh", "relative L2", "seconds"]))
    for name in list(VARIANTS)[1:]:
        pairs = list(zip(runs[name], runs["plain"], strict=True))
        print(line([name, *(f"{median(run[key] / plain[key] for run, plain in pairs):.3g}" for key in pairs[0][0])]))


if __name__ == "__main__":
    main()
