"""Every kind of experiment, small, for the tests of launchers: several ranks against one process."""

import re

import numpy as np
import torch
import yaml
from image_runs import image_set, raw_config
from suite_cases import PINN, RAW

from experiments import __main__ as suite
from experiments.records.reading import read_run, read_weights

EXPERIMENTS = ("graduate_admissions", "burgers_2d", "imagenet")

# Sums over ranks are taken in another order than over a whole batch, and training carries the rounding on.
TOLERANCE = 1e-4


def write_config(experiment, folder):
    """Writes a configuration with one seed, whose records hold the weights; returns its path.

    It asks for the CPU, because the clusters of the tests give every job GPUs that are none.
    """
    raw = {
        "graduate_admissions": lambda: RAW,
        "burgers_2d": lambda: PINN | {"problem": PINN["problem"] | {"dtype": "float64"}},
        "imagenet": lambda: raw_config(image_set(folder / "images")),
    }[experiment]()
    path = folder / f"{experiment}.yaml"
    path.write_text(yaml.safe_dump(raw | {"seeds": 0, "save": {"weights": True}, "launch": {"device": "cpu"}}))
    return path


def run_plainly(config, results, *more):
    """The command of the suite in one process, without a launcher."""
    assert suite.main(["run", str(config), "--results", str(results), "--jobs", "1", *more]) == 0


def check_against_one_process(results, plain, *, launcher, world_size):
    """The records of `results`, of these ranks, have the numbers and the weights of those of `plain`, of one process.

    Images are another matter, for BatchNorm normalizes over those of a rank: what is counted must be the same.
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
        assert all(np.isfinite(ours.series[name]).all() for name in losses)
        ours_all, one_all = (read_weights(folder / place) for folder in (results, plain))
        assert ours_all.keys() == one_all.keys() and all(value.isfinite().all() for value in ours_all.values())
        if one.config["experiment"] == "imagenet":
            counted = "metrics/validation/num_images"
            assert np.array_equal(ours.series[counted], one.series[counted])
            continue
        for name in (name for name in ours.series if name.startswith("metrics/")):
            np.testing.assert_allclose(ours.series[name], one.series[name], rtol=TOLERANCE, err_msg=name)
        for name, value in one_all.items():
            torch.testing.assert_close(ours_all[name], value, rtol=TOLERANCE, atol=TOLERANCE)
