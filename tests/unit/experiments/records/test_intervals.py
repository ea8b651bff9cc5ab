"""What groups of runs end with."""

from pathlib import Path

import numpy as np
import pytest

from experiments.records.intervals import intervals_of
from experiments.records.reading import Run


@pytest.mark.parametrize(("metric", "worst"), [("loss", np.inf), ("top1", -np.inf), ("top5", -np.inf)])
def test_a_diverged_run_is_the_worst_of_its_group(metric, worst):
    name, attributes = f"metrics/validation/{metric}", {"experiment": "a", "scale": "b", "variant": "c"}
    runs = [Run(Path("a.h5"), attributes, {}, {name: np.array([0.1, end])}, np.arange(2)) for end in (0.5, 0.4, np.nan)]
    (found,) = intervals_of(runs, metrics=(name,))
    assert found.num_runs == 3 and found.median == (0.5 if worst > 0 else 0.4)
    assert worst in (found.minimum, found.maximum)
