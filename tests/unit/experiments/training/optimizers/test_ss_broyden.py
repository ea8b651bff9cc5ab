"""SSBroyden: its update beside the textbook's, its line search, and what it does where a loss is not finite."""

import math

import numpy as np
import pytest
import torch
from least_squares import LeastSquares, rosenbrock

from experiments.training.optimizers import SSBroyden
from experiments.training.optimizers.line_search import ARMIJO
from experiments.training.optimizers.ss_broyden import self_scaled_update

SIZE = 8
FACTOR = (torch.diag(torch.logspace(-1, 2, SIZE, dtype=torch.float64)) + 0.5).sqrt()


def test_a_quadratic_takes_as_many_steps_as_it_has_dimensions():
    problem = LeastSquares(lambda w: FACTOR @ w, [1.0, -2.0, 3.0], [0.5, 1.5, -1.0, 2.0, -0.5])
    optimizer = SSBroyden(problem.parameters, max_iter=1, curvature=1.01 * ARMIJO)  # searches that are nearly exact
    losses = [float(optimizer.step(problem)) for _ in range(SIZE)]
    assert losses[0] > 10 and losses[-1] > 1e-6 and problem.loss() < 1e-9 * losses[-1]
    assert (np.diff(losses) < 0).all()


def textbook(hessian, s, y):
    """The update of the Hessian B, by the direct formulas of the self-scaled Broyden family."""
    image, product = hessian @ s, y @ s
    b, h = s @ image / product, y @ torch.linalg.solve(hessian, y) / product
    a = b * h - 1
    low = torch.minimum(torch.ones(()), h * (1 - (a / (1 + a)).sqrt()))
    theta = torch.maximum((low - 1) / a, torch.minimum(1 / low, (1 - b) / b))
    sigma = 1 + theta * a
    power = sigma ** (-1 / (len(s) - 1))
    tau = torch.minimum(torch.ones(()), 1 / b)
    tau = tau * torch.minimum(power, 1 / theta) if theta > 0 else torch.minimum(tau * power, sigma)
    w = (s @ image).sqrt() * (y / product - image / (s @ image))
    kept = hessian - torch.outer(image, image) / (s @ image) + theta * torch.outer(w, w)
    return tau * kept + torch.outer(y, y) / product


def test_the_inverse_is_that_of_the_textbook_along_a_run():
    problem = LeastSquares(rosenbrock, [-1.2, 1.0, -0.5], [0.8, 1.3])
    optimizer = SSBroyden(problem.parameters, max_iter=1)
    hessian = torch.eye(5, dtype=torch.float64)
    for step in range(25):
        before, gradient = problem.vector(), problem.gradient()
        optimizer.step(problem)
        s, y = problem.vector() - before, problem.gradient() - gradient
        direction = -torch.linalg.solve(hessian, gradient)
        assert float(direction @ s / (direction.norm() * s.norm())) > 1 - 1e-9, step
        hessian = textbook(hessian, s, y)
        inverse = optimizer.state[problem.parameters[0]]["inverse_hessian"]
        torch.testing.assert_close(inverse @ hessian, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_the_update_satisfies_the_secant_equation_and_stays_positive(ratio):
    torch.manual_seed(0)
    for size in (1, 2, 6):
        factor = torch.randn(size, size, dtype=torch.float64)
        inverse = factor @ factor.T + torch.eye(size, dtype=torch.float64)
        s = torch.randn(size, dtype=torch.float64)
        curvature = float(s @ torch.linalg.solve(inverse, s))
        y = ratio * torch.linalg.solve(inverse, s) + 0.1 * s
        self_scaled_update(inverse, s, y, curvature)
        torch.testing.assert_close(inverse @ y, s, rtol=1e-9, atol=1e-9)
        assert float(torch.linalg.eigvalsh(inverse)[0]) > 0


def test_the_steps_meet_the_wolfe_conditions_and_find_the_minimum():
    problem = LeastSquares(rosenbrock, [-1.2, 1.0] * 3)
    optimizer = SSBroyden(problem.parameters, max_iter=1)
    for _ in range(200):
        before, loss, slope = problem.vector(), problem.loss(), problem.gradient()
        optimizer.step(problem)
        s = problem.vector() - before
        if loss < 1e-20:
            break
        assert problem.loss() <= loss + ARMIJO * float(slope @ s) and float(slope @ s) < 0
        assert abs(float(problem.gradient() @ s)) <= 0.9 * abs(float(slope @ s)) * (1 + 1e-9)
    torch.testing.assert_close(problem.vector(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("max_eval", [1, 2, 3, 7])
def test_the_evaluations_of_a_step_are_bounded(max_eval):
    problem = LeastSquares(rosenbrock, [-1.2, 1.0] * 3)
    optimizer = SSBroyden(problem.parameters, max_eval=max_eval)
    for step in range(1, 30):
        problem.calls, loss = 0, problem.loss()
        optimizer.step(problem)
        assert 1 <= problem.calls <= max_eval and problem.loss() <= loss
        assert step < 5 or max_eval == 1 or problem.loss() < 1000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_stepped_to(value):
    problem = LeastSquares(lambda w: torch.where(w > 0.9, value, 1.0) * (w - 1.5), [0.0])
    optimizer = SSBroyden(problem.parameters)
    for _ in range(5):
        optimizer.step(problem)
    assert 0.1 < float(problem.vector()) <= 0.9
    problem = LeastSquares(lambda w: w * value, [1.0, 2.0])
    assert not bool(SSBroyden(problem.parameters).step(problem).isfinite())
    assert problem.vector().tolist() == [1.0, 2.0]


def test_an_approximation_that_leads_nowhere_is_dropped():
    problem = LeastSquares(rosenbrock, [-1.2, 1.0])
    optimizer = SSBroyden(problem.parameters, max_iter=2)
    optimizer.step(problem)
    optimizer.state[problem.parameters[0]]["inverse_hessian"] = -torch.eye(2, dtype=torch.float64)
    loss = problem.loss()
    optimizer.step(problem)
    assert problem.loss() < loss
