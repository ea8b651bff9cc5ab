"""Accelerated against plain training through wrappers of optimizers: `python -m benchmarks.wrapped`.

A tanh network 8-32-32-1 on 256 noisy points, SGD at 0.01 with momentum 0.9 inside, default settings of aadl; the final
loss over that of the same run without acceleration, median over seeds [minimum .. maximum], full batch; batch 32.
Needs the package pytorch_optimizer (tests/frameworks/requirements-optimizers.txt).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import aadl
from benchmarks.small_training import mlp
from benchmarks.tables import line, with_range

ROWS = 256


def plain(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def sam(parameters: Any) -> Any:
    from pytorch_optimizer import SAM

    return SAM(parameters, torch.optim.SGD, lr=0.01, momentum=0.9)


def lookahead(k: int) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        from pytorch_optimizer import Lookahead

        return Lookahead(plain(parameters), k=k)

    return make


WRAPPERS = {"none": plain, "SAM": sam, "Lookahead, k = 5": lookahead(5), "Lookahead, k = 6": lookahead(6)}


def final_loss(make: Callable[[Any], Any], seed: int, batch: int, steps: int, accelerated: bool) -> float:
    """On all points after the last step."""
    torch.manual_seed(seed)
    inputs = torch.randn(ROWS, 8)
    targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.1 * torch.randn(ROWS, 1)
    model = mlp(8, 32, 32, 1, activation=nn.Tanh)
    optimizer = make(model.parameters())
    if accelerated:
        aadl.accelerate(optimizer)

    def loss(rows: Tensor | slice) -> Tensor:
        return nn.functional.mse_loss(model(inputs[rows]), targets[rows])

    for step in range(steps):
        if step % (ROWS // batch) == 0:
            order = torch.randperm(ROWS).view(-1, batch)
        rows = slice(None) if batch == ROWS else order[step % (ROWS // batch)]

        def closure(rows: Tensor | slice = rows) -> Tensor:
            optimizer.zero_grad()
            value = loss(rows)
            value.backward()
            return value

        closure()
        optimizer.step(*[closure] if make is sam else [])
    return float(loss(slice(None)).detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, make in WRAPPERS.items():
        cells = []
        for batch in (ROWS, 32):
            ratios = []
            for seed in range(arguments.seeds):
                runs = [final_loss(make, seed, batch, arguments.steps, accelerated) for accelerated in (True, False)]
                ratios.append(runs[0] / runs[1])
            cells.append(with_range(ratios))
        print(line([name, "; ".join(cells)]), flush=True)


if __name__ == "__main__":
    main()
