"""Where acceleration pays: steps to plain SGD's final training loss against batch size, learning rate and schedule.

    python -m benchmarks.where_it_pays          # writes docs/tables/where_it_pays.csv and draws it
    python -m benchmarks.where_it_pays --draw   # draws docs/figures/where_it_pays.png from the table that is there

Three problems under SGD with Nesterov momentum 0.9: the graduate-admissions MLP, an MLP on the digits of scikit-learn,
and a small convolutional network on fractals. For each problem, batch size and schedule the best plain learning rate is
the one of the grid 1, 3, 10, .. whose two neighbors end at a higher training loss (median of the seeds 0-2). At this
rate, a third and a tenth of it, `aadl.accelerate` runs on the seeds 5-9 with its defaults and with the setting for full
batches. The target is plain's mean training loss over the last twentieth of its steps, plus 2 %, since a schedule that
decays ends on a plateau. The ratio is the number of steps after which the accelerated run first has it over the same
number of the plain run. The validation ratio compares the validation losses of the two runs at these steps. BatchNorm
normalizes by the set that is evaluated.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.small_training import PROBLEMS, Problem, Run, train

TABLE = ROOT / "docs" / "tables" / "where_it_pays.csv"
FIGURE = ROOT / "docs" / "figures" / "where_it_pays.png"
CHOOSING, REPORTED = range(3), range(5, 10)
BATCHES = (40, 80, 160, 0)
"""0 is the whole training set."""
NAMES = ("constant", "cosine", "linear")
SETTINGS: dict[str, dict[str, Any]] = {"defaults": {}, "full batches": {"store_each_nth": 1, "frequency": 2}}
GRID_STEPS = (0, 1, 2)
"""Steps of the grid of rates below the best one."""
MARGIN = 1.02
"""Of the target over plain's final training loss."""
COLUMNS = (
    "problem", "batch", "schedule", "steps", "learning_rate", "grid_steps_below_best", "setting", "steps_ratio",
    "steps_ratio_of_seeds", "validation_ratio", "final_loss_ratio", "largest_final_loss_ratio", "plain_final_loss",
    "accepted", "attempts", "averaging_share", "closure_calls_per_step",
)  # fmt: skip


TITLES = {
    "admissions": "graduate admissions\nMLP, 320 rows, 300 steps",
    "digits": "digits\nMLP, 1,437 images, 300 steps",
    "fractals": "fractals\nCNN, 240 images, 200 steps",
}
LABELS = {"defaults": "aadl, defaults", "full batches": "aadl, store_each_nth=1,\nfrequency=2"}
HEADING = "Steps that SGD + aadl needs for plain SGD's final training loss (plain SGD = 1.00)"
NOTE = (
    "Blue: fewer steps than plain Nesterov SGD. Median of 5 seeds and 3 schedules (constant, cosine, linear). best:\n"
    "the rate at which plain SGD ends lowest, for each batch size and schedule. Dot: the moving average was on in\n"
    "most attempts. An attempt costs two forward passes: up to 0.1 a step in the upper row, 0.8 in the lower one."
)


def rate_of(index: int) -> float:
    """The grid of learning rates: .., 0.1, 0.3, 1 (index 0), 3, 10, .."""
    return (1.0, 3.0)[index % 2] * 10.0 ** (index // 2)


def best_rate(problem: Problem, batch: int, schedule: str) -> int:
    """The place on the grid of the rate whose neighbors end at a higher loss, median of the choosing seeds."""

    @cache
    def loss(index: int) -> float:
        return median(train(problem, batch, schedule, rate_of(index), seed).final for seed in CHOOSING)

    best = problem.first_rate
    while (better := min((best, best - 1, best + 1), key=loss)) != best:
        best = better
    return best


def cells(name: str) -> Iterator[dict[str, Any]]:
    """The rows of the table for one problem."""
    problem = PROBLEMS[name]
    for batch, schedule in product(BATCHES, NAMES):
        best = best_rate(problem, batch, schedule)
        for below in GRID_STEPS:
            rate = rate_of(best - below)
            plain = [train(problem, batch, schedule, rate, seed) for seed in REPORTED]
            for setting, arguments in SETTINGS.items():
                fast = [train(problem, batch, schedule, rate, seed, arguments) for seed in REPORTED]
                yield {
                    "problem": name,
                    "batch": batch or len(problem.data()[0][0]),
                    "schedule": schedule,
                    "steps": problem.steps,
                    "learning_rate": f"{rate:g}",
                    "grid_steps_below_best": below,
                    "setting": setting,
                    **compared(plain, fast, problem.steps),
                }


def compared(plain: Sequence[Run], fast: Sequence[Run], steps: int) -> dict[str, Any]:
    """The columns that compare accelerated runs with the plain ones of the same seeds."""
    targets = [MARGIN * run.final for run in plain]
    reached = [(a.reached(goal), b.reached(goal)) for a, b, goal in zip(fast, plain, targets, strict=True)]
    ratios = [ours[0] / theirs[0] for ours, theirs in reached]
    losses = [run.final / base.final for base, run in zip(plain, fast, strict=True)]
    attempts = sum(run.attempts for run in fast)
    return {
        "steps_ratio": f"{median(ratios):.3f}",
        "steps_ratio_of_seeds": " ".join(f"{ratio:.3f}" for ratio in ratios),
        "validation_ratio": f"{median(ours[1] / theirs[1] for ours, theirs in reached):.3f}",
        "final_loss_ratio": f"{median(losses):.3f}",
        "largest_final_loss_ratio": f"{max(losses):.3f}",
        "plain_final_loss": f"{median(run.final for run in plain):.3e}",
        "accepted": sum(run.accepted for run in fast),
        "attempts": attempts,
        "averaging_share": f"{sum(run.averaged for run in fast) / max(attempts, 1):.2f}",
        "closure_calls_per_step": f"{sum(run.closures for run in fast) / (steps * len(fast)):.2f}",
    }


def draw(table: Path, path: Path) -> None:
    """A panel for each setting and problem: batch size, learning rate, and the median over schedules and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    entries = read(table)
    problems = [name for name in PROBLEMS if any(entry["problem"] == name for entry in entries)]
    norm = TwoSlopeNorm(0, math.log(0.1), math.log(1.5))
    figure, grid = plt.subplots(len(SETTINGS), len(problems), figsize=(9, 5.6), layout="constrained", squeeze=False)
    for row, setting in enumerate(SETTINGS):
        for column, name in enumerate(problems):
            axis = grid[row, column]
            own = [entry for entry in entries if (entry["problem"], entry["setting"]) == (name, setting)]
            batches = sorted({int(entry["batch"]) for entry in own})
            places = [(y, x) for y in GRID_STEPS for x in range(len(batches))]
            middles = {(y, x): middle([e for e in own if is_at(e, batches[x], y)]) for y, x in places}
            shades = [[min(math.log(middles[y, x][0]), 9.0) for x in range(len(batches))] for y in GRID_STEPS]
            axis.imshow(shades, cmap="RdBu_r", norm=norm, aspect="auto")
            for (y, x), (ratio, averaged) in middles.items():
                color = "white" if ratio < 0.3 else "black"
                text = "never" if math.isinf(ratio) else f"{ratio:.2f}"
                axis.text(x, y, text, ha="center", va="center", color=color, fontsize=11)
                if averaged:
                    axis.plot(x + 0.36, y - 0.33, "o", color=color, markersize=4.5)
            axis.set_xticks(range(len(batches)), [*map(str, batches[:-1]), f"all {batches[-1]:,}"])
            axis.set_yticks(GRID_STEPS, ("best", "best / 3", "best / 10") if column == 0 else [""] * len(GRID_STEPS))
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(TITLES[name], fontsize=10)
            if row == len(SETTINGS) - 1:
                axis.set_xlabel("batch size")
        grid[row, 0].set_ylabel(f"{LABELS[setting]}\n\nlearning rate")
    figure.suptitle(HEADING, fontsize=12, fontweight="bold")
    figure.supxlabel(NOTE, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def is_at(entry: dict[str, str], batch: int, below: int) -> bool:
    """Whether a row of the table is of this batch size and this many grid steps below the best rate."""
    return (int(entry["batch"]), int(entry["grid_steps_below_best"])) == (batch, below)


def middle(entries: Sequence[dict[str, str]]) -> tuple[float, bool]:
    """Median ratio of steps over schedules and seeds, and whether the average was on in most attempts."""
    ratios = [float(text) for entry in entries for text in entry["steps_ratio_of_seeds"].split()]
    attempts = [int(entry["attempts"]) for entry in entries]
    averaged = [int(entry["attempts"]) * float(entry["averaging_share"]) for entry in entries]
    return median(ratios), sum(averaged) > sum(attempts) / 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the table, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the table that is there")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    if not options.draw:
        measure(options.problems, options.table)
    draw(options.table, options.figure)


def measure(problems: Sequence[str], table: Path) -> None:
    """Writes the table row by row, problem by problem; rows of other problems stay."""
    torch.set_num_threads(1)
    table.parent.mkdir(parents=True, exist_ok=True)
    others = [entry for entry in read(table) if entry["problem"] not in problems] if table.exists() else []
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(others)
        for name in problems:
            start = time.process_time()
            for cell in cells(name):
                writer.writerow(cell)
                file.flush()
            print(f"{name}: {time.process_time() - start:.0f} s of processor time", file=sys.stderr)


def read(table: Path) -> list[dict[str, str]]:
    """The rows of the table."""
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
