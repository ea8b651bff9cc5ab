"""Made-up records of physics-informed networks for the tests of their tables and figures."""

import copy
import json
from datetime import datetime, timezone

import numpy as np
from suite_cases import PINN, problem

from experiments.catalog import parse_config
from experiments.distributed.ranks import Ranks
from experiments.pinn.equations import load_equation
from experiments.pinn.problem import describe
from experiments.records.status import run_path
from experiments.records.writing import write_run
from experiments.runs.config import expand_runs
from experiments.training.problem import Field
from experiments.training.result import Result

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
ADAM = {"name": "Adam", "lr": 1e-2}
RAW = copy.deepcopy(PINN) | {"baseline": "adam"}
RAW["training"] = {"iterations": 100, "evaluate_every": 10}
RAW["variants"] = {
    "zadam": {"label": "first", "optimizer": ADAM},  # the order is that of the configuration, not of the alphabet
    "adam": {"label": "plain Adam", "optimizer": ADAM},
    "adam_aadl": {"label": "accelerated", "optimizer": ADAM, "acceleration": {}},
    "lbfgs": {
        "label": "L-BFGS",
        "optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"},
        "training": {"iterations": 50},
    },
    "other": {"label": "other", "optimizer": ADAM, "baseline": "other"},
}
SECOND_ORDER = {
    "optimizer": {"name": "LevenbergMarquardt"},
    "problem": {"options": {"graded": 0.5}, "dtype": "float64", "conditions": "hard", "num_conditions": 0},
}
# As in the laptop configuration: one variant has another loss than its baseline, and is the baseline of another one.
LAPTOP = {
    name: RAW["variants"][name] for name in ("adam", "adam_aadl")
} | {
    "lm": {"label": "LM", **SECOND_ORDER},
    "lm_aadl": {"label": "LM, accelerated", "baseline": "lm", "acceleration": {"frequency": 20}, **SECOND_ORDER},
}  # fmt: skip
LABEL = "2d Burgers, nu = 0.01/pi"
PREDICTORS = {"grid": {"zero": 1.0, "frozen": 0.6}, "fine": {"zero": 1.0, "frozen": 0.7}}
PLAIN = np.geomspace(1.0, 0.01, 11)


def config_of(name, seed=0, changes=None):
    raw = copy.deepcopy(RAW) | {"seeds": [seed]} | (changes or {})
    (run,) = [run for run in expand_runs(parse_config(raw)) if run.name == name]
    return run


def save(results, name, losses, seed=0, *, seconds=1.0, evaluations=1, errors=None, diverged=None, fields=None,
         equation=None, degenerate="", digest=None, predictors=None, changes=None, config=None,
         places=None, **series):  # fmt: skip
    """Writes a record with these losses, one every 10 iterations; relative errors are ten times as large.

    Args:
        seconds: of 10 iterations.
        evaluations: an iteration.
        errors: of the main test set; those of the other one are twice as large.
        diverged: iteration.
        equation: label; by default that of the equation of the configuration. Likewise `digest`.
        changes: of the raw configuration.
        config: of another run.
    """
    losses = np.asarray(losses, dtype=float)
    errors = 10 * losses if errors is None else np.asarray(errors, dtype=float)
    steps = np.arange(len(losses))
    places = 10 * steps if places is None else np.asarray(places)
    predictors = PREDICTORS if predictors is None else predictors
    own = {
        "metrics/train/loss": losses,
        "metrics/evaluations": evaluations * places.astype(float),
        "timing/training_seconds": seconds * steps,
    }
    ends = {}
    if predictors:
        own |= {"metrics/validation/relative_l2_grid": errors}
        ends = {"relative_l2_grid": errors[-1], "relative_l2_fine": 2 * errors[-1]}
    own |= {key.replace("__", "/"): np.asarray(values, dtype=float) for key, values in series.items()}
    config = config_of(name, seed, changes) if config is None else config
    own_problem = config.problem
    label = load_equation(own_problem.equation, own_problem.options, own_problem.folder).label
    digest = describe(own_problem).digest if digest is None else digest
    attributes = {
        "equation": equation or label,
        "degenerate": degenerate,
        "num_space": 1,
        "predictors": json.dumps(predictors),
    }
    outcome = Result(own, None, len(losses) - 1, places, diverged, "iterations" if diverged is None else "diverged",
                     ends, fields or {})  # fmt: skip
    path = run_path(results, config)
    write_run(path, config, problem("computed", digest, attributes), outcome, Ranks(), NOW, NOW)
    return path


def fields(scale=1.0, exact=True):
    """A steep front that moves, and a network that is a little less steep."""
    x, t = np.linspace(-1, 1, 64), np.linspace(0, 0.99, 34)
    values = -np.tanh(20 * (x[:, None] - 0.3 * t[None, :]))
    found = {
        "x": Field(("x",), x, "1", "space"),
        "t": Field(("t",), t, "1", "time"),
        "u": Field(("x", "t"), scale * values, "1", "u"),
        "pde_residual": Field(("x", "t"), 0.1 * values**2, "1", "residual"),
        "point": Field(("point",), np.arange(5), "1", "number"),
        "collocation_x": Field(("point",), np.linspace(-1, 1, 5), "1", "x"),
        "collocation_t": Field(("point",), np.linspace(0, 1, 5), "1", "t"),
    }
    if exact:
        found["exact"] = Field(("x", "t"), values, "1", "exact")
    return found
