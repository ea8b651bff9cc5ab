"""What an attached accelerator adds to a backward pass, whose loss it looks at: `python -m benchmarks.backward_pass`.

Prints a table: microseconds of a pass through parameters of four elements each, and what the accelerator adds, as
median [least .. largest] over blocks of plain and of accelerated passes in turn (about half a minute on one core).
"""

from __future__ import annotations

import time
from statistics import median

import torch

import aadl
from benchmarks.tables import markdown, with_range

BLOCKS, PASSES = 9, 1000


def timed_passes(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Microseconds of a backward pass, median."""
    times = []
    for _ in range(PASSES):
        optimizer.zero_grad()
        loss = torch.stack([p.sum() for p in parameters]).sum()
        begin = time.perf_counter()
        loss.backward()
        times.append(time.perf_counter() - begin)
    return 1e6 * median(times)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for tensors in (20, 161):
        parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(tensors)]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        plain, added = [], []
        for _ in range(BLOCKS):
            plain.append(timed_passes(parameters, optimizer))
            aadl.accelerate(optimizer)
            optimizer.step()  # nobody looks before the first one
            added.append(timed_passes(parameters, optimizer) - plain[-1])
            aadl.remove_acceleration(optimizer)
        rows.append([str(tensors), with_range(plain), with_range(added)])
    print(markdown(["tensors", "plain", "added"], rows))


if __name__ == "__main__":
    main()
