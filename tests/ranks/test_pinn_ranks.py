"""Collocation points over several ranks: one loss, one gradient, the same weights everywhere."""

import pytest
import torch
from suite_cases import build, pinn_run
from torch.nn.utils import parameters_to_vector

import aadl
from experiments.distributed.ranks import Ranks
from experiments.training.stage import make_stages
from experiments.training.train import Training, train

ADAM = {"name": "Adam", "lr": 1e-2}
SETTINGS = {"dtype": "float64", "num_points": 33, "num_conditions": 9, "condition_weight": 2.0}  # odd, for 2 ranks
EAGER = {"store_each_nth": 1, "frequency": 2, "wait_iterations": 0, "safeguard": "loss"}


def _loss_and_gradient(rank, world_size, settings):
    problem = build(pinn_run(**settings), Ranks(rank=rank, world_size=world_size))
    points = problem.points(problem.model, 0)
    loss = float(problem.backward(problem.model, points))
    gradient = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    with torch.no_grad():
        evaluated = problem.evaluate(problem.model)
        local = float(problem.loss(problem.model, points))
    return loss, gradient, evaluated, local, len(points.interior)


@pytest.mark.parametrize("more", [{}, {"conditions": "hard", "num_conditions": 0}, {"num_points": 1}])
def test_loss_and_gradient_do_not_depend_on_the_number_of_ranks(spawn_ranks, more):
    settings = SETTINGS | more
    alone = _loss_and_gradient(0, 1, settings)
    first, second = spawn_ranks(_loss_and_gradient, 2, settings)
    assert first[4] + second[4] == alone[4] and first[4] - second[4] in (0, 1)
    for own in (first, second):
        assert own[0] == pytest.approx(alone[0], rel=1e-12)
        assert torch.allclose(own[1], alone[1], rtol=1e-10, atol=1e-14)
        assert own[2] == pytest.approx(alone[2], rel=1e-12)
    assert torch.equal(first[1], second[1])
    assert (first[3] + second[3]) / 2 == pytest.approx(alone[0], rel=1e-12)
    assert first[3] != pytest.approx(second[3], rel=1e-3)  # the ranks do have different points


def _train_rank(rank, world_size, variant, settings):
    torch.manual_seed(rank)  # the build sets the seed itself
    ranks = Ranks(rank=rank, world_size=world_size)
    config = pinn_run(variant, {"iterations": 24, "evaluate_every": 6}, resample_every=12, **settings)
    problem = build(config, ranks)
    (stage,) = make_stages(problem, config.variant)
    result = train(Training(problem, [stage], ranks))
    accepted = 0
    if config.variant.acceleration is not None:
        accepted = aadl.accelerator_of(stage.optimizer).statistics["accepted"]
    weights = parameters_to_vector(problem.model.parameters()).detach()
    return weights, result.series["metrics/train/loss"], result.iterations, accepted, problem.points(problem.model, 24)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ({"optimizer": ADAM}, {}),
        ({"optimizer": ADAM}, {"adaptive_pool": 100}),
        ({"optimizer": {"name": "SGD", "lr": 0.1}, "acceleration": EAGER}, {}),
        ({"optimizer": {"name": "LBFGS", "max_iter": 3, "line_search_fn": "strong_wolfe"}}, {}),
    ],
)
def test_two_ranks_train_as_one(spawn_ranks, variant, settings):
    settings = SETTINGS | settings
    alone = _train_rank(0, 1, variant, settings)
    first, second = spawn_ranks(_train_rank, 2, variant, settings)
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all() and (first[2] == second[2]).all()
    assert first[2].tolist() == alone[2].tolist()
    assert torch.allclose(first[0], alone[0], rtol=1e-6, atol=1e-8)
    assert first[1] == pytest.approx(alone[1], rel=1e-6)
    assert first[3] == second[3] == alone[3] and (alone[3] > 0) == ("acceleration" in variant)
    assert alone[1][-1] < alone[1][0]
    whole = {tuple(row) for row in alone[4].interior.tolist()}
    parts = [{tuple(row) for row in own[4].interior.tolist()} for own in (first, second)]
    assert parts[0] | parts[1] == whole and not parts[0] & parts[1]


def _stop_rank(rank, world_size):
    ranks = Ranks(rank=rank, world_size=world_size)
    training = {"iterations": 10**6, "evaluate_every": 10**6, "max_seconds": 0.2 if rank == 0 else 0.01}
    config = pinn_run({"optimizer": ADAM}, training)
    problem = build(config, ranks)
    (stage,) = make_stages(problem, config.variant)
    result = train(Training(problem, [stage], ranks))
    return result.iterations.tolist(), result.stop_reason


def test_ranks_stop_together(spawn_ranks):
    first, second = spawn_ranks(_stop_rank, 2)
    assert first == second and first[1] == "time"
