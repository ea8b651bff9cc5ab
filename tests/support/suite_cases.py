"""Small configurations and results for the tests of the suite."""

import importlib.util

import numpy as np
import pytest
import torch

from data_loaders.graduate_admissions import surrogate
from experiments.admissions.experiment import EXPERIMENT as ADMISSIONS
from experiments.admissions.settings import GraduateAdmissionsConfig, TrainingConfig
from experiments.catalog import load_config, parse_config
from experiments.runs.config import expand_runs
from experiments.settings.kinds import Component
from experiments.settings.run_config import PublishedConfig, RunConfig, VariantConfig
from experiments.training.epochs import Epochs
from experiments.training.problem import Problem
from experiments.training.result import Result

SGD = Component("SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True})
TUNED = Component("SGD", {**SGD.arguments, "lr": 1e-2})

RAW = {
    "experiment": "graduate_admissions",
    "scale": "test",
    "seeds": [0, 1],
    "problem": {"hidden_sizes": [8]},
    "training": {"epochs": 4, "batch_size": 80},
    "variants": {
        "sgd": {"label": "plain SGD", "optimizer": {"name": "SGD", "lr": 1e-3, "momentum": 0.9}},
        "sgd_aadl": {"optimizer": {"name": "SGD", "lr": 1e-3, "momentum": 0.9}, "acceleration": {}},
    },
}

PINN = {
    "experiment": "burgers_2d",
    "scale": "test",
    "seeds": [0, 1],
    "problem": {"equation": "burgers_2d", "hidden_sizes": [6, 6], "num_points": 32, "num_conditions": 8},
    "training": {"iterations": 12, "evaluate_every": 4},
    "variants": {
        "adam": {"label": "plain Adam", "optimizer": {"name": "Adam", "lr": 1e-2}},
        "adam_aadl": {"optimizer": {"name": "Adam", "lr": 1e-2}, "acceleration": {"store_each_nth": 1, "frequency": 2}},
    },
}

SSBROYDEN = {"name": "SSBroyden", "max_iter": 4}
SOAP = {"name": "SOAP", "lr": 1e-2, "betas": [0.99, 0.999], "weight_decay": 0.0, "precondition_frequency": 2}
FREE_ADAM = {"name": "AdamWScheduleFree", "lr": 1e-2}
FREE_SGD = {"name": "SGDScheduleFree", "lr": 1e-1}


def needs(package):
    """Leaves a test out where a package is missing, as one that the suite does not need may be."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} is not installed")


def load_or_skip(path):
    """A configuration; the test is skipped where the configuration needs a package that is not installed."""
    try:
        return load_config(path)
    except ValueError as error:
        if "which is not installed" not in str(error):
            raise
        pytest.skip(str(error))


VARIANTS = {
    "sgd": VariantConfig(label="plain", optimizer=SGD),
    "sgd_ema": VariantConfig(label="EMA", optimizer=SGD, ema_decay=0.99),
    "sgd_aadl": VariantConfig(label="aadl", optimizer=SGD, acceleration={}),
    "sgd_published": VariantConfig(label="published", optimizer=SGD, published=PublishedConfig()),
}

TUNED_VARIANTS = {
    "tuned_sgd": VariantConfig(label="plain", optimizer=TUNED),
    "tuned_sgd_aadl": VariantConfig(label="aadl", optimizer=TUNED, acceleration={}),
}


def run_config(name="sgd", seed=0, study="", **training):
    return RunConfig(
        experiment="graduate_admissions",
        scale="test",
        name=name,
        variant_name=name,
        study=study,
        seed=seed,
        kind=ADMISSIONS,
        problem=GraduateAdmissionsConfig(hidden_sizes=(8,)),
        training=TrainingConfig(**{"epochs": 10, "batch_size": 80, **training}),
        variant=(VARIANTS | TUNED_VARIANTS)[name.partition("--")[0]],
    )


def pinn_run(variant=None, training=None, **problem):
    """A run of a small 2d Burgers network; `variant` is its raw mapping, the other arguments are changed settings."""
    raw = PINN | {"seeds": [0], "variants": {"one": variant or {"optimizer": {"name": "Adam", "lr": 1e-2}}}}
    raw |= {"problem": PINN["problem"] | problem, "training": PINN["training"] | (training or {})}
    (run,) = expand_runs(parse_config(raw))
    return run


def build(config, ranks):
    """The problem of a run."""
    return config.kind.build(config, ranks)


class Nothing(Problem):
    """A problem that records are written of, and nobody trains."""

    def plan(self):
        return Epochs(lambda *_: [], 1)

    def loss(self, network, batch):
        raise NotImplementedError

    def evaluate(self, network):
        return {}


def problem(source="csv", digest="abc", attributes=None):
    return Nothing(torch.nn.Linear(1, 1), data_source=source, data_digest=digest, attributes=attributes)


def result(train_losses, seconds_per_epoch=1.0, diverged_epoch=None, **series):
    """A result with the given training losses, and validation losses of twice their size."""
    losses = np.asarray(train_losses, dtype=float)
    seconds = seconds_per_epoch * np.arange(len(losses))
    fixed = {
        "metrics/train/loss": losses,
        "metrics/validation/loss": 2 * losses,
        "timing/training_seconds": seconds,
        "timing/training_cpu_seconds": seconds,
    }
    more = {name.replace("__", "/"): np.asarray(values, dtype=float) for name, values in series.items()}
    return Result(fixed | more, diverged_epoch, 4 * (len(losses) - 1))


TABLE_HEADER = (
    "Serial No.,GRE Score,TOEFL Score,University Rating,SOP,LOR ,CGPA,Research,Chance of Admit "  # as published
)


def table_lines(rows, seed=0):
    """The lines of a CSV file of graduate admissions, with the surrogate's values."""
    data = surrogate(rows, seed)
    values = np.column_stack([data.features, data.target])
    return [TABLE_HEADER, *(",".join([str(i), *(f"{v:g}" for v in row)]) for i, row in enumerate(values, start=1))]
