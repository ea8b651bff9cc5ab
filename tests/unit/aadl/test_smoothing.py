import math

import numpy as np
import pytest
import torch
from reference_anderson import mixed

from aadl.mixing import Gram, mixing_coefficients
from aadl.smoothing import noise_square, relative_standard_deviation, smoothed_coefficients, switch, window_mean

CUTOFF = 1e-14


def gram_of_updates(updates):
    """Inner products of the history that holds these residuals, oldest first."""
    residuals = torch.stack(updates, dim=1)
    differences = residuals[:, 1:] - residuals[:, :-1]
    newest = residuals[:, -1]
    return Gram(differences.T @ differences, differences.T @ newest, float(newest @ newest))


def random_updates(count, size=20_000, level=0.0, spread=1.0):
    mean = torch.full((size,), level, dtype=torch.float64)
    return [mean + spread * torch.randn(size, dtype=torch.float64) for _ in range(count)]


def pairs_of(count, size=12, seed=0):
    """Pairs (x_j, g_j) of arbitrary vectors, and the Gram record and differences of their history."""
    generator = np.random.default_rng(seed)
    pairs = [(generator.standard_normal(size), generator.standard_normal(size)) for _ in range(count)]
    gram = gram_of_updates([torch.from_numpy(g - x) for x, g in pairs])
    mapped = np.stack([g for _, g in pairs], axis=1)
    return pairs, gram, torch.from_numpy(mapped[:, -1]), torch.from_numpy(np.diff(mapped))


# ---- the criterion ---------------------------------------------------------------------------------------------------


def test_equal_updates_have_deviation_zero():
    update = torch.randn(100, dtype=torch.float64)
    assert relative_standard_deviation(gram_of_updates([update] * 5), [True] * 4) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_the_deviation_is_that_of_two_consecutive_updates(noise):
    """Mean (f1 + f2) / 2 and standard deviation |f2 - f1| / 2: E s^2 = noise^2 / (noise^2 + 2 level^2)."""
    gram = gram_of_updates(random_updates(6, level=1.0, spread=noise))
    expected = math.sqrt(noise**2 / (noise**2 + 2))
    assert relative_standard_deviation(gram, [True] * 5) == pytest.approx(expected, rel=0.03)


def test_updates_that_alternate_have_a_deviation_without_bound():
    update = torch.randn(100, dtype=torch.float64)
    assert relative_standard_deviation(gram_of_updates([update, -update, update]), [True] * 2) > 1e6


def test_the_deviation_does_not_depend_on_the_size_of_the_updates():
    updates = random_updates(4, level=1.0)
    plain = relative_standard_deviation(gram_of_updates(updates), [True] * 3)
    small = relative_standard_deviation(gram_of_updates([1e-9 * update for update in updates]), [True] * 3)
    assert small == pytest.approx(plain, rel=1e-9)


def test_only_consecutive_updates_enter_the_criterion():
    update = torch.randn(100, dtype=torch.float64)
    gram = gram_of_updates([update, update, -5 * update, -5 * update])
    assert relative_standard_deviation(gram, [True, False, True]) == pytest.approx(0, abs=1e-7)
    assert relative_standard_deviation(gram, [True, True, True]) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(relative_standard_deviation(gram, [False] * 3))


def test_updates_of_zero_have_no_deviation():
    assert math.isnan(relative_standard_deviation(gram_of_updates([torch.zeros(5).double()] * 3), [True] * 2))


def test_noise_square_is_the_variance_of_an_update():
    gram = gram_of_updates(random_updates(6, level=3.0, spread=0.5))
    assert noise_square(gram, [True] * 5) == pytest.approx(20_000 * 0.25, rel=0.03)
    assert noise_square(gram, [False] * 5) == 0
    jump = gram_of_updates([torch.zeros(4).double(), torch.zeros(4).double(), torch.ones(4).double()])
    assert noise_square(jump, [True, False]) == 0 and noise_square(jump, [False, True]) == 2


def test_the_switch_has_hysteresis():
    assert switch(False, 0.71, 0.7) and not switch(False, 0.69, 0.7) and not switch(False, 0.36, 0.7)
    assert switch(True, 0.69, 0.7) and switch(True, 0.36, 0.7) and not switch(True, 0.34, 0.7)
    assert switch(True, math.nan, 0.7) and not switch(False, math.nan, 0.7)
    assert switch(False, math.inf, 0.7)


# ---- the moving average ----------------------------------------------------------------------------------------------


def averaged(pairs, window):
    """Means of `window` consecutive pairs, themselves pairs of an affine map."""
    return [
        tuple(np.mean([pair[part] for pair in pairs[end - window : end]], axis=0) for part in (0, 1))
        for end in range(window, len(pairs) + 1)
    ]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_smoothed_coefficients_are_anderson_mixing_of_averaged_pairs(window):
    pairs, gram, mapped, differences = pairs_of(6)
    mixing = smoothed_coefficients(gram, window, 0.0, CUTOFF)
    expected = mixed(averaged(pairs, window))
    assert np.allclose((mapped - differences @ mixing.gamma).numpy(), expected, rtol=1e-9, atol=1e-9)
    assert not np.allclose(mixed(averaged(pairs, window % 5 + 1)), expected, rtol=1e-3)  # the window matters


def test_the_mean_of_the_smoothed_residuals_is_reported():
    pairs, gram, _, _ = pairs_of(6)
    residuals = torch.from_numpy(np.stack([g - x for x, g in pairs], axis=1))
    mixing = smoothed_coefficients(gram, 3, 0.0, CUTOFF)
    newest = residuals[:, -1] - (residuals[:, 1:] - residuals[:, :-1]) @ mixing.mean
    assert torch.allclose(newest, residuals[:, -3:].mean(1))


def test_the_size_of_smoothed_coefficients_is_that_of_mixing_the_averages():
    """Coefficient norm, rank and condition number, with regularization; not those of the pairs themselves."""
    pairs, gram, _, _ = pairs_of(6)
    averages = gram_of_updates([torch.from_numpy(g - x) for x, g in averaged(pairs, 3)])
    smooth, expected = smoothed_coefficients(gram, 3, 0.1, CUTOFF), mixing_coefficients(averages, 0.1, CUTOFF)
    assert smooth.coefficient_norm == pytest.approx(expected.coefficient_norm)
    assert smooth.condition_number == pytest.approx(expected.condition_number)
    assert smooth.numerical_rank == expected.numerical_rank == 3
    assert mixing_coefficients(gram, 0.1, CUTOFF).numerical_rank == 5


@pytest.mark.parametrize("window", [1, 2, 4, 6, 50])
def test_the_window_mean_is_the_mean_of_the_mapped_iterates(window):
    pairs, _, mapped, differences = pairs_of(6)
    expected = np.mean([g for _, g in pairs[-window:]], axis=0)
    assert np.allclose((mapped - differences @ window_mean(5, window)).numpy(), expected, rtol=1e-12)
    if window > 1:
        assert not np.allclose(mapped.numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("window", [6, 7, 50])
def test_with_no_column_left_the_result_is_the_plain_mean(window):
    _, gram, _, _ = pairs_of(6)
    mixing = smoothed_coefficients(gram, window, 0.0, CUTOFF)
    assert torch.allclose(mixing.gamma, window_mean(5, 6)) and mixing.numerical_rank > 0
    assert not torch.allclose(smoothed_coefficients(gram, 5, 0.0, CUTOFF).gamma, window_mean(5, 5))


def test_the_rounding_of_a_smoothed_column_is_divided_by_the_window():
    """Columns e_1 .. e_5, two of which make a smoothed one: its square is 1/2, and its rounding a quarter of theirs."""
    gram = Gram(torch.eye(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64), 9.0)
    even, uneven = torch.ones(5, dtype=torch.float64), torch.tensor([4.0, 1.0, 4.0, 1.0, 4.0], dtype=torch.float64)
    clean, noisy, partly = (smoothed_coefficients(gram, 2, 0.0, CUTOFF, noise) for noise in (even, 4 * even, uneven))
    assert torch.equal(noisy.gamma, noisy.mean)  # all columns are rounding, and the mean is left to go to
    assert noisy.numerical_rank == 1 and torch.equal(partly.gamma, noisy.gamma)  # the larger of two counts
    assert not torch.equal(clean.gamma, clean.mean)
