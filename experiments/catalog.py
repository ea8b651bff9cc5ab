"""The experiments of the suite, a line each. A module is imported when one of its experiments is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.records.reading import first_run_of, read_runs
from experiments.runs import config as configurations
from experiments.runs.experiment import Experiment
from experiments.settings.run_config import ExperimentConfig
from experiments.settings.suggestion import did_you_mean

EXPERIMENTS = {
    "graduate_admissions": "experiments.admissions.experiment",
    "burgers_2d": "experiments.pinn.experiment",
    "burgers_100d": "experiments.pinn.experiment",
    "imagenet": "experiments.images.experiment",
}
"""Name in a configuration -> module that has the experiment as EXPERIMENT."""
OF_USERS = "experiments.pinn.experiment"
"""Any other name is an equation of the user's, whose Python file is `problem.equation`."""


def find_experiment(name: str, problem: Mapping[str, Any]) -> Experiment:
    """The experiment of a configuration; ValueError where there is none, or its package is not installed."""
    module = EXPERIMENTS.get(name)
    if module is None and str(problem.get("equation")).endswith(".py"):
        module = OF_USERS
    if module is None:
        raise ValueError(
            f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}; any other name needs a Python file as "
            f"problem.equation{did_you_mean(name, EXPERIMENTS)}"
        )
    try:
        experiment: Experiment = import_module(module).EXPERIMENT
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "experiments":
            raise  # a mistake in the package of the experiment, whose traceback names the line
        raise ValueError(f"experiment {name} needs the package {error.name}, which is not installed") from None
    return experiment


def experiment_of(folder: Path) -> Experiment:
    """The experiment of the records in `results/<experiment>/<scale>`, by one that can be read; OSError for none."""
    run = first_run_of(folder) or read_runs(folder)[0]  # the second names what is wrong with them
    return find_experiment(run.config["experiment"], run.config["problem"])


def load_config(
    path: str | Path, overrides: Sequence[str] = (), note: configurations.Note | None = None
) -> ExperimentConfig:
    """Reads and checks the configuration of any experiment, see `experiments.runs.config.load_config`."""
    return configurations.load_config(path, find_experiment, overrides, note)


def parse_config(
    raw: Mapping[str, Any], folder: str | Path = ".", only: Sequence[str] | None = None
) -> ExperimentConfig:
    """Checks a raw configuration of any experiment, see `experiments.runs.config.parse_config`."""
    return configurations.parse_config(raw, find_experiment, folder, only)
