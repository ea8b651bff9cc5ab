"""Learning rates by study: `python -m experiments.records.tuned_rates RESULTS > docs/tables/tuned_rates.csv`.

A rate is tuned when the median of the final training loss is larger at both neighbors on the grid. Where the smallest
median is at an end of the grid, nothing is tuned: the row says "end".
"""

from __future__ import annotations

import contextlib
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments.records.hdf5 import IncompleteRecord
from experiments.records.reading import Run, read_run

LOSS = "metrics/train/loss"
VALUES: dict[str, tuple[str, Callable[[np.ndarray], float]]] = {
    "graduate_admissions": ("metrics/validation/loss", np.nanmin),
    "burgers_2d": ("metrics/validation/relative_l2_grid", lambda values: values[-1]),
}
"""By experiment, the series that says how good a rate is, and its value."""
HEADER = ("experiment", "variant", "optimizer", "lr", "seeds", "loss", "lowest", "highest", "validation", "tuned")


def rows(runs: Iterable[Run]) -> Iterator[tuple[str, ...]]:
    """A row for each experiment, variant and rate: median, lowest and highest training loss at the end, over the seeds.

    The validation is a median too: of the smallest loss on the validation set (graduate admissions), or of the relative
    L2 error at the end (2d Burgers).
    """
    grids: dict[tuple[str, str, str], dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        optimizer = run.config["variant"]["optimizer"]
        key = run.config["experiment"], run.config["variant_name"], optimizer["name"]
        grids[key][float(optimizer["arguments"]["lr"])].append(run)
    for key, grid in sorted(grids.items()):
        rates = sorted(grid)
        losses = {rate: np.array([_finite(run.series[LOSS][-1]) for run in grid[rate]]) for rate in rates}
        best = min(rates, key=lambda rate: float(np.median(losses[rate])))
        for rate in rates:
            values = np.array([_validation(run) for run in grid[rate]])
            numbers = [np.median(losses[rate]), losses[rate].min(), losses[rate].max(), np.median(values)]
            tuned = "" if rate != best else "end" if best in (rates[0], rates[-1]) else "yes"
            yield (*key, f"{rate:g}", str(len(values)), *(f"{number:.3e}" for number in numbers), tuned)


def _validation(run: Run) -> float:
    name, value = VALUES[run.config["experiment"]]
    return _finite(value(run.series[name]))


def _finite(value: float) -> float:
    return float(value) if np.isfinite(value) else float("inf")


def main() -> None:
    """Writes the table of all finished runs of studies of learning rates whose scale is `rates`."""
    paths = sorted(path for name in VALUES for path in Path(sys.argv[1]).glob(f"{name}/rates/*--lr-*/*.h5"))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows(_finished(paths)))


def _finished(paths: Iterable[Path]) -> Iterator[Run]:
    for path in paths:
        with contextlib.suppress(IncompleteRecord):
            yield read_run(path)


if __name__ == "__main__":
    main()
