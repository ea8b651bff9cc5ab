"""Training of physics-informed networks: what an iteration is, stages, limits, resets, divergence."""

import copy
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from suite_cases import PINN, RAW, build, pinn_run

import aadl
from experiments.__main__ import main
from experiments.catalog import parse_config
from experiments.distributed.ranks import Ranks
from experiments.records.reading import read_run
from experiments.runs import execute
from experiments.runs.execute import execute_run
from experiments.runs.runs_to_make import runs_to_make, single_process_variants
from experiments.training.stage import Stage
from experiments.training.train import Training, train

LOSS = "metrics/train/loss"
ADAM = {"name": "Adam", "lr": 1e-2}
SGD = {"name": "SGD", "lr": 1e-3}
LBFGS = {"name": "LBFGS", "max_iter": 4, "line_search_fn": "strong_wolfe"}
EAGER = {"store_each_nth": 1, "frequency": 2, "wait_iterations": 0}


def run(config, results, *options):
    return main(["run", str(config), "--results", str(results), "--jobs", "1", *options])


def trained(config):
    """Result, problem and first optimizer of a run, as `execute_run` makes them."""
    seen = {}
    original = execute.train

    def keep(run, *args, **kwargs):
        seen["problem"], seen["optimizer"] = run.problem, run.stages[0].optimizer
        seen["result"] = original(run, *args, **kwargs)
        return seen["result"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "train", keep)
        patch.setattr(execute, "write_run", lambda *args, **options: None)
        with tempfile.TemporaryDirectory() as results:
            execute_run(config, Ranks(), Path(results))
    return seen["result"], seen["problem"], seen["optimizer"]


def test_iterations_are_evaluations_of_the_gradient():
    result, _, _ = trained(pinn_run(training={"iterations": 10, "evaluate_every": 4}))
    assert result.iterations.tolist() == [0, 4, 8, 10] and result.num_steps == 10
    assert result.stop_reason == "iterations" and result.diverged_iteration is None
    assert {len(values) for values in result.series.values()} == {4}
    assert result.series[LOSS][-1] < result.series[LOSS][0]
    assert result.series["metrics/evaluations"].tolist() == [0, 4, 8, 10]


@pytest.mark.parametrize(
    "more", [{"acceleration": EAGER | {"safeguard": "loss"}}, {"published": {"frequency": 2, "safeguard": True}}]
)
def test_trials_are_no_iterations(more):
    result, _, _ = trained(pinn_run({"optimizer": ADAM, **more}, {"iterations": 30, "evaluate_every": 10}))
    assert result.iterations.tolist() == [0, 10, 20, 30] and result.num_steps == 30
    trials = result.series["acceleration/closure_evaluations"]
    assert trials[-1] > 0
    assert (result.series["metrics/evaluations"] == result.iterations + trials).all()


def test_lbfgs_takes_several_iterations_a_step_and_keeps_the_budget():
    result, _, optimizer = trained(pinn_run({"optimizer": LBFGS}, {"iterations": 30, "evaluate_every": 10}))
    assert result.num_steps < 30 <= result.iterations[-1] <= 32
    assert (np.diff(result.iterations) > 0).all() and (result.iterations == result.series["metrics/evaluations"]).all()
    assert result.series[LOSS][-1] < 0.9 * result.series[LOSS][0]
    assert isinstance(optimizer, torch.optim.LBFGS)


def test_the_scheduler_steps_once_an_iteration():
    scheduler = {"name": "StepLR", "step_size": 5, "gamma": 0.1}
    training = {"iterations": 12, "evaluate_every": 4, "scheduler": scheduler}
    result, _, _ = trained(pinn_run({"optimizer": ADAM}, training))
    assert result.series["metrics/learning_rate"] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])
    result, _, _ = trained(pinn_run({"optimizer": LBFGS | {"lr": 1.0}}, training))
    done = result.iterations[-1]
    assert result.series["metrics/learning_rate"][-1] == pytest.approx(0.1 ** (done // 5))


def test_a_second_stage_goes_on_without_the_scheduler():
    scheduler = {"name": "StepLR", "step_size": 1, "gamma": 0.5}
    training = {"iterations": 20, "evaluate_every": 5, "scheduler": scheduler}
    then = {"after": 10, "optimizer": LBFGS}
    result, _, _ = trained(pinn_run({"optimizer": ADAM, "then": then}, training))
    alone, _, _ = trained(pinn_run({"optimizer": ADAM}, training))
    assert (result.series[LOSS][:3] == alone.series[LOSS][:3]).all()
    assert result.series["metrics/learning_rate"][2] == pytest.approx(1e-2 * 0.5**10)
    assert result.series["metrics/learning_rate"][3] == 1.0
    assert result.series[LOSS][-1] < alone.series[LOSS][-1]
    both = {"optimizer": ADAM, "acceleration": EAGER, "then": {**then, "acceleration": EAGER}}
    result, _, _ = trained(pinn_run(both, training))
    steps = result.series["acceleration/steps"]
    assert steps[2] == 10 and steps[-1] == result.num_steps > 10


def test_a_run_ends_when_its_time_is_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("experiments.training.clock.time.perf_counter", lambda: clock[0])

    def trained_slowly(**training):
        clock[0] = 0.0
        problem = build(pinn_run(training={"iterations": 100, "evaluate_every": 4} | training), Ranks())
        backward = problem.backward

        def slow(model, points, observe):
            clock[0] += 1.0
            return backward(model, points, observe)

        problem.backward = slow
        return train(Training(problem, [Stage(torch.optim.Adam(problem.model.parameters()))], Ranks()))

    result = trained_slowly(max_seconds=6.5)
    assert result.stop_reason == "time" and result.iterations.tolist() == [0, 4, 7]
    assert trained_slowly(max_seconds=1000.0, iterations=8).stop_reason == "iterations"
    result = trained_slowly(max_seconds=8.0)  # up at the end of an interval
    assert result.stop_reason == "time" and result.iterations.tolist() == [0, 4, 8]


@pytest.mark.parametrize(("rule", "resets"), [("reset", 2), ("keep", 0)])
def test_memories_start_empty_with_new_points(rule, resets):
    config = pinn_run(
        {"optimizer": SGD, "acceleration": EAGER}, {"iterations": 15}, resample_every=5, history_on_resample=rule
    )
    result, _, optimizer = trained(config)
    assert aadl.accelerator_of(optimizer).statistics["resets"].get("user", 0) == resets
    assert result.iterations[-1] == 15
    config = pinn_run(
        {"optimizer": {"name": "LBFGS", "max_iter": 2}}, {"iterations": 40}, resample_every=10, history_on_resample=rule
    )
    cleared = []
    with pytest.MonkeyPatch.context() as patch:
        original = torch.optim.LBFGS.step

        def step(self, closure):
            cleared.append(not self.state)
            return original(self, closure)

        patch.setattr(torch.optim.LBFGS, "step", step)
        trained(config)
    assert sum(cleared[1:]) == (3 if resets else 0)


def test_other_memories_stay():
    config = pinn_run({"optimizer": ADAM}, {"iterations": 15}, resample_every=5)
    _, _, optimizer = trained(config)
    assert {float(state["step"]) for state in optimizer.state.values()} == {15.0}
    fixed = pinn_run({"optimizer": SGD, "acceleration": EAGER}, {"iterations": 15})
    _, _, optimizer = trained(fixed)
    assert aadl.accelerator_of(optimizer).statistics["resets"].get("user", 0) == 0


def failing(problem, iteration):
    """The problem, with a loss that is NaN from an iteration on."""
    calls, backward = [0], problem.backward

    def fail(model, points, observe):
        calls[0] += 1
        loss = backward(model, points, observe)
        return loss * math.nan if calls[0] >= iteration else loss

    problem.backward = fail
    return problem


def test_a_loss_that_is_not_finite_ends_the_run_at_its_iteration():
    config = pinn_run(training={"iterations": 40, "evaluate_every": 10})
    problem = build(config, Ranks())
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    result = train(Training(failing(problem, 13), [Stage(optimizer)], Ranks()))
    assert result.diverged_iteration == 13 and result.stop_reason == "diverged" and result.diverged_epoch is None
    assert result.iterations.tolist() == [0, 10, 20] and np.isfinite(result.series[LOSS][:2]).all()
    problem = build(config, Ranks())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e30)  # the loss is finite, the weights are not
    assert train(Training(problem, [Stage(optimizer)], Ranks())).diverged_iteration in range(1, 11)


@pytest.mark.parametrize(
    "variant",
    [
        {"optimizer": {"name": "SGD", "lr": 1e30}},
        {"optimizer": {"name": "LBFGS", "lr": 1e30}},
        {"optimizer": {"name": "SGD", "lr": 1e30}, "acceleration": EAGER},
        {"optimizer": {"name": "SGD", "lr": 1e30}, "published": {"frequency": 1}},
    ],
)
def test_a_diverged_run_is_recorded_and_named(config, tmp_path, capsys, variant):
    raw = copy.deepcopy(PINN) | {"seeds": [0], "variants": {"wild": variant}}
    raw["problem"] |= {"resample_every": 4, "adaptive_pool": 64}
    config.write_text(yaml.safe_dump(raw))
    assert run(config, tmp_path / "results") == 0
    printed = capsys.readouterr().err
    assert "diverged: wild (1 seeds: seed 0 at iteration " in printed and "Traceback" not in printed
    record = read_run(next((tmp_path / "results").rglob("*.h5")))
    assert record.diverged and record.diverged_epoch is None and record.attributes["stop_reason"] == "diverged"
    assert record.diverged_iteration > 0 and len(record.places) == len(record.series[LOSS]) <= 4


def test_variants_that_accept_nothing_are_named_once(config, tmp_path, capsys):
    sgd = {"name": "SGD", "lr": 1e-3}
    raw = copy.deepcopy(PINN) | {"seeds": [0, 1]}
    raw["variants"] = {"idle": {"optimizer": sgd, "acceleration": {}}, "plain": {"optimizer": sgd}}
    config.write_text(yaml.safe_dump(raw))
    assert run(config, tmp_path / "results") == 0
    assert "no candidate accepted, as if without acceleration: idle\n" in capsys.readouterr().err


# ---- optimizers that ask for residuals -------------------------------------------------------------------------------


def test_linearizations_are_iterations_and_residuals_are_trials():
    variant = {"optimizer": {"name": "LevenbergMarquardt"}}
    result, _, _ = trained(pinn_run(variant, {"iterations": 10, "evaluate_every": 5}, dtype="float64"))
    assert result.iterations.tolist() == [0, 5, 10] and result.num_steps == 10
    evaluations = result.series["metrics/evaluations"]
    assert evaluations[0] == 0 and (np.diff(evaluations) >= 10).all()  # at least one trial each
    assert result.series[LOSS][-1] < 0.9 * result.series[LOSS][0]
    # Well damped steps and one column: candidates that do not point back, and whose loss is asked for.
    variant = {
        "optimizer": {"name": "LevenbergMarquardt", "damping": 1.0},
        "acceleration": EAGER | {"history_depth": 1, "safeguard": "loss"},
    }
    result, _, _ = trained(pinn_run(variant, {"iterations": 40, "evaluate_every": 20}, dtype="float64"))
    assert result.iterations.tolist() == [0, 20, 40] and result.num_steps == 40
    trials = result.series["acceleration/closure_evaluations"][-1]
    assert trials > 0 and result.series["metrics/evaluations"][-1] >= 80 + trials


def test_they_are_offered_to_equations_only_and_to_one_process(tmp_path, capsys):
    raw = copy.deepcopy(RAW)
    raw["variants"] = {"second": {"optimizer": {"name": "LevenbergMarquardt"}}}
    message = r"variants\.second\.optimizer: name must be one of .*, got 'LevenbergMarquardt'"
    with pytest.raises(ValueError, match=message):
        parse_config(raw)
    raw = copy.deepcopy(PINN) | {"variants": raw["variants"]}
    with pytest.raises(ValueError, match=r"second: the optimizer runs in a single process, not on several ranks"):
        execute.execute_experiment(parse_config(raw), Ranks(world_size=2), tmp_path, num_jobs=1)
    adam = raw["variants"]["adam"] = PINN["variants"]["adam"]
    raw["variants"]["later"] = adam | {"then": {"after": 5, "optimizer": {"name": "LevenbergMarquardt"}}}
    config = parse_config(raw)
    left_out = single_process_variants(config)
    runs, _ = runs_to_make(config, Ranks(world_size=2), tmp_path, left_out, from_start=False)
    assert left_out == ["second", "later"] and {run.name for run in runs} == {"adam"}
    assert "left out on 2 ranks, because they run in a single process: second, later" in capsys.readouterr().err
