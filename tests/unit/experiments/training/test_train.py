import math

import numpy as np
import pytest
import torch
from suite_cases import run_config

from experiments.admissions import problem as graduate_admissions
from experiments.distributed.ranks import Ranks
from experiments.models.mlp import MLP
from experiments.settings.kinds import Component
from experiments.training.averaging import moving_average
from experiments.training.components import make_optimizer
from experiments.training.epochs import Epochs
from experiments.training.plan import schedule_of
from experiments.training.problem import Problem
from experiments.training.stage import Stage
from experiments.training.train import Training, train
from experiments.training.updates import Updates

TRAIN = "metrics/train/loss"


class Quadratic(Problem):
    """Loss 0.5 c x^2 on every batch; evaluation reports x^2."""

    def __init__(self, curvature=1.0, num_batches=2, fail_at=None, epochs=3, scheduler=None):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        super().__init__(model, data_source="csv", data_digest="")
        self.curvature, self.num_batches, self.fail_at = curvature, num_batches, fail_at
        self.epochs, self.scheduler = epochs, scheduler

    def plan(self):
        return Epochs(self.batches, self.epochs, schedule_of(self.scheduler))

    def batches(self, epoch, first):
        return [(epoch, step) for step in range(first, self.num_batches)]

    def loss(self, network, batch):
        value = 0.5 * self.curvature * network(torch.ones(1, 1)).square().mean()
        return value * math.nan if batch == self.fail_at else value

    def evaluate(self, network):
        return {TRAIN: float(network(torch.ones(1, 1)).square().mean())}


def run(problem, lr=0.1, **options):
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=lr)
    stage = Stage(optimizer, options.pop("statistics", None))
    return train(Training(problem, [stage], Ranks(), **options))


def test_the_loop_is_gradient_descent():
    result = run(Quadratic())
    assert np.allclose(result.series[TRAIN], 0.9 ** (4 * np.arange(4)), rtol=1e-5)
    assert result.num_steps == 6 and result.diverged_epoch is None
    assert result.series["metrics/train/minibatch_loss"][1] == pytest.approx(0.25 * (1 + 0.81))


def test_training_seconds_leave_the_evaluation_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("experiments.training.clock.time.perf_counter", lambda: clock[0])

    class Slow(Quadratic):
        def loss(self, network, batch):
            clock[0] += 1.0
            return super().loss(network, batch)

        def evaluate(self, network):
            clock[0] += 100.0
            assert not network.training and not torch.is_grad_enabled()
            return super().evaluate(network)

    problem = Slow()
    result = run(problem)
    assert result.series["timing/training_seconds"].tolist() == [0, 2, 4, 6]
    assert problem.model.training


def test_a_loss_that_is_not_finite_ends_the_run():
    result = run(Quadratic(fail_at=(2, 1), epochs=5))
    assert result.diverged_epoch == 2
    assert len(result.series[TRAIN]) == 6 and np.isfinite(result.series[TRAIN][:2]).all()
    assert np.isnan(result.series[TRAIN][3:]).all()
    exploded = run(Quadratic(curvature=1e30, epochs=5))  # finite losses, weights that overflow
    assert exploded.diverged_epoch == 1


def test_scheduler_steps_once_an_epoch():
    scheduler = Component("ExponentialLR", {"gamma": 0.0})
    result = run(Quadratic(scheduler=scheduler))
    assert result.series[TRAIN][1] < 1 and result.series[TRAIN][1] == result.series[TRAIN][3]


def test_an_epoch_without_batches_is_refused():
    with pytest.raises(ValueError, match="epoch 1 has no batches, so that nothing is trained"):
        run(Quadratic(num_batches=0))


def test_moving_average_is_evaluated_and_never_written_back():
    problem, plain_problem = Quadratic(), Quadratic()
    averaged = run(problem, ema_decay=0.99)
    plain = run(plain_problem)
    assert torch.equal(problem.model.weight, plain_problem.model.weight)
    assert averaged.series[TRAIN][-1] > plain.series[TRAIN][-1]  # it lags behind
    average, weights = [torch.ones(1)], [torch.zeros(1)]
    moving_average(0.99)(average, weights, torch.tensor(1))
    assert average[0].item() == pytest.approx(2 / 11)  # a short memory at first
    moving_average(0.99)(average, [torch.ones(1)], torch.tensor(10_000))
    assert average[0].item() == pytest.approx(1 - 0.99 * 9 / 11)


def test_the_mean_of_the_last_epochs_is_evaluated_in_these_alone():
    averaged, plain = run(Quadratic(), mean_epochs=2).series[TRAIN], run(Quadratic()).series[TRAIN]
    assert averaged[:2].tolist() == plain[:2].tolist()
    weights = 0.9 ** np.arange(3, 7)  # after each of the last four steps
    assert averaged[2] == pytest.approx(weights[:2].mean() ** 2) and averaged[2] != plain[2]
    assert averaged[3] == pytest.approx(weights.mean() ** 2)


def test_seconds_of_an_acceleration_go_on_with_a_saved_run():
    def training():
        problem = Quadratic()
        return Training(problem, [Stage(torch.optim.SGD(problem.model.parameters()), seconds=lambda: 2.0)], Ranks())

    stopped, again = training(), training()
    again.load_state(*stopped.state())
    assert again.state()[0]["acceleration_seconds"] == 4.0  # two in each process


def test_statistics_become_series():
    counts = {"accepted": 0, "averaging": True, "relative_standard_deviation": math.nan, "rejected": {}, "note": "text"}

    def statistics():
        counts["accepted"] += 1
        if counts["accepted"] == 3:
            counts["rejected"] = {"loss": 2}
        return counts

    series = run(Quadratic(), statistics=statistics).series
    assert series["acceleration/accepted"].tolist() == [1, 2, 3, 4]
    assert series["acceleration/rejected_loss"].tolist() == [0, 0, 2, 2]
    assert series["acceleration/averaging"].tolist() == [1, 1, 1, 1]
    assert "acceleration/note" not in series


@pytest.mark.parametrize(
    ("updates", "expected"), [([1.0, 1.0, 1.0], 0.0), ([1.0, 3.0], 0.5), ([1.0, -0.5], 3.0), ([1.0], math.nan)]
)
def test_relative_standard_deviation_of_updates(updates, expected):
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    measure = Updates()
    for update in updates:
        measure.before(model)
        with torch.no_grad():
            model.weight += update
        measure.after(model)
    assert measure.relative_standard_deviation() == pytest.approx(expected, nan_ok=True, abs=1e-12)
    assert math.isnan(measure.relative_standard_deviation())  # of the next epoch, which has no update yet


def test_the_problem_is_set_by_its_seeds():
    def first_batch(config):
        problem = graduate_admissions.AdmissionsProblem(config, Ranks())
        weights = torch.nn.utils.parameters_to_vector(problem.model.parameters())
        return weights, next(iter(problem.batches(1)))[0], next(iter(problem.batches(2)))[0]

    one, same, other = (first_batch(run_config(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[1], one[2])
    assert not torch.equal(one[2], other[1])  # another seed is no other epoch


def test_features_are_standardized_by_the_training_set():
    problem = graduate_admissions.AdmissionsProblem(run_config(), Ranks())
    features = torch.cat([batch[0] for batch in problem.batches(1)])
    target = torch.cat([batch[1] for batch in problem.batches(1)])
    assert features.shape == (320, 7) and target.shape == (320, 1)
    assert features.mean(dim=0).abs().max() < 1e-5
    assert (features.std(dim=0, correction=0) - 1).abs().max() < 1e-5
    assert target.min() > 0.3 and target.max() < 1  # not scaled


def test_ranks_share_a_batch():
    config = run_config()
    whole = [batch[0] for batch in graduate_admissions.AdmissionsProblem(config, Ranks()).batches(1)]
    parts = [
        [batch[0] for batch in graduate_admissions.AdmissionsProblem(config, Ranks(rank=rank, world_size=2)).batches(1)]
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch[0::2], first) and torch.equal(batch[1::2], second)
    with pytest.raises(ValueError, match="a batch of 80 rows cannot be divided evenly among 3 ranks"):
        graduate_admissions.AdmissionsProblem(config, Ranks(world_size=3))


def _train_rank(rank, world_size):
    torch.manual_seed(rank)  # the build sets the seed itself
    config = run_config("sgd", epochs=2)
    ranks = Ranks(rank=rank, world_size=world_size)
    problem = graduate_admissions.AdmissionsProblem(config, ranks)
    optimizer = make_optimizer(config.variant.optimizer, problem.model.parameters())
    return train(Training(problem, [Stage(optimizer)], ranks)).series[TRAIN]


@pytest.mark.smoke
def test_two_ranks_train_as_one(spawn_ranks):
    alone = _train_rank(0, 1)
    first, second = spawn_ranks(_train_rank, 2)
    assert np.array_equal(first, second)
    assert np.allclose(first, alone, rtol=1e-4)
    assert alone[-1] < alone[0]


def test_mlp():
    model = MLP((7, 64, 64, 64, 1), "relu")
    assert sum(p.numel() for p in model.parameters()) == 7 * 64 + 64 + 2 * (64 * 64 + 64) + 64 + 1
    assert model(torch.zeros(5, 7)).shape == (5, 1)
    x = torch.randn(3, 7)
    by_hand = x
    for linear in model.linears[:-1]:
        by_hand = torch.relu(by_hand @ linear.weight.T + linear.bias)
    by_hand = by_hand @ model.linears[-1].weight.T + model.linears[-1].bias
    assert torch.allclose(model(x), by_hand, atol=1e-6)
    with pytest.raises(ValueError, match="sizes must be at least two integers"):
        MLP((7,))
    with pytest.raises(ValueError, match="activation must be one of tanh"):
        MLP((7, 1), "relus")
