"""What nonlinear GMRES costs: `python -m benchmarks.residual_step` (`--quick`: seconds), on one CPU thread.

First table: the passes over memory for n weights and M residuals, and their ratio to the least time in which this
machine, measured between the cases, moves the bytes they cannot avoid. With m columns, float32:

    store        16 n + 16 M bytes          read x, r and the newest pair; write one row of differences and the new pair
    candidate    4 (m + 2) n                read DX and x_k, write the weights
    products     4 (m + 1) M                read DR and r_k

A store is held against the bandwidth of a copy, the others against that of reading. Products of s fresh columns are
2 (s + 1) (m + 1) M operations in float64 beside, which is what they take where s is large.

Second table: seconds of a training step of the graduate-admissions network and of the 2d Burgers network (hidden layers
20x8, 4096 points), plain and with acceleration by `observe`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

import aadl
from aadl.residual_history import ResidualHistory
from benchmarks.machine import BandwidthMeter, time_call
from benchmarks.small_training import mlp
from benchmarks.tables import head, line, origin

DEPTH = 20
FRESH = 11
"""Columns stored between two accelerations at the default period of 10, the one of the evaluation included."""
CASES = ((1_000, 1_000), (1_000, 1_000_000), (1_000_000, 1_000), (1_000_000, 1_000_000), (25_557_032, 100_000))
ROUNDS = 5
SETTINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "period 10": {"frequency": 10},
    "period 2, momentum zeroed": {"frequency": 2, "momentum": "zero"},
    "period 1, momentum zeroed": {"frequency": 1, "momentum": "zero"},
}
Problem = tuple[nn.Module, Callable[[nn.Module], torch.Tensor], float]


def passes(weights: int, residuals: int) -> dict[str, float]:
    """Seconds of each pass, medians over rounds, on a full history."""
    parameters = [torch.randn(weights, requires_grad=True)]
    optimizer = aadl.accelerate(torch.optim.SGD(parameters), "nonlinear_gmres", history_depth=DEPTH)
    settings = aadl.accelerator_of(optimizer).settings
    history = ResidualHistory(parameters, settings, aadl.ranks.Ranks())
    r = torch.randn(residuals)
    for _ in range(DEPTH + 1):
        _store(history, parameters, r)
    history.products()
    times: dict[str, list[float]] = {"store": [], "products": [], "candidate": []}
    coefficients = torch.full((DEPTH,), 1e-3, dtype=torch.float64)
    for _ in range(ROUNDS):
        for _ in range(FRESH):
            parameters[0].data.mul_(0.999)
            times["store"].append(time_call(lambda: _store(history, parameters, r)))
        times["products"].append(time_call(history.products))
        times["candidate"].append(time_call(lambda: history.place(range(DEPTH), coefficients)))
        history.put_back()
    return {name: median(values) for name, values in times.items()}


@torch.no_grad()
def _store(history: ResidualHistory, parameters: list[torch.Tensor], r: torch.Tensor) -> None:
    history.push_weights()
    history.push_residuals(r)


def floors(weights: int, residuals: int, meter: BandwidthMeter) -> dict[str, float]:
    """Least seconds of each pass."""
    speed = meter.median()
    return {
        "store": 16 * (weights + residuals) / speed.copy,
        "products": 4 * (DEPTH + 1) * residuals / speed.read,
        "candidate": 4 * (DEPTH + 2) * weights / speed.read,
    }


# ---- training steps ------------------------------------------------------------------------------------------------


def admissions() -> Problem:
    """Network, residuals on 320 rows, learning rate."""
    torch.manual_seed(0)
    inputs, target = torch.randn(320, 7), torch.rand(320, 1)
    return mlp(7, 64, 64, 64, 1), lambda model: model(inputs) - target, 1e-2


def burgers() -> Problem:
    """Network, residuals of u_t + u u_x - nu u_xx on 4096 points by automatic differentiation, learning rate."""
    torch.manual_seed(0)
    points = torch.rand(4096, 2).requires_grad_()

    def residuals(model: nn.Module) -> torch.Tensor:
        u = model(points)
        first = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)[0]
        return first[:, 1:] + u * first[:, :1] - 0.01 / torch.pi * second[:, :1]

    return mlp(2, *[20] * 8, 1, activation=nn.Tanh), residuals, 1e-3


def training(make: Callable[[], Problem], steps: int) -> dict[str, float]:
    """Seconds of a step by setting, medians over rounds in which all settings take turns."""
    runs = {name: _stepper(*make(), settings) for name, settings in SETTINGS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, step in runs.items():
            times[name].append(time_call(lambda step=step: [step() for _ in range(steps)]) / steps)  # type: ignore[misc]
    return {name: median(values[1:]) for name, values in times.items()}


def _stepper(
    model: nn.Module, residuals: Callable[[nn.Module], torch.Tensor], rate: float, settings: dict[str, Any] | None
) -> Callable[[], object]:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    accelerator = None
    if settings is not None:
        accelerator = aadl.accelerator_of(aadl.accelerate(optimizer, "nonlinear_gmres", **settings))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        r = residuals(model)
        if accelerator is not None:
            accelerator.observe(r)
        loss = r.square().mean()
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small cases only")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    meter = BandwidthMeter()
    print(f"{origin('python -m benchmarks.residual_step')} Depth {DEPTH}, {FRESH} fresh columns.\n")
    print(head(["weights", "residuals", "store ms", "/ floor", "products ms", "/ floor", "candidate ms", "/ floor"]))
    for weights, residuals in CASES[: 1 if quick else None]:
        meter.sample()
        seconds = passes(weights, residuals)
        meter.sample()
        least = floors(weights, residuals, meter)
        cells = [f"{1e3 * seconds[name]:.3g} | {seconds[name] / least[name]:.2f}" for name in seconds]
        print(line([f"{weights:,}", f"{residuals:,}", *cells]), flush=True)
    speed = meter.median()
    print(f"\ncopy {speed.copy / 1e9:.3g} GB/s, read {speed.read / 1e9:.3g} GB/s (medians)\n")
    print(head(["training step", "plain ms", *list(SETTINGS)[1:]]))
    for name, make, steps in (("admissions, 320 rows", admissions, 100), ("2d Burgers, 4096 points", burgers, 10)):
        times = training(make, max(10, steps // 10) if quick else steps)
        plain = times.pop("plain")
        print(line([name, f"{1e3 * plain:.3g}", *(f"{100 * (t / plain - 1):+.0f} %" for t in times.values())]))


if __name__ == "__main__":
    main()
