"""What a command says when its runs are done."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.records.reading import Run
from experiments.runs.closing import closing_lines
from experiments.runs.experiment import Merit


@pytest.mark.parametrize("more", [True, False])
def test_variants_stand_with_the_best_first_and_those_that_diverged_last(more):
    name, ends = "metrics/validation/top1", {"lost": np.nan, "low": 0.25, "high": 0.75}
    runs = []
    for variant, end in ends.items():
        attributes = {"experiment": "a", "study": "", "variant": variant, "seed": 0, "diverged_epoch": -1}
        attributes["diverged_epoch"] += 2 * (variant == "lost")
        path = Path("results", "a", "test", variant, "seed-0.h5")
        runs.append(Run(path, attributes, {}, {name: np.array([0.1, end])}, np.arange(2)))
    lines = closing_lines(SimpleNamespace(merit=lambda _: Merit(name, more)), runs, Path("results"))
    assert [line.split()[0] for line in lines[3:6]] == (["high", "low", "lost"] if more else ["low", "high", "lost"])
    assert lines[0] == "diverged: lost (1 seeds: seed 0)" and lines[5].endswith("diverged (1 seed)")
