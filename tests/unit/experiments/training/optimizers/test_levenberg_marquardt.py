"""Levenberg-Marquardt: its step, its damping, and what it does where no trial succeeds."""

import itertools
import math

import pytest
import torch
from least_squares import LeastSquares, rosenbrock
from torch import nn

from experiments.training.optimizers import LevenbergMarquardt
from experiments.training.optimizers.levenberg_marquardt import LARGEST_DAMPING


class Script:
    """Closure: the linear model r = 1, J = 1, and a trial loss for each gain ratio of the script, in turn.

    With damping 1 the step is -1/2, the predicted decrease 3/4.
    """

    def __init__(self, *ratios, damping=1.0):
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.ratios, self.damping, self.trials = list(ratios), damping, []

    def linearize(self):
        return torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def residuals(self):
        ratio = self.ratios[len(self.trials)]
        self.trials.append(float(self.weight.detach()))
        update = -1 / (1 + self.damping)
        loss = 1 - ratio * (1 - (1 + update) ** 2)
        return torch.tensor([loss], dtype=torch.float64).sqrt()


TIMES = torch.linspace(0, 3, 20, dtype=torch.float64)
DECAY = torch.tensor([2.0, 1.5, 0.5], dtype=torch.float64)


def decay(w):
    return w[0] * torch.exp(-w[1] * TIMES) + w[2]


def wide(w):
    """4 residuals of 9 parameters."""
    return torch.stack([torch.sin(w[i] * w[i + 1]) + w[i + 5] ** 2 - 0.3 * i for i in range(4)])


@pytest.mark.parametrize(
    ("problem", "solution", "steps"),
    [
        (LeastSquares(lambda w: decay(w) - decay(DECAY), [1.0, 0.3], [0.0]), DECAY.tolist(), 15),
        (LeastSquares(rosenbrock, [-1.2], [1.0]), [1.0, 1.0], 30),
    ],
)
def test_it_finds_the_solution_and_the_loss_never_rises(problem, solution, steps):
    optimizer = LevenbergMarquardt(problem.parameters)
    losses = [*(float(optimizer.step(problem)) for _ in range(steps)), problem.loss()]
    assert all(later <= sooner for sooner, later in itertools.pairwise(losses))
    assert problem.vector().tolist() == pytest.approx(solution, abs=1e-7) and losses[0] > 0.1


@pytest.mark.parametrize("padding", [0, 7], ids=["fewer residuals", "more residuals"])
def test_the_step_solves_the_damped_normal_equations_in_both_forms(padding):
    problem = LeastSquares(
        lambda w: torch.cat([wide(w), w.new_zeros(padding)]), [0.3, -0.7, 1.1, 0.4, -0.2, 0.9, 0.1, -1.3, 0.6]
    )
    start, (residuals, jacobian) = problem.vector(), problem.linearize()
    assert jacobian.shape == (4 + padding, 9)
    LevenbergMarquardt(problem.parameters, damping=0.05).step(problem)
    damped = jacobian.T @ jacobian + 0.05 * torch.eye(9, dtype=torch.float64)
    update = torch.linalg.solve(damped, -jacobian.T @ residuals)
    assert update.norm() > 0.1 and torch.allclose(problem.vector(), start + update, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("ratio", "factor"), [(0.76, 1 / 3), (0.74, 1.0), (0.26, 1.0), (0.24, 2.0)])
def test_the_damping_follows_the_gain_ratio(ratio, factor):
    script = Script(ratio)
    optimizer = LevenbergMarquardt([script.weight], damping=1.0)
    assert float(optimizer.step(script)) == 1.0
    assert optimizer.param_groups[0]["damping"] == pytest.approx(factor)
    assert script.trials == [pytest.approx(-0.5)] and float(script.weight.detach()) == script.trials[0]


@pytest.mark.parametrize("failure", [-1.0, math.nan, -math.inf, 0.0])
def test_the_damping_rises_until_the_loss_falls(failure):
    script = Script(failure, failure, 0.2, damping=16.0)  # the script's predictions are those of the third trial
    optimizer = LevenbergMarquardt([script.weight], damping=1.0)
    optimizer.step(script)
    assert script.trials == pytest.approx([-1 / 2, -1 / 5, -1 / 17])
    assert float(script.weight.detach()) == script.trials[-1]
    assert optimizer.param_groups[0]["damping"] == pytest.approx(2 * 16.0)


def test_the_weights_are_put_back_when_no_trial_succeeds():
    script = Script(*[-1.0] * 5)
    script.weight.data.fill_(0.1)
    optimizer = LevenbergMarquardt([script.weight], damping=1.0, max_trials=3)
    assert float(optimizer.step(script)) == 1.0
    assert len(script.trials) == len(set(script.trials)) == 3 and 0.1 not in script.trials
    assert float(script.weight.detach()) == 0.1
    assert optimizer.param_groups[0]["damping"] == 4.0**3  # where the next step goes on
    optimizer.param_groups[0]["damping"] = 2 * LARGEST_DAMPING
    optimizer.step(script)
    assert len(script.trials) == 4 and float(script.weight.detach()) == 0.1
    assert optimizer.param_groups[0]["damping"] == 1.0  # the first one: other points may go better


@pytest.mark.parametrize(("damping", "max_trials"), [(1e-18, 20), (1e-2, 1)])
def test_a_damping_that_is_too_small_is_raised_step_by_step(damping, max_trials):
    problem = LeastSquares(rosenbrock, [-1.2, 1.0])
    optimizer = LevenbergMarquardt(problem.parameters, damping=damping, max_trials=max_trials)
    for _ in range(100):
        optimizer.step(problem)
    assert torch.allclose(problem.vector(), torch.ones(2, dtype=torch.float64), atol=1e-8)


def test_other_points_are_learned_after_convergence():
    jacobian = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]], dtype=torch.float64)
    problem = LeastSquares(lambda w: jacobian @ w - 1, [0.0, 0.0])
    optimizer = LevenbergMarquardt(problem.parameters)
    for _ in range(60):  # far beyond the last digit
        optimizer.step(problem)
    target = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    problem.residuals_of = lambda w: jacobian @ w - target
    for _ in range(15):
        optimizer.step(problem)
    assert torch.allclose(problem.vector(), torch.linalg.lstsq(jacobian, target).solution, rtol=1e-6)


def test_a_matrix_without_a_factor_is_damped_and_not_tried():
    weight, trials = nn.Parameter(torch.zeros(2)), []

    class Singular:
        def linearize(self):
            return torch.ones(2), torch.full((2, 2), 1e4)

        def residuals(self):
            trials.append(weight.detach().clone())
            return torch.ones(2) + 1e4 * weight.detach().sum()

    optimizer = LevenbergMarquardt([weight], damping=1e-3)
    optimizer.step(Singular())
    assert optimizer.param_groups[0]["damping"] > 1e-2
    assert len(trials) >= 1 and weight.isfinite().all() and float(Singular().residuals().norm()) < 0.1


def test_a_loss_that_is_nan_is_returned_and_the_weights_stay():
    problem = LeastSquares(lambda w: w * math.nan, [1.0, 2.0])
    optimizer = LevenbergMarquardt(problem.parameters, damping=0.5)
    assert math.isnan(float(optimizer.step(problem)))
    assert problem.vector().tolist() == [1.0, 2.0] and optimizer.param_groups[0]["damping"] == 0.5


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_jacobian_that_is_not_finite_is_not_tried(entry):
    script = Script()
    script.linearize = lambda: (torch.ones(1).double(), torch.full((1, 1), entry).double())
    LevenbergMarquardt([script.weight]).step(script)
    assert script.trials == [] and float(script.weight.detach()) == 0.0


def test_the_weights_stay_in_their_memory():
    """Hooks of others, aadl's among them, see the same tensors after each step, also after one that goes back."""
    problem = LeastSquares(rosenbrock, [-1.2], [1.0])
    optimizer = LevenbergMarquardt(problem.parameters, max_trials=1)
    places = [p.data_ptr() for p in problem.parameters]
    vectors = []
    for _ in range(4):
        optimizer.step(problem)
        vectors.append(problem.vector())
    assert [p.data_ptr() for p in problem.parameters] == places and not torch.equal(vectors[0], vectors[-1])
