"""Learning rates that change at every step: what acceleration keeps of its gain, on the graduate-admissions MLP.

For each schedule, number of steps and batch size, over the seeds (median [minimum .. maximum]):

    reached   fraction of the steps after which the accelerated run has plain's final training loss
    loss      final training loss over plain's
    way       largest training loss on the way over the largest one that plain has from there on

    python -m benchmarks.schedules --seeds 5
    python -m benchmarks.schedules --seeds 5 --steps 200 --schedules warm-up --rate 2e-2 --safeguard residual
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import accumulate, product

import torch

from benchmarks.small_training import PROBLEMS, SCHEDULES, Run, train
from benchmarks.tables import head, line, with_range


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
    parser.add_argument("--safeguard", default=True, choices=["residual"], help="judge by residuals, not by the loss")
    arguments = parser.parse_args()
    settings = {"store_each_nth": arguments.store_each_nth, "frequency": arguments.frequency}
    settings["safeguard"] = arguments.safeguard
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    torch.set_num_threads(1)
    print(f"SGD, Nesterov 0.9, learning rate {arguments.rate:g}, seeds {seeds[0]} to {seeds[-1]}, {settings}\n")
    print(head(["schedule", "steps", "batch", "reached", "loss", "way"]))
    for batch, steps, schedule in product(arguments.batches, arguments.steps, arguments.schedules):
        problem = replace(PROBLEMS["admissions"], steps=steps)

        def run(seed: int, accelerated: bool) -> Run:
            some = settings if accelerated else None
            return train(problem, batch, schedule, arguments.rate, seed, some, 1, torch.default_generator)  # noqa: B023

        fractions, ratios, ways = [], [], []
        for seed in seeds:
            plain, fast = run(seed, False), run(seed, True)
            fractions.append(fast.reached(plain.losses[-1])[0] / steps)
            ratios.append(fast.losses[-1] / plain.losses[-1])
            highest = list(accumulate(reversed(plain.losses), max))[::-1]
            ways.append(max(loss / other for loss, other in zip(fast.losses, highest, strict=False)))
        columns = map(with_range, (fractions, ratios, ways))
        print(line([schedule, str(steps), str(batch), *columns]), flush=True)


if __name__ == "__main__":
    main()
