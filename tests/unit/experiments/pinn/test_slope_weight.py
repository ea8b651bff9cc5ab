"""The weight 1 / (1 + |u_x|) of the residuals: exact, frozen between linearizations, and not in the recorded losses."""

import math

import pytest
import torch
from by_autograd import gradients, residual_and_slope, solution
from suite_cases import build, pinn_run
from torch.nn.utils import parameters_to_vector

from experiments.distributed.ranks import Ranks
from experiments.training.optimizers import LevenbergMarquardt
from experiments.training.stage import Stage
from experiments.training.train import Training, train

LM = {"optimizer": {"name": "LevenbergMarquardt"}}
LOSS = "metrics/train/loss"
NU = 0.02
CASES = [
    {"conditions": "soft"},
    {"conditions": "soft", "chunk_points": 7},
    {"conditions": "hard"},
    {"conditions": "hard", "chunk_points": 7},
    {"conditions": "hard", "num_conditions": 0},
]


def steep(slope_weight=True, **settings):
    """Problem and points; the weights are made larger, for slopes that differ."""
    settings = {"options": {"nu": NU}, "dtype": "float64", "condition_weight": 3.0} | settings
    problem = build(pinn_run(LM, slope_weight=slope_weight, **settings), Ranks())
    with torch.no_grad():
        for p in problem.model.parameters():
            p *= 2.0
    return problem, problem.points(problem.model, 0)


def book(model, points, is_hard, slopes=None):
    """Residuals by autograd, divided by 1 + |u_x| of `slopes`, None for the present ones; and the present u_x."""
    residual, slope = residual_and_slope(model, points, NU, is_hard)
    present = slope.detach()
    divisor = 1 + (present if slopes is None else slopes).abs()
    rows = [residual / divisor / math.sqrt(len(residual))]
    if len(points.conditions):
        error = solution(model, points.conditions, is_hard) - points.values
        rows.append(error * math.sqrt(3.0 / len(error)))
    return torch.cat(rows).squeeze(1), present


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("settings", CASES)
def test_residuals_are_divided_by_the_slopes_of_the_last_linearization(settings):
    problem, points = steep(**settings)
    model, is_hard = problem.model, settings["conditions"] == "hard"
    expected, slopes = book(model, points, is_hard)
    weights = 1 / (1 + slopes.abs())
    assert float(weights.max() / weights.min()) > 1.2
    residuals, jacobian = problem.linearize(model, points)
    assert torch.allclose(residuals, expected.detach(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.residuals(model, points), residuals, rtol=1e-10, atol=1e-14)
    for value, found in zip(expected, jacobian, strict=True):
        assert torch.allclose(parameters_to_vector(gradients(model, value)), found, rtol=1e-8, atol=1e-11)
    # An acceleration asks for the loss, and gets that of the weighted residuals.
    model.zero_grad()
    loss = problem.backward(model, points)
    assert float(loss) == pytest.approx(float(residuals.square().sum()), rel=1e-12)
    gradient = parameters_to_vector([p.grad for p in model.parameters()])
    assert torch.allclose(gradient, 2 * jacobian.T @ residuals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", CASES)
def test_slopes_are_frozen_between_linearizations(settings):
    problem, points = steep(**settings)
    model, is_hard = problem.model, settings["conditions"] == "hard"
    problem.linearize(model, points)
    _, slopes = book(model, points, is_hard)
    moved(model)
    frozen, fresh = (book(model, points, is_hard, which)[0].detach() for which in (slopes, None))
    assert not torch.allclose(frozen, fresh, rtol=1e-2)
    for _ in range(2):
        assert torch.allclose(problem.residuals(model, points), frozen, rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.linearize(model, points)[0], fresh, rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.residuals(model, points), fresh, rtol=1e-9, atol=1e-12)


def test_in_several_dimensions_the_slope_is_the_sum():
    settings = {"equation": "burgers_100d", "options": {"dimension": 4}}
    (weighted, points), (plain, _) = (steep(weight, **settings) for weight in (True, False))
    x = points.interior.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(weighted.model(x).sum(), x)
    divisor = 1 + gradient[:, :-1].sum(dim=1).abs()
    ours, theirs = (problem.linearize(problem.model, points) for problem in (weighted, plain))
    for found, reference in zip(ours, theirs, strict=True):
        expected = reference.clone()
        expected[: len(x)] /= divisor if expected.ndim == 1 else divisor[:, None]
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ours[0], theirs[0], rtol=1e-2)


def test_recorded_losses_are_without_the_weight():
    config = pinn_run(LM, {"iterations": 6, "evaluate_every": 3}, slope_weight=True, dtype="float64")
    problem, plain = build(config, Ranks()), build(pinn_run(LM, dtype="float64"), Ranks())
    optimizer = LevenbergMarquardt(problem.model.parameters())
    start = float(plain.loss(plain.model, plain.points(plain.model, 0)).detach())
    result = train(Training(problem, [Stage(optimizer)], Ranks()))
    points = problem.points(problem.model, 0)
    plain.model.load_state_dict(problem.model.state_dict())
    end = float(plain.loss(plain.model, points).detach())
    assert result.series[LOSS][[0, -1]] == pytest.approx([start, end], rel=1e-12)
    weighted = float(problem.residuals(problem.model, points).square().sum())
    assert weighted < 0.99 * end
    trained_plainly = train(Training(plain, [Stage(LevenbergMarquardt(plain.model.parameters()))], Ranks()))
    assert trained_plainly.series[LOSS][-1] < result.series[LOSS][-1]  # it goes on from there, without the weight


@pytest.mark.parametrize("name", ["Adam", "LBFGS", "MuonAdam"])
@pytest.mark.parametrize("by_variant", [False, True])
def test_the_slope_weight_needs_an_optimizer_that_linearizes(name, by_variant):
    message = (
        rf"variants\.one: problem\.slope_weight must be false for {name}, which does not linearize; "
        r"it must be an optimizer that does, as LevenbergMarquardt"
    )
    variant = {"optimizer": {"name": name}}
    pinn_run(variant, slope_weight=False)
    with pytest.raises(ValueError, match=message):
        if by_variant:
            pinn_run(variant | {"problem": {"slope_weight": True}})
        else:
            pinn_run(variant, slope_weight=True)
    assert pinn_run(LM | {"problem": {"slope_weight": True}}).problem.slope_weight
    with pytest.raises(ValueError, match=r"problem\.slope_weight must be true or false, got 1"):
        pinn_run(LM, slope_weight=1)
