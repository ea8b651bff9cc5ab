"""Learning rates by study: `python -m benchmarks.tuned_rates RESULTS > docs/tables/tuned_rates.csv`.

RESULTS holds the finished runs of the `rates.yaml` of some experiments. A rate is tuned when the median of the final
training loss is larger at both neighbors on the grid. Where the smallest median is at an end of the grid, nothing is
tuned: the row says "end".
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments.catalog import find_experiment
from experiments.records.reading import Run, read_runs
from experiments.runs.closing import median_of

LOSS = "metrics/train/loss"
HEADER = (
    "experiment", "variant", "optimizer", "lr", "seeds", "final_loss", "lowest_final_loss", "highest_final_loss",
    "final_validation", "tuned",
)  # fmt: skip


def rows(runs: Iterable[Run]) -> Iterator[tuple[str, ...]]:
    """A row for each experiment, variant and rate: median, lowest and highest training loss at the end, over the seeds.

    `final_validation` is the median of the experiment's main figure of merit at the end.
    """
    grids: dict[tuple[str, str, str], dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        optimizer = run.config["variant"]["optimizer"]
        key = run.config["experiment"], run.config["variant_name"], optimizer["name"]
        grids[key][float(optimizer["arguments"]["lr"])].append(run)
    for (experiment, *names), grid in sorted(grids.items()):
        rates = sorted(grid)
        losses = {rate: np.array([_finite(run.series[LOSS][-1]) for run in grid[rate]]) for rate in rates}
        best = min(rates, key=lambda rate: float(np.median(losses[rate])))
        for rate in rates:
            first = grid[rate][0]
            merit = find_experiment(experiment, first.config["problem"]).merit(first.series)
            validation = median_of(grid[rate], merit)
            numbers = [np.median(losses[rate]), losses[rate].min(), losses[rate].max(), validation]
            tuned = "" if rate != best else "end" if best in (rates[0], rates[-1]) else "yes"
            seeds = str(len(grid[rate]))
            yield (experiment, *names, f"{rate:g}", seeds, *(f"{number:.3e}" for number in numbers), tuned)


def _finite(value: float) -> float:
    return float(value) if np.isfinite(value) else float("inf")


def main() -> None:
    """Writes the table of all finished runs whose scale is `rates` and whose study is the learning rate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuned_rates", description=__doc__.partition("\n\n")[0])
    parser.add_argument("results", type=Path, help="folder of results")
    folders = sorted(parser.parse_args().results.glob("*/rates"))
    if not folders:
        parser.error("the folder holds no results of a rates.yaml")
    runs = [run for folder in folders for run in read_runs(folder) if run.attributes["study"] == "learning_rate"]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows(runs))


if __name__ == "__main__":
    main()
