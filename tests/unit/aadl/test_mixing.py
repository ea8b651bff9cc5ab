import itertools
import math

import numpy as np
import pytest
import torch

from aadl.mixing import Gram, mixing_coefficients, newest, predicted_square, residual_squares, tail_sums, usable_suffix

CUTOFF = 1e-14


def gram_of(differences, residual):
    return Gram(differences.T @ differences, differences.T @ residual, float(residual @ residual))


def problem(columns=4, size=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    differences = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    residual = torch.randn(size, generator=generator, dtype=torch.float64)
    return differences, residual


def least_squares(differences, residual):
    return torch.from_numpy(np.linalg.lstsq(differences.numpy(), residual.numpy(), rcond=None)[0])


def solve(differences, residual, regularization=0.0, cutoff=CUTOFF):
    return mixing_coefficients(gram_of(differences, residual), regularization, cutoff)


def test_coefficients_solve_the_least_squares_problem():
    differences, residual = problem()
    mixing = solve(differences, residual)
    assert torch.allclose(mixing.gamma, least_squares(differences, residual), rtol=1e-12)
    assert not torch.allclose(mixing.gamma, -least_squares(differences, residual), rtol=0.1)
    assert mixing.numerical_rank == 4
    scales = differences.norm(dim=0)
    assert mixing.condition_number == pytest.approx(float(torch.linalg.cond(differences / scales)), rel=1e-9)
    assert mixing.coefficient_norm == pytest.approx(float((scales * mixing.gamma).norm() / residual.norm()), rel=1e-12)
    assert not mixing.mean.any()


def test_predicted_square_is_the_square_of_the_remainder():
    differences, residual = problem()
    gram = gram_of(differences, residual)
    for gamma in (torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5, 3.0]).double()):
        expected = float((residual - differences @ gamma).square().sum())
        assert predicted_square(gram, gamma) == pytest.approx(expected, rel=1e-12)
    inside = differences @ torch.ones(4, dtype=torch.float64)  # rounding may give a value just below zero
    assert 0 <= predicted_square(gram_of(differences, inside), torch.ones(4, dtype=torch.float64)) < 1e-12


def test_residuals_of_the_older_pairs_follow_from_the_gram_matrix():
    differences, residual = problem()
    residuals = [residual]
    for column in reversed(range(4)):
        residuals.insert(0, residuals[0] - differences[:, column])
    expected = torch.stack([f.square().sum() for f in residuals])
    assert residual_squares(gram_of(differences, residual)) == pytest.approx(expected.tolist(), rel=1e-12)
    stacked = torch.stack([residual - differences @ row for row in tail_sums(4)])
    assert torch.allclose(stacked, torch.stack(residuals))


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e9])
def test_scaling_everything_changes_nothing(factor):
    differences, residual = problem()
    plain, scaled = solve(differences, residual, 1e-2), solve(factor * differences, factor * residual, 1e-2)
    assert torch.allclose(plain.gamma, scaled.gamma, rtol=1e-12)
    assert plain.coefficient_norm == pytest.approx(scaled.coefficient_norm, rel=1e-12)
    assert not torch.allclose(plain.gamma, solve(differences, residual).gamma, rtol=1e-4)  # the factor does something


def test_regularization_is_relative_to_unit_columns():
    differences, residual = problem()
    scales = differences.norm(dim=0)
    unit = differences / scales
    expected = torch.linalg.solve(unit.T @ unit + 0.1 * torch.eye(4).double(), unit.T @ residual) / scales
    assert torch.allclose(solve(differences, residual, 0.1).gamma, expected, rtol=1e-12)
    norms = [solve(differences, residual, factor).coefficient_norm for factor in (0.0, 0.1, 10.0, 1e6)]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 1e-5


def test_a_column_of_zeros_is_left_out():
    differences, residual = problem()
    differences[:, 1] = 0
    mixing = solve(differences, residual)
    others = [0, 2, 3]
    assert mixing.numerical_rank == 3 and mixing.gamma[1] == 0
    assert torch.allclose(mixing.gamma[others], least_squares(differences[:, others], residual), rtol=1e-12)


def test_equal_columns_share_their_coefficient():
    differences, residual = problem()
    differences[:, 2] = 3 * differences[:, 0]
    mixing = solve(differences, residual, cutoff=1e-12)
    assert mixing.numerical_rank == 3 and mixing.condition_number < 1e3
    expected = differences[:, [0, 1, 3]] @ least_squares(differences[:, [0, 1, 3]], residual)
    assert torch.allclose(differences @ mixing.gamma, expected, rtol=1e-9)
    assert mixing.gamma[0] == pytest.approx(3 * float(mixing.gamma[2]))  # equal in unit columns


def test_more_columns_than_unknowns():
    differences, residual = problem(columns=6, size=3)
    mixing = solve(differences, residual, cutoff=1e-12)
    assert mixing.numerical_rank == 3
    assert torch.allclose(differences @ mixing.gamma, residual, rtol=1e-9)
    assert solve(differences, residual, cutoff=0.0).numerical_rank >= 3


def test_directions_below_the_cutoff_are_dropped():
    differences, residual = problem()
    differences[:, 3] = differences[:, 2] + 1e-4 * differences[:, 3] / differences[:, 3].norm()
    assert solve(differences, residual, cutoff=1e-14).numerical_rank == 4
    truncated = solve(differences, residual, cutoff=1e-6)
    assert truncated.numerical_rank == 3
    assert truncated.coefficient_norm < 0.1 * solve(differences, residual).coefficient_norm


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["matrix", "diagonal", "projection", "square"])
def test_numbers_that_are_not_finite_give_rank_zero(bad, place):
    differences, residual = problem()
    gram = gram_of(differences, residual)
    if place == "matrix":
        gram.matrix[1, 2] = gram.matrix[2, 1] = bad
    elif place == "diagonal":
        gram.matrix[1, 1] = bad
    elif place == "projection":
        gram.projection[0] = bad
    else:
        gram = gram._replace(square=bad)
    mixing = mixing_coefficients(gram, 1e-8, CUTOFF)
    if place == "diagonal" and bad != math.inf:  # a negative or unknown norm counts as a column of zeros
        assert torch.isfinite(mixing.gamma).all()
        return
    assert mixing.numerical_rank == 0 and math.isnan(mixing.condition_number)
    assert not mixing.gamma.any() and mixing.coefficient_norm == 0


def test_a_residual_of_zero_and_columns_of_zeros_give_rank_zero():
    differences, residual = problem()
    assert solve(differences, torch.zeros_like(residual)).numerical_rank == 0
    mixing = solve(torch.zeros_like(differences), residual)
    assert mixing.numerical_rank == 0 and not mixing.gamma.any()
    assert solve(differences, residual).numerical_rank == 4


def test_a_residual_orthogonal_to_the_columns_is_left_alone():
    differences = torch.eye(5, dtype=torch.float64)[:, :3]
    mixing = solve(differences, torch.eye(5, dtype=torch.float64)[4])
    assert mixing.numerical_rank == 3 and not mixing.gamma.any()


def shrinking(growth, columns=4):
    """Orthogonal residuals whose norms fall by `growth` from pair to pair, the newest of norm one."""
    residuals = torch.eye(columns + 1, dtype=torch.float64) * growth ** torch.arange(columns, -1, -1).double()
    return gram_of(torch.stack([b - a for a, b in itertools.pairwise(residuals)], dim=1), residuals[-1])


def test_columns_that_are_too_old_are_cut():
    gram = shrinking(1.0)
    assert usable_suffix(gram, [3, 2, 1, 0], 3, 1e4) == 4
    assert usable_suffix(gram, [9, 2, 1, 0], 3, 1e4) == 3
    assert usable_suffix(gram, [9, 4, 1, 0], 3, 1e4) == 2
    assert usable_suffix(gram, [9, 8, 7, 6], 3, 1e4) == 0


def test_columns_from_another_regime_are_cut():
    gram = shrinking(10.0)  # older residuals of norm 1e4, 1e3, 1e2, 1e1
    assert [usable_suffix(gram, [3, 2, 1, 0], 99, growth) for growth in (2e4, 5e3, 5e2, 50, 5)] == [4, 3, 2, 1, 0]
    residuals = (
        torch.eye(4, dtype=torch.float64) * torch.tensor([1.0, 1e3, 1.0, 1.0]).double()
    )  # nothing behind the gap
    gapped = gram_of((residuals[1:] - residuals[:-1]).T, residuals[-1])
    assert usable_suffix(gapped, [2, 1, 0], 99, 1e2) == 1 and usable_suffix(gapped, [2, 1, 0], 99, 1e4) == 3
    assert usable_suffix(gram._replace(square=math.nan), [3, 2, 1, 0], 99, 1e4) == 0


def test_newest_keeps_the_end():
    differences, residual = problem()
    part, expected = newest(gram_of(differences, residual), 2), gram_of(differences[:, 2:], residual)
    assert torch.equal(part.matrix, expected.matrix) and torch.equal(part.projection, expected.projection)
    assert part.square == expected.square
    assert newest(gram_of(differences, residual), 0).projection.numel() == 0
    assert mixing_coefficients(newest(gram_of(differences, residual), 0), 0.0, CUTOFF).numerical_rank == 0
