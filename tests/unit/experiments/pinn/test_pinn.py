"""Physics-informed networks in the suite: points, loss, the loop by iterations, the record, mistakes of a user."""

import copy
import dataclasses
import json
import math
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from burgers_by_autograd import residual_and_slope, solution
from suite_cases import PINN, RAW, build, pinn_run
from torch.nn.utils import parameters_to_vector

import aadl
from experiments.__main__ import main
from experiments.catalog import load_config, parse_config
from experiments.distributed.ranks import Ranks
from experiments.pinn.problem import describe
from experiments.records.reading import read_fields, read_run
from experiments.records.status import run_path, state_of
from experiments.runs import execute
from experiments.runs.config import expand_runs
from experiments.runs.execute import execute_run
from experiments.training.stage import Stage
from experiments.training.train import train

LOSS = "metrics/train/loss"
ADAM = {"name": "Adam", "lr": 1e-2}
SGD = {"name": "SGD", "lr": 1e-3}
LBFGS = {"name": "LBFGS", "max_iter": 4, "line_search_fn": "strong_wolfe"}
EAGER = {"store_each_nth": 1, "frequency": 2, "wait_iterations": 0}

HEAT = """
import math
import tempfile
import torch
from experiments.pinn.equation import Equation

class Heat(Equation):
    num_space = 1

    def __init__(self, diffusivity=0.1):
        if not diffusivity > 0:
            raise ValueError(f"diffusivity must be > 0, got {diffusivity}")
        self.diffusivity, self.label = diffusivity, "heat"

    def sample(self, uniform):
        return uniform.clone()

    def conditions(self, uniform):
        x = uniform[:, :1]
        return torch.cat([x, torch.zeros_like(x)], dim=1), torch.sin(math.pi * x)

    def residual(self, points, u, source):
        return u.time - self.diffusivity * u.laplacian

    def exact(self, points):
        decay = torch.exp(-self.diffusivity * math.pi**2 * points[:, 1:])
        return decay * torch.sin(math.pi * points[:, :1])

    def test_points(self):
        axis = torch.linspace(0, 1, 11, dtype=torch.float64)
        return {"grid": torch.cartesian_prod(axis, axis)}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ONLY"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(PINN))
    return path


def run(config, results, *options):
    return main(["run", str(config), "--results", str(results), "--jobs", "1", *options])


def trained(config):
    """Result, problem and first optimizer of a run, as `execute_run` makes them."""
    seen = {}
    original = execute.train

    def keep(problem, stages, *args, **kwargs):
        seen["problem"], seen["optimizer"] = problem, stages[0].optimizer
        seen["result"] = original(problem, stages, *args, **kwargs)
        return seen["result"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "train", keep)
        patch.setattr(execute, "write_run", lambda *args, **options: None)
        with tempfile.TemporaryDirectory() as results:
            execute_run(config, Ranks(), Path(results))
    return seen["result"], seen["problem"], seen["optimizer"]


# ---- loss ------------------------------------------------------------------------------------------------------------


def burgers_loss(model, points, nu, is_hard):
    """The loss by the book: autograd twice."""
    residual, _ = residual_and_slope(model, points, nu, is_hard)
    loss = residual.square().mean()
    if len(points.conditions):
        loss = loss + 3.0 * (solution(model, points.conditions, is_hard) - points.values).square().mean()
    return loss


@pytest.mark.parametrize("conditions", ["soft", "hard"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_the_loss_is_that_of_the_book_by_every_route(conditions, chunk):
    nu = 0.02
    config = pinn_run(
        conditions=conditions, dtype="float64", condition_weight=3.0, options={"nu": nu}, chunk_points=chunk
    )
    problem = build(config, Ranks())
    model, points = problem.model, problem.points(problem.model, 0)
    expected = burgers_loss(model, points, nu, conditions == "hard")
    gradient = parameters_to_vector(torch.autograd.grad(expected, list(model.parameters())))
    expected = float(expected.detach())
    loss = problem.backward(model, points)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(found, gradient, rtol=1e-9, atol=1e-12) and gradient.abs().max() > 1e-3
    assert float(problem.loss(model, points).detach()) == pytest.approx(expected, rel=1e-12)
    residuals, jacobian = problem.linearize(model, points)
    assert residuals.shape == (40,) and jacobian.shape == (40, len(gradient))
    assert float(residuals.square().sum()) == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(2 * jacobian.T @ residuals, gradient, rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.residuals(model, points), residuals, rtol=1e-10)
    with torch.no_grad():
        values = problem.evaluate(model)
    assert values[LOSS] == pytest.approx(expected, rel=1e-12)
    assert values[LOSS] == pytest.approx(values["metrics/train/pde_loss"] + 3 * values["metrics/train/condition_loss"])
    other = build(pinn_run(conditions="soft" if conditions == "hard" else "hard", dtype="float64"), Ranks())
    assert float(other.loss(model, other.points(model, 0)).detach()) != pytest.approx(expected, rel=1e-3)


def test_hard_conditions_need_no_condition_points():
    problem = build(pinn_run(conditions="hard", num_conditions=0, dtype="float64"), Ranks())
    points = problem.points(problem.model, 0)
    residuals, jacobian = problem.linearize(problem.model, points)
    assert len(residuals) == len(jacobian) == 32
    assert float(problem.backward(problem.model, points)) == pytest.approx(float(residuals.square().sum()))
    with torch.no_grad():
        assert "metrics/train/condition_loss" not in problem.evaluate(problem.model)
        fields = problem.fields(problem.model)
    assert fields["u"].values.shape == (256, 100)
    assert np.allclose(fields["u"].values[:, 0], fields["exact"].values[:, 0])
    assert not np.allclose(fields["u"].values[:, 50], fields["exact"].values[:, 50], atol=1e-2)


def test_both_dtypes_start_from_the_same_weights_and_points():
    single, double = (build(pinn_run(dtype=dtype), Ranks()) for dtype in ("float32", "float64"))
    weights = [parameters_to_vector(problem.model.parameters()).detach() for problem in (single, double)]
    assert weights[0].dtype == torch.float32 and weights[1].dtype == torch.float64
    assert torch.equal(weights[0].double(), weights[1])
    points = [problem.points(problem.model, 0).interior for problem in (single, double)]
    assert torch.equal(points[0], points[1].float())


def test_an_error_is_measured_against_the_exact_solution():
    problem = build(pinn_run(dtype="float64"), Ranks())
    problem.points(problem.model, 0)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.zero_()
        values = problem.evaluate(problem.model)
        assert values["metrics/validation/relative_l2_grid"] == pytest.approx(1.0)
        assert "metrics/validation/relative_l2_graded" not in values
        assert problem.finish(problem.model)["relative_l2_graded"] == pytest.approx(1.0)
    rivals = json.loads(problem.attributes["predictors"])
    assert rivals["grid"]["frozen initial condition"] == pytest.approx(0.587, abs=1e-3)


# ---- points ----------------------------------------------------------------------------------------------------------


def test_points_are_set_by_seed_and_number_of_resamplings():
    config = pinn_run(resample_every=5)

    def interiors(config):
        problem = build(config, Ranks())
        return [problem.points(problem.model, iteration) for iteration in (0, 4, 5, 10)]

    one, same = interiors(config), interiors(config)
    assert all(torch.equal(a.interior, b.interior) for a, b in zip(one, same, strict=True))
    assert one[0] is one[1] and one[1] is not one[2]
    assert not torch.equal(one[1].interior, one[2].interior) and not torch.equal(one[2].interior, one[3].interior)
    assert not torch.equal(one[1].conditions, one[2].conditions)
    other = interiors(dataclasses.replace(config, seed=1))
    assert not torch.equal(one[0].interior, other[0].interior)
    problem = build(pinn_run(), Ranks())
    assert problem.points(problem.model, 0) is problem.points(problem.model, 1000)  # fixed


def test_adaptive_points_go_where_the_residual_is_large():
    config = pinn_run(resample_every=5, num_points=200, adaptive_pool=20_000, dtype="float64")
    problem, plain = (build(c, Ranks()) for c in (config, pinn_run(resample_every=5, num_points=200, dtype="float64")))

    def mean_residual(points):
        return float(problem.residuals(problem.model, points)[:200].square().sum())

    with torch.no_grad():
        for p in problem.model.parameters():
            p *= 4.0  # an uneven residual
    first, later = (problem.points(problem.model, iteration) for iteration in (0, 5))
    assert torch.equal(first.interior, plain.points(plain.model, 0).interior)  # nothing is known at the start
    uniform = plain.points(plain.model, 5)
    assert mean_residual(later) > 1.2 * mean_residual(uniform)
    kept = (later.interior[:, None] == uniform.interior).all(dim=2).any(dim=1)
    assert int(kept.sum()) == 100
    with torch.no_grad():
        problem.model.linears[0].weight.fill_(math.nan)
    assert problem.points(problem.model, 10).interior.isfinite().all()


# ---- loop ------------------------------------------------------------------------------------------------------------


def test_iterations_are_evaluations_of_the_gradient():
    result, _, _ = trained(pinn_run(training={"iterations": 10, "evaluate_every": 4}))
    assert result.iterations.tolist() == [0, 4, 8, 10] and result.num_steps == 10
    assert result.stop_reason == "iterations" and result.diverged_iteration is None
    assert {len(values) for values in result.series.values()} == {4}
    assert result.series[LOSS][-1] < result.series[LOSS][0]
    assert result.series["metrics/evaluations"].tolist() == [0, 4, 8, 10]


@pytest.mark.parametrize(
    "more",
    [{"acceleration": EAGER | {"safeguard": "loss"}}, {"published": {"frequency": 2, "safeguard": True}}],
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
        return train(problem, [Stage(torch.optim.Adam(problem.model.parameters()))], Ranks())

    result = trained_slowly(max_seconds=6.5)
    assert result.stop_reason == "time" and result.iterations.tolist() == [0, 4, 7]
    assert trained_slowly(max_seconds=1000.0, iterations=8).stop_reason == "iterations"
    result = trained_slowly(max_seconds=8.0)  # up at the end of an interval
    assert result.stop_reason == "time" and result.iterations.tolist() == [0, 4, 8]


@pytest.mark.parametrize(("rule", "resets"), [("reset", 2), ("keep", 0)])
def test_memories_begin_anew_with_the_points(rule, resets):
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
    result = train(failing(problem, 13), [Stage(optimizer)], Ranks())
    assert result.diverged_iteration == 13 and result.stop_reason == "diverged" and result.diverged_epoch is None
    assert result.iterations.tolist() == [0, 10, 20] and np.isfinite(result.series[LOSS][:2]).all()
    problem = build(config, Ranks())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e30)  # the loss is finite, the weights are not
    assert train(problem, [Stage(optimizer)], Ranks()).diverged_iteration in range(1, 11)


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
    told = capsys.readouterr().err
    assert "diverged: wild (1 seeds: seed 0 at iteration " in told and "Traceback" not in told
    record = read_run(next((tmp_path / "results").rglob("*.h5")))
    assert record.diverged and record.diverged_epoch is None and record.attributes["stop_reason"] == "diverged"
    assert record.diverged_iteration > 0 and len(record.places) == len(record.series[LOSS]) <= 4


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
    raw["variants"]["adam"] = PINN["variants"]["adam"]
    config = parse_config(raw)
    left_out = execute.single_process_variants(config)
    runs, _ = execute._plan(config, Ranks(world_size=2), tmp_path, False, left_out)
    assert left_out == ["second"] and {run.name for run in runs} == {"adam"}
    assert "left out on 2 ranks, because they run in a single process: second" in capsys.readouterr().err


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["problem", "equation"], "burger", r"problem: equation must be one of burgers_2d, .*got 'burger'"),
        (["problem", "options"], {"nu": -1.0}, r"problem: nu must be .*-1"),
        (["problem", "options"], {"nu": 0}, r"problem: nu must be"),
        (
            ["problem", "options"],
            {"mu": 1.0},
            r"problem: options do not fit equation Burgers2d: .*'mu'; it takes nu, g",
        ),
        (["problem", "options"], [1], r"problem\.options must be a mapping, got \[1\]"),
        (["problem", "folder"], "x", r"unknown key problem\.folder"),
        (
            ["problem", "hidden_sizes"],
            [],
            r"problem\.hidden_sizes must have at least 1 item, got \[\]",
        ),
        (["problem", "hidden_sizes"], [6, 0], r"problem\.hidden_sizes\[1\] must be greater than or equal to 1, got 0"),
        (["problem", "activation"], "relu", r"problem\.activation must be one of tanh, .*got 'relu'"),
        (["problem", "num_points"], 0, r"problem\.num_points must be greater than or equal to 1, got 0"),
        (["problem", "num_conditions"], 0, r"problem: num_conditions must be an integer >= 1 with soft conditions"),
        (["problem", "adaptive_pool"], 100, r"problem: adaptive_pool must be null where resample_every is, got 100"),
        (["training", "epochs"], 3, r"unknown key training\.epochs; valid keys are: iterations \(default 2000\)"),
        (["training", "max_seconds"], 0, r"training\.max_seconds must be greater than 0, got 0"),
        (["studies"], {"batch_size": {"variant": "adam", "sizes": [8]}}, r"unknown key studies\.batch_size"),
        (["baseline"], "sgd", r"^baseline must be one of adam, adam_aadl, got 'sgd'"),
        (
            ["variants", "adam", "baseline"],
            "sgd",
            r"variants\.adam\.baseline must be one of adam, adam_aadl, got 'sgd'",
        ),
        (["variants", "adam", "problem"], {"points": 1}, r"unknown key variants\.adam\.problem\.points"),
        (["variants", "adam", "problem"], {"folder": "x"}, r"unknown key variants\.adam\.problem\.folder"),
        (["variants", "adam", "problem"], {"options": {"nu": -1}}, r"variants\.adam\.problem: nu must be"),
        (["variants", "adam", "training"], {"iterations": 0}, r"variants\.adam\.training\.iterations must be"),
        (["variants", "adam", "then"], {"optimizer": ADAM}, r"variants\.adam\.then\.after is missing"),
        (["variants", "adam", "then"], {"after": 5}, r"variants\.adam\.then\.optimizer is missing"),
        (
            ["variants", "adam", "then"],
            {"after": 12, "optimizer": ADAM},
            r"then\.after must be below the 12 iterations",
        ),
        (["experiment"], "burgers_3d", r"experiment must be one of .*, got 'burgers_3d'; any other name needs"),
    ],
)
def test_a_mistake_is_named(path, value, message):
    parse_config(copy.deepcopy(PINN))
    raw = copy.deepcopy(PINN)
    level = raw
    for key in path[:-1]:
        level = level.setdefault(key, {})
    level[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        parse_config(raw)


def test_dimensions_must_fit_the_sampler_and_the_lift():
    raw = copy.deepcopy(PINN) | {"experiment": "burgers_100d"}
    raw["problem"] |= {"equation": "burgers_100d", "sampler": "sobol", "options": {"dimension": 22_000}}
    with pytest.raises(ValueError, match=r"22000.*21201|21201.*22000"):
        parse_config(raw)
    raw["problem"]["options"] = {"dimension": 100}
    assert parse_config(raw).problem.sampler == "sobol"
    raw["problem"] |= {"resample_every": 5, "adaptive_pool": 20, "num_points": 32}
    with pytest.raises(ValueError, match=r"problem: adaptive_pool must be at least num_points = 32, got 20"):
        parse_config(raw)


def test_a_variant_overrides_settings_for_itself():
    raw = copy.deepcopy(PINN)
    raw["training"]["scheduler"] = {"name": "StepLR", "step_size": 5}
    raw["variants"]["own"] = {
        "optimizer": ADAM,
        "baseline": "adam_aadl",
        "problem": {"num_points": 64, "options": {"nu": 0.01}},
        "training": {"iterations": 6, "scheduler": None},
    }
    config = parse_config(raw)
    runs = {run.name: run for run in expand_runs(config) if run.seed == 0}
    assert runs["own"].problem.num_points == 64 and runs["adam"].problem.num_points == 32
    assert runs["own"].problem.options == {"nu": 0.01} and runs["own"].problem.hidden_sizes == (6, 6)
    assert runs["own"].training.iterations == 6 and runs["own"].training.scheduler is None
    assert runs["adam"].training.scheduler is not None
    assert json.loads(runs["own"].as_json())["variant"]["overrides"]["training"] == {"iterations": 6, "scheduler": None}
    assert "overrides" not in json.loads(runs["adam"].as_json())["variant"]
    assert [variant.baseline for variant in config.variants.values()] == ["adam", "adam", "adam_aadl"]
    assert [variant.index for variant in config.variants.values()] == [0, 1, 2]
    assert describe(runs["own"].problem).digest != describe(runs["adam"].problem).digest


def test_named_variants_keep_their_place_and_are_the_only_ones_checked(config):
    chosen = load_config(config, ["variants=adam_aadl", "training.iterations=5"])
    assert list(chosen.variants) == ["adam_aadl"]
    assert (chosen.variants["adam_aadl"].index, chosen.variants["adam_aadl"].baseline) == (1, "adam")
    whole = load_config(config)
    assert whole.variants["adam_aadl"] == chosen.variants["adam_aadl"]


# ---- records and commands --------------------------------------------------------------------------------------------


def test_a_record_says_what_it_holds(config, tmp_path, capsys):
    results = tmp_path / "results"
    assert run(config, results, "--set", "seeds=0") == 0
    path = results / "burgers_2d" / "test" / "adam_aadl" / "seed-0.h5"
    record = read_run(path)
    attributes = record.attributes
    assert record.config["experiment"] == "burgers_2d" and record.places.tolist() == [0, 4, 8, 12]
    assert attributes["data_source"] == "computed" and "Burgers" in attributes["equation"]
    assert (attributes["variant_index"], attributes["baseline"], attributes["degenerate"]) == (1, "adam", "")
    assert (attributes["diverged_epoch"], attributes["diverged_iteration"]) == (-1, -1)
    assert attributes["stop_reason"] == "iterations" and attributes["num_threads"] == 1
    last = record.series["metrics/validation/relative_l2_grid"][-1]
    assert attributes["relative_l2_grid"] == pytest.approx(last) and attributes["relative_l2_graded"] > 0
    assert "folder" not in record.config["problem"]
    fields = read_fields(path)
    assert fields["u"].shape == fields["exact"].shape == fields["pde_residual"].shape == (256, 100)
    error = np.linalg.norm(fields["u"] - fields["exact"]) / np.linalg.norm(fields["exact"])
    assert error == pytest.approx(last, rel=1e-4)
    assert fields["collocation_x"].shape == (32,)
    with h5py.File(path) as file:
        names = []
        file.visit(names.append)
        datasets = [file[name] for name in names if isinstance(file[name], h5py.Dataset)]
        for dataset in datasets:
            assert dataset.attrs["units"] and dataset.attrs["long_name"], dataset.name
            if not dataset.is_scale:
                for axis, length in enumerate(dataset.shape):
                    assert len(dataset.dims[axis][0]) == length, dataset.name
        assert file["fields/u"].dims[1][0] == file["fields/t"]
        assert file["metrics/train/loss"].dims[0][0] == file["metrics/train/iteration"]
        assert "mean squared" not in file["metrics/train/loss"].attrs["long_name"]
        assert "test set grid" in file["metrics/validation/relative_l2_grid"].attrs["long_name"]
    assert read_fields(path) and not any(name.startswith("fields") for name in record.series)


def test_a_label_or_an_override_that_changes_nothing_is_no_new_run(config, tmp_path, capsys):
    results = tmp_path / "results"
    run(config, results)
    changes = ["variants.adam.label=Adam again", "variants.adam_aadl.problem={num_points: 32}"]
    capsys.readouterr()
    assert run(config, results, *(text for change in changes for text in ("--set", change))) == 0
    assert "0 of 4 runs to do" in capsys.readouterr().err
    record = read_run(results / "burgers_2d" / "test" / "adam" / "seed-1.h5")
    assert record.attributes["label"] == record.config["variant"]["label"] == "Adam again"
    run(config, results, "--set", "baseline=adam_aadl", "--set", "variants=adam_aadl")
    assert "0 of 2 runs to do" in capsys.readouterr().err
    record = read_run(results / "burgers_2d" / "test" / "adam_aadl" / "seed-1.h5")
    assert record.attributes["baseline"] == "adam_aadl"  # brought up to date without a run
    run(config, results, "--set", "variants.adam_aadl.problem={num_points: 16}")
    assert "2 of 4 runs to do" in capsys.readouterr().err


def test_a_run_with_a_time_limit_tells_its_progress_by_time(monkeypatch, capsys):
    seconds = iter(range(10**6))
    monkeypatch.setattr("experiments.training.clock.time.perf_counter", lambda: next(seconds))
    limited = pinn_run(training={"iterations": 10**6, "evaluate_every": 1, "max_seconds": 60})
    problem = build(limited, Ranks())
    optimizer = torch.optim.Adam(problem.model.parameters())
    result = train(problem, [Stage(optimizer)], Ranks(), show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert result.stop_reason == "time" and len(result.iterations) > 11
    assert 5 <= len(lines) <= 10 and all("/1000000 iterations, " in line and "loss " in line for line in lines)


@pytest.mark.slow
def test_a_run_is_the_same_twice_and_in_worker_processes(tmp_path):
    experiment = parse_config(copy.deepcopy(PINN) | {"seeds": [3]})
    for name, jobs in (("one", 1), ("two", 2)):
        execute.execute_experiment(experiment, Ranks(), tmp_path / name, num_jobs=jobs)
    for path in (tmp_path / "one").rglob("*.h5"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert (read_run(path).series[LOSS] == read_run(other).series[LOSS]).all()


def test_a_single_run_tells_loss_error_and_speed(config, tmp_path, capsys):
    run(config, tmp_path / "results", "--set", "seeds=0", "--set", "variants=adam")
    lines = capsys.readouterr().err.splitlines()
    [last] = [line for line in lines if line.startswith("12/12 iterations")]
    assert "iterations/s" in last and "loss " in last and "error " in last
    assert lines[-1].startswith("next: python -m experiments summarize")


def test_a_degenerate_equation_is_named_in_every_output(tmp_path, capsys):
    raw = copy.deepcopy(PINN) | {"experiment": "burgers_100d", "seeds": [0]}
    raw["problem"] |= {"equation": "burgers_100d"}
    raw["variants"] = {"adam": raw["variants"]["adam"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert run(path, tmp_path / "results") == 0
    assert "degenerate" in capsys.readouterr().err
    (record,) = (tmp_path / "results").rglob("*.h5")
    assert "degenerate" in read_run(record).attributes["degenerate"]
    assert read_fields(record) == {}


def test_a_user_adds_an_equation_by_a_file(tmp_path, capsys):
    (tmp_path / "heat.py").write_text(HEAT)
    raw = copy.deepcopy(PINN) | {"experiment": "my_heat", "seeds": [0]}
    raw["problem"] |= {"equation": "heat.py", "options": {"diffusivity": 0.2}}
    path, results = tmp_path / "config.yaml", tmp_path / "results"
    path.write_text(yaml.safe_dump(raw))
    assert run(path, results, "--set", "variants=adam") == 0
    config = load_config(path, ["variants=adam"])
    (expanded,) = expand_runs(config)
    record = run_path(results, expanded)
    assert record == results / "my_heat" / "test" / "adam" / "seed-0.h5"
    assert (
        read_run(record).attributes["equation"] == "heat" and str(tmp_path) not in read_run(record).attributes["config"]
    )
    assert state_of(record, expanded, describe(expanded.problem).digest, 1) == "finished"
    (tmp_path / "heat.py").write_text(HEAT.replace("u.time -", "2 * u.time -"))
    assert state_of(record, expanded, describe(expanded.problem).digest, 1) == "changed"
    capsys.readouterr()
    assert run(path, results, "--set", "problem.options.diffusivity=-1") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "diffusivity must be > 0, got -1" in told and len(told.splitlines()) == 1
    assert run(path, results, "--set", "problem.conditions=hard") == 2
    assert "problem: conditions must be soft, because heat offers no lift" in capsys.readouterr().err
    assert run(path, results, "--set", "problem.equation=cold.py") == 2
    assert "cold.py" in capsys.readouterr().err


def test_an_equation_whose_conditions_yield_no_points_is_refused_before_training(tmp_path, capsys):
    """Soft conditions of which no point is drawn would not be trained, and nobody would see it."""
    (tmp_path / "heat.py").write_text(HEAT.replace("x = uniform[:, :1]", "x = uniform[:0, :1]"))
    raw = copy.deepcopy(PINN) | {"experiment": "my_heat", "seeds": [0]}
    raw["problem"] |= {"equation": "heat.py"}
    path, results = tmp_path / "config.yaml", tmp_path / "results"
    path.write_text(yaml.safe_dump(raw))
    assert run(path, results) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == (
        "error: equation Heat: conditions must yield points with soft conditions, got none for "
        "problem.num_conditions = 8, so that nothing would train them"
    )
    assert not list(results.rglob("*.h5"))
    (expanded,) = expand_runs(load_config(path, ["variants=adam"]))
    with pytest.raises(ValueError, match="conditions must yield points"):
        build(expanded, Ranks())


def test_values_that_do_not_fit_the_points_of_the_conditions_are_refused_before_training(tmp_path, capsys):
    (tmp_path / "heat.py").write_text(
        HEAT.replace("dim=1), torch.sin(math.pi * x)", "dim=1), torch.sin(math.pi * x)[:3]")
    )
    raw = copy.deepcopy(PINN) | {"experiment": "my_heat", "seeds": [0]}
    raw["problem"] |= {"equation": "heat.py"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert run(path, tmp_path / "results") == 2
    assert "conditions must return points (n, 2) and values (n, 1), got (" in capsys.readouterr().err
