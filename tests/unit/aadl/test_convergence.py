"""Iteration counts and iterates on model problems, against a textbook twin, GMRES and published tables."""

import math
import statistics

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from quadratics import quadratic, sgd, steps_to_tolerance
from reference_anderson import TextbookAnderson

import aadl

PURE = {"reg_acc": 0, "safeguard": False, "average": False}
"""Anderson acceleration and nothing else."""


def median_steps(kappa, acceleration=None, seeds=3, dtype=torch.float64, **options):
    problems = [quadratic(kappa, seed, dtype=dtype) for seed in range(seeds)]
    return statistics.median(steps_to_tolerance(problem, acceleration, **options) for problem in problems)


ARGUMENTS = ("history_depth", "store_each_nth", "frequency", "wait_iterations", "relaxation")
SCHEDULES = [
    (3, 1, 1, 0, 1.0),
    (5, 1, 1, 1, 0.5),
    (5, 1, 3, 0, 1.0),
    (4, 1, 2, 8, 1.0),
    (4, 3, 3, 0, 1.0),
    (4, 3, 7, 10, 0.7),
    (3, 4, 6, 0, 1.0),
    (6, 2, 5, 12, 1.0),
    (3, 5, 3, 0, 0.3),
]


def beside_the_twin(schedule, curvature, steps=40, **changes):
    """Iterates of the library and of the twin on x - 0.9 (A (x - x*) + curvature sin(x - x*)), and the two of them."""
    problem = quadratic(30.0, seed=0, size=20)

    def gradient(x):
        return problem.gradient(x) + curvature * torch.sin(x - problem.solution)

    x, optimizer = sgd(problem, schedule | PURE | changes, lr=0.9)
    twin = TextbookAnderson(
        lambda v: v - 0.9 * gradient(torch.from_numpy(v)).numpy(), problem.solution.numpy() * 0, **schedule
    )
    iterates = []
    for _ in range(steps):
        x.grad = gradient(x.detach())
        optimizer.step()
        twin.advance()
        iterates.append((x.detach().numpy().copy(), twin.x))
    fast, slow = (np.array(side) for side in zip(*iterates, strict=True))
    return fast, slow, aadl.accelerator_of(optimizer).statistics, twin


@pytest.mark.parametrize("curvature", [0.0, 0.1])
@pytest.mark.parametrize("values", SCHEDULES, ids=str)
def test_the_iterates_are_those_of_the_textbook(values, curvature):
    """Normal equations in float64 are good to 1e-16 kappa^2, and kappa(DF) stays below 1e4: 1e-8 of |x*| = 4."""
    schedule = dict(zip(ARGUMENTS, values, strict=True))
    fast, slow, counts, twin = beside_the_twin(schedule, curvature)
    assert counts["accepted"] == len(twin.accelerations) >= 3 and counts["rejected"] == {}
    assert counts["macro_steps"] == 40 // schedule["store_each_nth"]
    assert np.abs(fast - slow).max() < 4e-8
    for name, value in [("frequency", 2 * schedule["store_each_nth"] + 1), ("history_depth", 2), ("relaxation", 0.9)]:
        if name != "frequency" or math.ceil(value / schedule["store_each_nth"]) != twin.period:
            other = beside_the_twin(schedule, curvature, **{name: value})[0]
            assert np.abs(other - slow).max() > 4e-6


@pytest.mark.parametrize(
    ("store_each_nth", "frequency", "wait_iterations", "expected"),
    [
        (1, 1, 0, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),  # the first pair makes no column
        (1, 1, 5, [6, 7, 8, 9, 10, 11, 12]),
        (1, 5, 0, [5, 10]),
        (1, 5, 5, [10]),
        (3, 7, 0, [9]),  # ceil(7 / 3) = 3 macro-steps
        (3, 6, 0, [6, 12]),
        (3, 2, 0, [6, 9, 12]),
        (3, 3, 6, [9, 12]),
        (4, 1, 11, [12]),
    ],
)
def test_when_it_accelerates(store_each_nth, frequency, wait_iterations, expected):
    schedule = {"store_each_nth": store_each_nth, "frequency": frequency, "wait_iterations": wait_iterations}
    problem = quadratic(30.0, seed=0, size=20)
    x, optimizer = sgd(problem, schedule | PURE | {"history_depth": 4}, lr=0.9)
    twin = TextbookAnderson(lambda v: 0.5 * v, np.ones(2), history_depth=4, **schedule)
    moved = []
    for step in range(1, 13):
        x.grad = problem.gradient(x.detach())
        plain = x.detach() - 0.9 * x.grad
        optimizer.step()
        twin.advance()
        if not torch.allclose(x, plain, rtol=0, atol=1e-9):
            moved.append(step)
    assert moved == expected == twin.accelerations


def rotation(size, seed):
    """Matrix I - 0.9 Q with a random orthogonal Q, for which GMRES gains little before the last iteration."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return torch.eye(size, dtype=torch.float64) - 0.9 * turn


def iterates_on(matrix, solution, steps, lr=1.0, **acceleration):
    """x_1 .. x_steps of the accelerated map x - lr (A x - b), started at zero."""
    every_step = {"history_depth": len(solution), "store_each_nth": 1, "frequency": 1, "wait_iterations": 0}
    x = torch.nn.Parameter(torch.zeros_like(solution))
    optimizer = aadl.accelerate(torch.optim.SGD([x], lr=lr), **(every_step | PURE | acceleration))
    iterates = []
    for _ in range(steps):
        x.grad = matrix @ (x.detach() - solution)
        optimizer.step()
        iterates.append(x.detach().clone())
    return iterates


def mapped_gmres(matrix, solution, iteration, lr=1.0):
    """G of the iterate x_iteration of GMRES started at zero."""
    right, x = (matrix @ solution).numpy(), np.zeros(len(solution))
    if iteration:
        x, _ = scipy.sparse.linalg.gmres(matrix.numpy(), right, rtol=0, atol=0, restart=iteration, maxiter=1)
    x = torch.from_numpy(x)
    return x - lr * matrix @ (x - solution)


@pytest.mark.parametrize("size", [8, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_full_window_stands_in_the_relation_of_walker_and_ni_to_gmres(size, seed):
    """x_{k+1} = G(x_k of GMRES), Walker and Ni (2011), theorem 2.2; so n + 1 maps solve a map of dimension n."""
    matrix, solution = rotation(size, seed), torch.randn(size, dtype=torch.float64)
    iterates = iterates_on(matrix, solution, size + 1)
    for k, x in enumerate(iterates):
        assert (x - mapped_gmres(matrix, solution, k)).norm() < 1e-8 * solution.norm()
        if 0 < k < size:  # neither the neighbor in time nor the solution already
            assert (x - mapped_gmres(matrix, solution, k - 1)).norm() > 1e-5 * solution.norm()
            assert (x - solution).norm() > 1e-5 * solution.norm()
    assert (iterates[size] - solution).norm() < 1e-8 * solution.norm()


TABLE = {1e3: {1: 686, 2: 159, 3: 157, 5: 181, 10: 441}, 1e4: {1: 2955, 2: 375, 3: 390, 5: 441, 10: 2581}}
"""Iterations to 1e-6 by condition number and frequency: an independent implementation, depth 5, median of 3 seeds."""


def table_schedule(frequency):
    return PURE | {"history_depth": 5, "store_each_nth": 1, "frequency": frequency, "wait_iterations": 0}


@pytest.mark.parametrize(
    ("kappa", "frequency"),
    [
        pytest.param(kappa, frequency, marks=() if TABLE[kappa][frequency] < 200 else pytest.mark.slow)
        for kappa in TABLE
        for frequency in TABLE[kappa]
    ],
)
def test_the_table_of_schedules(kappa, frequency):
    steps = median_steps(kappa, table_schedule(frequency))
    assert steps == pytest.approx(TABLE[kappa][frequency], rel=0.1)


HEAVY_BALL = {"history_depth": 5, "safeguard": "residual"}


@pytest.fixture(scope="module")
def plain_heavy_ball():
    return median_steps(1e3, momentum=0.9)


@pytest.mark.slow
def test_heavy_ball_takes_at_most_a_fraction_of_its_steps(plain_heavy_ball):
    """At store_each_nth 1 and frequency 5, with the default coupling."""
    schedule = HEAVY_BALL | {"store_each_nth": 1, "frequency": 5}
    steps = median_steps(1e3, schedule, momentum=0.9)
    assert 500 < plain_heavy_ball < 600 and 1.8 * steps <= plain_heavy_ball
    for safeguard, factor in (("residual", 1.15), (False, 1.3)):  # it saves the uncoupled run from the worst
        coupled, uncoupled = (
            median_steps(1e3, schedule | {"safeguard": safeguard, "state_coupling": coupling}, momentum=0.9, limit=1000)
            for coupling in ("full", "params")
        )
        assert uncoupled > factor * coupled  # momentum is part of the state


@pytest.mark.parametrize(
    ("store_each_nth", "multiple"),
    [
        pytest.param(store_each_nth, multiple, marks=() if store_each_nth * multiple == 10 else pytest.mark.slow)
        for store_each_nth in (1, 2, 5, 10, 20)
        for multiple in (1, 2, 3, 4, 5, 10)
    ],
)
def test_heavy_ball_is_never_slower_than_plain(store_each_nth, multiple, plain_heavy_ball):
    schedule = {"store_each_nth": store_each_nth, "frequency": store_each_nth * multiple}
    assert median_steps(1e3, HEAVY_BALL | schedule, momentum=0.9, limit=2000) <= plain_heavy_ball


@pytest.mark.parametrize(
    ("kappa", "momentum", "store_each_nth", "frequency"),
    [
        (1e3, 0.9, 10, 20),
        *(
            pytest.param(*settings, marks=pytest.mark.slow)
            for settings in [(1e3, 0, 1, 2), (1e3, 0, 1, 3), (1e3, 0, 1, 5), (1e3, 0.9, 1, 5), (1e4, 0.9, 10, 20)]
        ),
    ],
)
def test_a_bfloat16_history_of_float32_parameters_loses_little(kappa, momentum, store_each_nth, frequency):
    schedule = table_schedule(frequency) | {"store_each_nth": store_each_nth}
    full, half = (
        median_steps(kappa, schedule | {"history_dtype": dtype}, momentum=momentum, dtype=torch.float32, limit=3000)
        for dtype in (None, torch.bfloat16)
    )
    assert half <= 1.1 * full < math.inf
