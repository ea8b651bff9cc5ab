"""The trace of the acceleration's attempts: what the loop notes, what the record has, and what a resumed run has."""

import math
import warnings
from collections import Counter
from dataclasses import replace

import h5py
import numpy as np
import pytest
from small_runs import EAGER
from stopped_runs import run_to_the_end
from suite_cases import run_config

import aadl
from experiments.admissions import problem as graduate_admissions
from experiments.distributed.ranks import Ranks
from experiments.records.reading import read_attempts, read_run
from experiments.records.status import run_path, state_of
from experiments.runs.execute import execute_run
from experiments.settings.kinds import Component
from experiments.settings.run_config import PublishedConfig, SaveConfig, VariantConfig
from experiments.training.attempts import AttemptTrace
from experiments.training.components import make_optimizer
from experiments.training.stage import Stage
from experiments.training.train import Training, train

RATE = {"lr": 3e-2, "momentum": 0.9}


def config(**variant):
    """Twelve epochs of four steps."""
    run = run_config("sgd", epochs=12)
    return replace(run, variant=VariantConfig(label="one", optimizer=Component("SGD", RATE), **variant))


def test_every_attempt_has_a_row_with_its_step_and_outcome():
    run = config()
    problem = graduate_admissions.AdmissionsProblem(run, Ranks())
    optimizer = make_optimizer(run.variant.optimizer, problem.model.parameters())
    aadl.accelerate(optimizer, **EAGER)
    statistics = aadl.accelerator_of(optimizer).statistics
    stages = [Stage(optimizer, lambda: aadl.accelerator_of(optimizer).statistics)]
    attempts = train(Training(problem, stages, Ranks(), trace_attempts=True)).attempts
    outcomes = Counter(attempts["outcome"])
    assert outcomes.pop("accepted", 0) == statistics["accepted"]
    assert outcomes.pop("reverted", 0) == statistics["reverted"]
    assert outcomes == statistics["rejected"]
    assert len(attempts["step"]) == statistics["attempts"] + statistics["reverted"] > 5
    assert not (attempts["step"] % EAGER["frequency"]).any()  # no attempt between two accelerations is due
    assert attempts["coefficient_norm"][-1] == statistics["coefficient_norm"]
    assert "damping" not in attempts


def test_rows_are_in_the_order_of_events():
    counts = {"accepted": 0, "reverted": 0, "rejected": {}, "gain": math.nan}
    stages = [Stage(None), Stage(None, lambda: counts)]
    trace = AttemptTrace(stages)
    events = {3: {"accepted": 1, "gain": 0.5}, 5: {"reverted": 1, "rejected": {"loss": 1}, "gain": 0.25}}
    events[9] = {"rejected": {"loss": 1, "rank": 2}}  # of ranks that vote, two in a step
    for step in range(1, 11):
        counts |= events.get(step, {})
        trace.after_step(step)
    columns = {name: column.tolist() for name, column in trace.columns().items()}
    assert columns == {
        "step": [3, 5, 5, 9, 9],
        "stage": [1] * 5,
        "outcome": ["accepted", "reverted", "loss", "rank", "rank"],
        "gain": [0.5, 0.25, 0.25, 0.25, 0.25],
    }


def test_a_run_without_a_trace_has_none():
    run = config()
    problem = graduate_admissions.AdmissionsProblem(run, Ranks())
    stage = Stage(make_optimizer(run.variant.optimizer, problem.model.parameters()))
    assert train(Training(problem, [stage], Ranks())).attempts is None
    assert train(Training(problem, [stage], Ranks(), trace_attempts=True)).attempts["step"].tolist() == []


@pytest.mark.parametrize(
    "variant", [{"acceleration": EAGER}, {"published": PublishedConfig(frequency=2, safeguard=True)}]
)
def test_the_record_of_a_resumed_run_has_the_trace_of_the_whole_run(tmp_path, variant):
    run, save = config(**variant), SaveConfig(attempts=True)
    whole = execute_run(run, Ranks(), tmp_path / "whole", save=save)
    run_to_the_end(run, Ranks(), tmp_path / "parts", stop=18, save=save)
    resumed = execute_run(run, Ranks(), tmp_path / "parts", save=save)
    assert read_run(resumed).attributes["restart_count"] == 1
    expected, found = read_attempts(whole), read_attempts(resumed)
    assert len(expected["outcome"]) > 5 and expected.keys() == found.keys()
    for name, column in expected.items():
        assert np.array_equal(column, found[name], equal_nan=name != "outcome"), name
    with h5py.File(whole) as file:
        for name, dataset in file["attempts"].items():
            assert dataset.attrs["units"] and dataset.attrs["long_name"]
            assert name == "step" or dataset.dims[0][0] == file["attempts/step"]
    assert "attempts/step" not in read_run(whole).series


def test_a_trace_that_is_asked_for_later_begins_there(tmp_path):
    run = config(acceleration=EAGER)
    run_to_the_end(run, Ranks(), tmp_path, stop=15)
    steps = read_attempts(execute_run(run, Ranks(), tmp_path, save=SaveConfig(attempts=True)))["step"]
    assert steps.min() > 16


def test_a_finished_record_without_attempts_is_made_again_if_they_are_asked_for(tmp_path):
    run = config(acceleration=EAGER)
    path, digest = execute_run(run, Ranks(), tmp_path), graduate_admissions.AdmissionsProblem(run, Ranks()).data_digest
    assert path == run_path(tmp_path, run)
    assert state_of(path, run, digest, 1) == "finished"
    assert state_of(path, run, digest, 1, SaveConfig(attempts=True).parts) == "without parts"
    execute_run(run, Ranks(), tmp_path, save=SaveConfig(attempts=True))
    assert state_of(path, run, digest, 1, SaveConfig(attempts=True).parts) == "finished"
    assert state_of(path, run, digest, 1, SaveConfig(attempts=True, weights=True).parts) == "without parts"


def test_a_run_leaves_the_filters_of_warnings_as_they_were(tmp_path):
    with warnings.catch_warnings():
        before = list(warnings.filters)
        execute_run(config(acceleration=EAGER), Ranks(), tmp_path)
        assert warnings.filters == before
