"""How a run is divided: what a problem of three methods gets of `Epochs` and `Iterations`."""

import pytest
import torch

from experiments.distributed.ranks import Ranks
from experiments.training.epochs import Epochs
from experiments.training.iterations import Iterations
from experiments.training.optimizers import LevenbergMarquardt
from experiments.training.problem import Problem
from experiments.training.stage import Stage
from experiments.training.train import Training, train

LOSS = "metrics/train/loss"
SEARCH = {"line_search_fn": "strong_wolfe", "max_iter": 9, "tolerance_grad": 0.0, "tolerance_change": 0.0}


class Valley(Problem):
    """A loss of two weights that is no quadratic; the batch is a factor."""

    def __init__(self, plan):
        model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
        torch.nn.init.ones_(model.weight)
        super().__init__(model, data_source="computed", data_digest="")
        self.make_plan = plan

    def plan(self):
        return self.make_plan(self)

    def loss(self, network, batch):
        a, b = network.weight[0]
        return batch * (a**4 + 10 * (b - a**2) ** 2)

    def evaluate(self, network):
        return {LOSS: float(self.loss(network, 1.0))}


def run(plan, *optimizers):
    """The result of a run; the optimizers are (first iteration, function of the parameters)."""
    problem = Valley(plan)
    stages = [Stage(make(problem.model.parameters()), after=after) for after, make in optimizers]
    return train(Training(problem, stages, Ranks()))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-3)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, **SEARCH)


def test_intervals_that_a_step_passes_over_have_no_entry():
    result = run(lambda _: Iterations(lambda *_: 1.0, 40, 2), (0, lbfgs))
    places = result.iterations.tolist()
    assert places[0] == 0 and places == sorted(set(places)) and len(places) < 20  # twenty intervals, fewer steps
    assert len(places) == result.num_steps + 1 and result.stop_reason == "iterations" and places[-1] >= 40
    assert all(len(values) == len(places) for values in result.series.values())


def test_an_optimizer_that_needs_residuals_is_refused_where_there_are_none():
    with pytest.raises(ValueError, match="Valley has no residuals, which the optimizer needs"):
        run(lambda _: Epochs(lambda *_: [1.0], 1), (0, LevenbergMarquardt))
