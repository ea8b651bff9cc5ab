"""Physics-informed networks: the loss by every route, the points, and mistakes in a configuration."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from by_autograd import residual_and_slope, solution
from suite_cases import PINN, build, pinn_run
from torch.nn.utils import parameters_to_vector

from experiments.catalog import load_config, parse_config
from experiments.distributed.ranks import Ranks
from experiments.pinn.problem import describe
from experiments.runs.config import expand_runs

LOSS = "metrics/train/loss"
ADAM = {"name": "Adam", "lr": 1e-2}
SGD = {"name": "SGD", "lr": 1e-3}
LBFGS = {"name": "LBFGS", "max_iter": 4, "line_search_fn": "strong_wolfe"}


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


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["problem", "equation"], "burger", r"problem: equation must be one of burgers_2d, .*got 'burger'"),
        (["problem", "options"], {"nu": -1.0}, r"problem: nu must be .*-1"),
        (["problem", "options"], {"nu": 0}, r"problem: nu must be"),
        (["problem", "options"], {"mu": 1.0}, r"problem: options do not fit equation Burgers2d: .*'mu'; it takes nu"),
        (["problem", "options"], [1], r"problem\.options must be a mapping, got \[1\]"),
        (["problem", "folder"], "x", r"unknown key problem\.folder"),
        (["problem", "hidden_sizes"], [], r"problem\.hidden_sizes must have at least 1 item, got \[\]"),
        (["problem", "hidden_sizes"], [6, 0], r"problem\.hidden_sizes\[1\] must be greater than 0, got 0"),
        (["problem", "activation"], "relu", r"problem\.activation must be one of tanh, .*got 'relu'"),
        (["problem", "num_points"], 0, r"problem\.num_points must be greater than 0, got 0"),
        (["problem", "num_conditions"], 0, r"problem: num_conditions must be an integer >= 1 with soft conditions"),
        (["problem", "adaptive_pool"], 100, r"problem: adaptive_pool must be null where resample_every is, got 100"),
        (["training", "epochs"], 3, r"unknown key training\.epochs; valid keys are: iterations \(default 2000\)"),
        (["training", "max_seconds"], 0, r"training\.max_seconds must be greater than 0, got 0"),
        (["studies"], {"batch_size": {"variant": "adam", "sizes": [8]}}, r"unknown key studies\.batch_size"),
        (["baseline"], "sgd", r"^baseline must be one of adam, adam_aadl, got 'sgd'"),
        (["variants", "adam", "baseline"], "sgd", r"adam\.baseline must be one of adam, adam_aadl, got 'sgd'"),
        (["variants", "adam", "problem"], {"points": 1}, r"unknown key variants\.adam\.problem\.points"),
        (["variants", "adam", "problem"], {"folder": "x"}, r"unknown key variants\.adam\.problem\.folder"),
        (["variants", "adam", "problem"], {"options": {"nu": -1}}, r"variants\.adam\.problem: nu must be"),
        (["variants", "adam", "training"], {"iterations": 0}, r"variants\.adam\.training\.iterations must be"),
        (["variants", "adam", "then"], {"optimizer": ADAM}, r"variants\.adam\.then\.after is missing"),
        (["variants", "adam", "then"], {"after": 5}, r"variants\.adam\.then\.optimizer is missing"),
        (["variants", "adam", "then"], {"after": 12, "optimizer": ADAM}, r"then\.after must be below the 12"),
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
