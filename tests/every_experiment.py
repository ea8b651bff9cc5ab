"""Every kind of experiment, small, for the tests of launchers: several ranks against one process."""

import re

import numpy as np
import yaml
from image_runs import image_set, raw_config
from suite_cases import PINN, RAW

from experiments import __main__ as suite
from experiments.record import read_run

EXPERIMENTS = ("graduate_admissions", "burgers_2d", "imagenet")

# Sums over ranks are taken in another order than over a whole batch, and training carries the rounding on.
TOLERANCE = 1e-4


def write_config(experiment, folder):
    """Writes a configuration with one seed; returns its path."""
    raw = {
        "graduate_admissions": lambda: RAW,
        "burgers_2d": lambda: PINN | {"problem": PINN["problem"] | {"dtype": "float64"}},
        "imagenet": lambda: raw_config(image_set(folder / "images")),
    }[experiment]()
    path = folder / f"{experiment}.yaml"
    path.write_text(yaml.safe_dump(raw | {"seeds": 0}))
    return path


def run_plainly(config, results, *more):
    """The command of the suite in one process, without a launcher."""
    assert suite.main(["run", str(config), "--results", str(results), "--jobs", "1", *more]) == 0


def check_against_one_process(results, plain, *, launcher, world_size):
    """The records of `results`, of these ranks, have the numbers of those of `plain`, of one process.

    Not so with BatchNorm, which normalizes over the images of a rank: there only the series have the same lengths.
    """
    places = sorted(path.relative_to(plain) for path in plain.rglob("*.h5"))
    assert places and places == sorted(path.relative_to(results) for path in results.rglob("*.h5"))
    for place in places:
        ours, one = read_run(results / place), read_run(plain / place)
        assert (ours.attributes["launcher"], ours.attributes["world_size"]) == (launcher, world_size)
        assert one.attributes["world_size"] == 1 and ours.attributes["num_steps"] == one.attributes["num_steps"]
        assert ours.series.keys() == one.series.keys()
        losses = [name for name in ours.series if re.fullmatch(r"metrics/(train|validation)/loss", name)]
        assert losses and all(ours.series[name][0] != ours.series[name][-1] for name in losses)
        for name in (name for name in ours.series if name.startswith("metrics/")):
            assert np.array_equal(np.isfinite(ours.series[name]), np.isfinite(one.series[name])), name
            if "num_validation_images" not in one.attributes:
                np.testing.assert_allclose(ours.series[name], one.series[name], rtol=TOLERANCE, err_msg=name)
