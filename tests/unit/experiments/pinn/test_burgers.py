"""The solution of 2d Burgers against other quadratures, and the scale of the other problems."""

import math

import numpy as np
import pytest
import torch

from data_loaders.collocation import KINDS, uniform_points
from experiments.pinn.accuracy import solutions
from experiments.pinn.burgers import VISCOSITIES, Burgers2d, Burgers100d, TwoBody, cole_hopf

NU = 0.01 / math.pi


def trapezoid(points, nu):
    """u and u_x by the trapezoidal rule in z with 600 nodes, in extended precision, to 0.34 / sqrt(nu) + 9."""
    end = np.longdouble(0.34 / math.sqrt(nu) + 9)
    z = np.linspace(-end, end, 600, dtype=np.longdouble)
    pi = 4 * np.arctan(np.longdouble(1))
    x, t = np.split(points.numpy().astype(np.longdouble), 2, axis=1)
    y = pi * (x - z * np.sqrt(4 * np.longdouble(nu) * t))
    c = 1 / (2 * pi * np.longdouble(nu))
    exponent = -(z**2) - c * np.cos(y)
    p = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    mean = (p * np.sin(y)).sum(axis=1, keepdims=True)
    variance = (p * (np.sin(y) - mean) ** 2).sum(axis=1, keepdims=True)
    slope = -pi * ((p * np.cos(y)).sum(axis=1, keepdims=True) + c * variance)
    return tuple(torch.from_numpy(array.astype(np.float64)) for array in (-mean, slope))


def points_of_interest():
    """The layer in fine steps, the sides and times from 0 to 1."""
    x = torch.tensor(
        [-1, -0.7, -0.1, -0.01, -1e-3, 0, 1e-4, 3e-3, 0.02, 0.05, 0.3, 0.51, 0.999, 1], dtype=torch.float64
    )
    t = torch.tensor([0, 1e-6, 1e-3, 0.1, 0.25, 1 / math.pi, 0.51047, 0.75, 0.99, 1], dtype=torch.float64)
    return torch.cartesian_prod(x, t)


def solution_and_slope(points, nu):
    points = points.clone().requires_grad_()
    u = cole_hopf(points, nu)
    return u.detach(), torch.autograd.grad(u.sum(), points)[0][:, :1]


@pytest.mark.parametrize(
    "nu", [VISCOSITIES[1], 0.2, 0.051, 0.05, 0.031, 0.03, 0.01, NU, 0.005 / math.pi, 0.004 / math.pi, VISCOSITIES[0]]
)
def test_solution_and_slope_agree_with_another_quadrature(nu):
    points = points_of_interest()
    u, slope = solution_and_slope(points, nu)
    expected, expected_slope = trapezoid(points, nu)
    assert (u - expected).abs().max() < (1e-14 if nu >= 0.004 / math.pi else 5e-14)
    assert (slope - expected_slope).abs().max() < 1e-12 * expected_slope.abs().max()


def test_steepest_slope_is_the_published_one():
    def slope(t, nu=NU):
        return float(solution_and_slope(torch.tensor([[0.0, t]], dtype=torch.float64), nu)[1])

    assert slope(1.6037 / math.pi) == pytest.approx(-152.00516, abs=5e-6)
    assert slope(0.5105) < min(slope(0.505), slope(0.516))  # the steepest
    assert abs(slope(0.51, nu=0.01) + 152) > 100  # for this viscosity only


def test_initial_and_boundary_values_are_met_and_the_solution_is_odd():
    equation = Burgers2d()
    x, t = (
        torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None],
        torch.linspace(0, 1, 101, dtype=torch.float64)[:, None],
    )
    assert (equation.exact(torch.cat([x, 0 * t], 1)) + torch.sin(math.pi * x)).abs().max() < 1e-15
    for side in (-1.0, 1.0):
        assert equation.exact(torch.cat([torch.full_like(t, side), t], 1)).abs().max() < 1e-14
    u = equation.exact(torch.cat([x, t], 1))
    torch.testing.assert_close(u, -equation.exact(torch.cat([-x, t], 1)), rtol=0, atol=1e-14)
    assert u.abs().max() > 0.5


def test_grids_are_the_stated_ones():
    equation = Burgers2d()
    sets, (x, t) = equation.test_points(), equation.grid()
    assert list(sets) == ["grid", "graded"]
    assert sets["grid"].shape == (256 * 100, 2) and sets["graded"].shape == (1025 * 201, 2)
    assert (float(x[0]), float(x[-1]), float(t[0]), float(t[-1])) == (-1, 1, 0, 0.99)
    fields = sets["grid"].reshape(256, 100, 2)
    assert torch.equal(fields[:, 0, 0], x) and torch.equal(fields[0, :, 1], t)
    graded = sets["graded"].reshape(1025, 201, 2)[:, 0, 0]
    assert float(graded[512]) == 0 and float(graded[0]) == -float(graded[-1]) == pytest.approx(-1)
    assert float(graded.diff().min()) < 1e-4 < 1e-2 < float(graded.diff().max()) and bool((graded.diff() > 0).all())
    assert float(sets["graded"][:, 1].max()) == 1
    assert float(solutions(equation)["grid"][1].norm()) == pytest.approx(98.294, abs=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_of_2d_are_half_initial_and_half_boundary(kind):
    points, values = Burgers2d().conditions(uniform_points(kind, 400, 2, 0))
    x, t = points.split(1, dim=1)
    initial, left, right = (t == 0), (x == -1) & (t > 0), (x == 1) & (t > 0)
    assert bool((initial | left | right).all())
    torch.testing.assert_close(values, Burgers2d().exact(points), rtol=0, atol=1e-14)
    assert bool((values[~initial] == 0).all())
    assert float(x[initial].min()) < -0.9 and float(x[initial].max()) > 0.9 and float(t[left].max()) > 0.9
    if kind == "latin_hypercube":
        assert [int(part.sum()) for part in (initial, left, right)] == [200, 100, 100]


def test_interior_points_of_2d_fill_the_domain_or_gather_at_the_layer():
    uniform = uniform_points("sobol", 4096, 2, 0)
    plain = Burgers2d().sample(uniform)
    assert torch.equal(plain, torch.stack([2 * uniform[:, 0] - 1, uniform[:, 1]], 1))

    def near(graded):
        x = Burgers2d(graded=graded).sample(uniform)[:, 0]
        assert float(x.min()) < -0.97 and float(x.max()) > 0.97 and abs(float(x.mean())) < 0.01
        return float((x.abs() < 0.02).double().mean())

    # Of the law of x, |x| < 0.02 has the share asinh(0.02 / nu) / asinh(1 / nu) = 0.3935; of the uniform law 0.02.
    assert near(0.0) == pytest.approx(0.02, abs=2e-3)
    assert near(0.5) == pytest.approx(0.5 * 0.3935 + 0.01, abs=5e-3)
    assert near(1.0) == pytest.approx(0.3935, abs=5e-3)


@pytest.mark.parametrize("nu", [0, -0.01, 1e-4, 1.1, math.nan, math.inf, True, "0.01", None])
def test_viscosities_that_have_no_solution_here_are_refused(nu):
    with pytest.raises(ValueError, match=r"nu must be .*, got "):
        Burgers2d(nu)


@pytest.mark.parametrize("graded", [-0.1, 1.1, math.nan, False])
def test_shares_outside_the_unit_interval_are_refused(graded):
    with pytest.raises(ValueError, match=r"graded must be .*, got "):
        Burgers2d(graded=graded)


def relative_errors(equation):
    points, u = solutions(equation)["sobol"]
    assert points.shape == (10_000, equation.num_space + 1)
    return {name: float((f(points) - u).norm() / u.norm()) for name, f in equation.predictors().items()}


def test_two_body_solution_has_the_stated_scale_and_rivals():
    equation = TwoBody()
    u = solutions(equation)["sobol"][1]
    assert abs(float(u.mean())) < 0.01 and float(u.std()) == pytest.approx(0.63, abs=0.01)
    expected = {"zero": 1.0, "linear": pytest.approx(0.59, abs=0.01), "quadratic": pytest.approx(0.43, abs=0.01)}
    assert relative_errors(equation) == expected
    wide = relative_errors(TwoBody(deviation=1.0))
    assert wide == {"zero": 1.0, "linear": pytest.approx(0.74, abs=0.01), "quadratic": pytest.approx(0.65, abs=0.01)}


@pytest.mark.parametrize("dimension", [3, 10])
def test_two_body_rivals_are_the_least_squares_fits(dimension):
    equation = TwoBody(dimension, deviation=0.7)
    points = equation.sample(uniform_points("sobol", 2**16, dimension, 1))
    x, decay, u = points[:, :-1], torch.exp(-points[:, -1:]), equation.exact(points)
    table = decay * torch.cat([torch.ones_like(decay), x, x.square()], dim=1)
    for name, features in (("linear", table[:, :dimension]), ("quadratic", table)):
        fit = features @ torch.linalg.lstsq(features, u).solution
        best, found = float((fit - u).norm()), float((equation.predictors()[name](points) - u).norm())
        assert best < found < 1.001 * best
        torch.testing.assert_close(equation.predictors()[name](points), fit, rtol=0, atol=0.03)


@pytest.mark.slow
def test_test_points_in_many_dimensions_are_fewer():
    assert len(TwoBody(dimension=3355).test_points()["sobol"]) == 10_000
    points = TwoBody(dimension=10_000).test_points()["sobol"]
    assert points.shape == (3355, 10_000) and bool(points.isfinite().all())


def test_product_solution_is_degenerate_and_says_so():
    equation = Burgers100d()
    size = solutions(equation)["sobol"][1].abs()
    assert float(size.median()) < 1e-14 and "degenerate: |u| is about 8e-16" in equation.degenerate
    assert relative_errors(equation) == {"zero": 1.0}
    assert not TwoBody().degenerate


def test_product_solution_has_a_source_where_a_coordinate_is_one():
    points = torch.tensor([[1.0, 0.5, -0.3, 0.2], [1.0, -1.0, 0.3, 0.2], [1.0, 1.0, 1.0, 0.2]], dtype=torch.float64)
    moved = points + 1e-9
    equation = Burgers100d(4)
    assert bool(torch.isfinite(equation.source(points)).all())
    torch.testing.assert_close(equation.source(points), equation.source(moved), rtol=0, atol=1e-7)
    assert float(equation.source(points)[0]) != 0


def test_dimension_goes_to_the_sobol_limit_and_no_further():
    for equation in (TwoBody, Burgers100d):
        points = equation(dimension=1000).sample(uniform_points("sobol", 4, 1000, 0))
        assert points.shape == (4, 1000) and bool(torch.isfinite(equation(dimension=1000).exact(points)).all())
        with pytest.raises(ValueError, match="dimension must be less than or equal to 21201, got 21202"):
            equation(dimension=21_202)
        for wrong in (1, 100.0, True, "100"):
            with pytest.raises(ValueError, match=r"dimension must be (an integer|greater than or equal to \d), got "):
                equation(dimension=wrong)


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda value: TwoBody(amplitude=value), "amplitude"), (lambda value: TwoBody(deviation=value), "deviation")],
)
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1"])
def test_options_that_must_be_positive_are_checked(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got "):
        make(value)
