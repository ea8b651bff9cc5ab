"""data_loaders.collocation: what each kind of points promises, and adaptive points where the residual is large."""

import math

import pytest
import torch

from data_loaders.collocation import KINDS, MAX_SOBOL_DIMENSION, adaptive_points, normal, uniform_points


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "dimension"), [(1, 1), (7, 3), (64, 2), (100, 100)])
def test_points_fill_the_unit_cube(kind, count, dimension):
    points = uniform_points(kind, count, dimension, 3)
    assert points.shape == (count, dimension) and points.dtype == torch.float64
    assert bool(((points >= 0) & (points < 1)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_points_depend_on_the_seed_and_on_nothing_else(kind):
    torch.manual_seed(0)
    points = uniform_points(kind, 64, 5, 1)
    state = torch.get_rng_state()
    torch.rand(3)
    other_state = torch.get_rng_state()
    assert torch.equal(uniform_points(kind, 64, 5, 1), points)
    assert torch.equal(torch.get_rng_state(), other_state) and not torch.equal(state, other_state)
    assert not torch.equal(uniform_points(kind, 64, 5, 2), points)


def test_latin_hypercube_has_one_point_a_stratum_and_random_points_do_not():
    def strata(kind):
        return (uniform_points(kind, 50, 4, 0) * 50).floor().sort(dim=0).values

    expected = torch.arange(50, dtype=torch.float64)[:, None].expand(50, 4)
    assert torch.equal(strata("latin_hypercube"), expected)
    assert not torch.equal(strata("random"), expected)


def test_columns_of_a_latin_hypercube_are_permuted_independently():
    points = uniform_points("latin_hypercube", 1000, 6, 0)
    off_diagonal = torch.corrcoef(points.T) - torch.eye(6, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.15  # five deviations


def test_sobol_points_estimate_a_smooth_integral_much_better():
    def error(kind):
        values = [(uniform_points(kind, 1024, 3, seed).cos().prod(dim=1)).mean() for seed in range(10)]
        return (torch.stack(values) - math.sin(1) ** 3).square().mean().sqrt()

    assert error("sobol") < 0.1 * error("latin_hypercube") < 0.1 * error("random")
    assert error("random") < 0.02  # they are right, too


def test_the_sobol_limit_itself_is_drawn_and_concerns_no_other_kind():
    assert uniform_points("sobol", 2, MAX_SOBOL_DIMENSION, 0).shape == (2, MAX_SOBOL_DIMENSION)
    assert uniform_points("random", 2, MAX_SOBOL_DIMENSION + 1, 0).shape == (2, MAX_SOBOL_DIMENSION + 1)


POOL = torch.linspace(0, 1, 10_000, dtype=torch.float64)[:, None]
PEAK = torch.where((POOL > 0.4) & (POOL < 0.6), 9.0, 0.0)  # mean 1.8


def share_at_the_peak(points):
    return float(((points > 0.4) & (points < 0.6)).to(torch.float64).mean())


def test_adaptive_points_follow_the_stated_density():
    # p ~ 9/1.8 + 1 = 6 on a fifth of the pool, 1 elsewhere: a share of 6/10.
    assert share_at_the_peak(adaptive_points(POOL, PEAK, 500, 0)) == pytest.approx(0.6, abs=0.07)
    two_levels = torch.where(PEAK > 0, 3.0, 1.0)  # mean 1.4: p ~ 3/1.4 + 1 = 22/7 on a fifth, 12/7 elsewhere
    assert share_at_the_peak(adaptive_points(POOL, two_levels, 500, 0)) == pytest.approx(22 / 70, abs=0.07)


def test_adaptive_points_are_different_rows_of_the_pool_drawn_by_the_seed():
    points = adaptive_points(POOL, PEAK, 3000, 0)
    assert points.unique().numel() == 3000 and bool(torch.isin(points, POOL).all())
    assert torch.equal(adaptive_points(POOL, PEAK, 3000, 0), points)
    assert not torch.equal(adaptive_points(POOL, PEAK, 3000, 1), points)
    assert adaptive_points(POOL, PEAK, len(POOL), 0).sort(dim=0).values.equal(POOL)


def test_adaptive_points_take_residuals_of_any_scale_and_sign():
    points = adaptive_points(POOL, PEAK, 500, 0)
    assert torch.equal(adaptive_points(POOL, -PEAK.double().flatten() * 2.0**600, 500, 0), points)
    zero = adaptive_points(POOL, torch.zeros(10_000), 500, 0)
    assert share_at_the_peak(zero) == pytest.approx(0.2, abs=0.07)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 8.3), (torch.float32, 5.5)])
def test_normal_is_finite_symmetric_and_has_the_deviation(dtype, largest):
    ends = normal(torch.tensor([0.0, 1.0], dtype=dtype), 2.0)
    assert ends[0] == -ends[1] and 2 * largest - 1 < ends[1] < 2 * largest
    x = normal(uniform_points("sobol", 4096, 2, 0).to(dtype), 0.5)
    assert float(x.std()) == pytest.approx(0.5, rel=0.01) and abs(float(x.mean())) < 0.005
