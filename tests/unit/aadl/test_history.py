"""The ring of differences against explicit vectors, and the coefficients that come out of float32 histories."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from histories import explicit, filled_history, make_history, orthogonal_solution, push_pair, random_pairs

from aadl.block import make_block
from aadl.history import Column, History
from aadl.mixing import mixing_coefficients

CUTOFF = 1e-14


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_push_measures_the_newest_pair_and_the_jump_to_its_start(dtype, fused):
    """||f||^2, (eps ||g||)^2, ||s||^2 and <f, s>, with s from the last mapped iterate or from the one kept before."""
    numel, eps = 5000, torch.finfo(dtype).eps
    history = History(3, [make_block("parameters", [torch.zeros(numel, dtype=dtype)], 3, True, None, fused=fused)])

    def push(x, g, **how):
        if x is not None:
            history.begin([[x]])
        history.push([[g]], Column(0, True, 1.0), **how)
        return history.measurements()[0].tolist()

    torch.manual_seed(0)
    x, g, y, h, k = torch.randn(5, numel, dtype=dtype)
    push(x, g)
    f, s = (h - y).double(), (y - g).double()
    expected = [f @ f, eps**2 * (h.double() @ h.double()), s @ s, f @ s]
    assert push(y, h, keep_last=True) == pytest.approx(list(map(float, expected)), rel=1e-5)
    f, s = (k - h).double(), (h - g).double()
    expected = [f @ f, eps**2 * (k.double() @ k.double()), s @ s, f @ s]
    assert push(None, k, measure="kept") == pytest.approx(list(map(float, expected)), rel=1e-5)
    assert push(None, h, measure="jump")[2:] == [0.0, 0.0]
    assert push(None, h, measure="") == [0.0] * 4


@pytest.mark.parametrize("forgotten", [1, 2])
def test_a_ring_that_has_turned_forgets_its_newest_columns_alone(forgotten):
    pairs = random_pairs(5)
    history = filled_history(pairs, depth=3)
    history.forget_last(forgotten)
    push_pair(history, [pairs[0][0]], [pairs[0][1]])  # products need a pair
    *_, residuals, mapped = explicit(pairs[1 : 5 - forgotten])
    for name, expected in (("delta_residual", residuals), ("delta_mapped", mapped)):
        assert torch.allclose(history.blocks[0].tensors[name][history.order()], expected.T)
    assert torch.allclose(history.gram()["parameters"].matrix, residuals.T @ residuals)


def test_a_slot_written_twice_between_two_products_is_computed_once():
    history = filled_history(random_pairs(8), depth=3)
    assert sorted(history.stale) == [0, 1, 2]


@pytest.mark.parametrize("own", [True, False])
def test_an_average_is_that_of_the_candidates_and_of_the_plain_iterates(own):
    """The other one of two ranks has ones; a rank without a candidate brings its plain iterate."""
    (x, plain), (candidate, values) = random_pairs(2)
    history = filled_history([(x, plain)])
    history.begin([[candidate]])
    history.average(own, SimpleNamespace(size=2, total=lambda row: row + 1), [[values]])
    assert torch.allclose(values, (plain + 1) / 2)
    history.take(True, [[values]])
    assert torch.allclose(values, ((candidate if own else plain) + 1) / 2)


def conditioned(size, columns, condition, seed):
    """DF with unit columns of (about) the given condition number, scales 1 .. 1e-2, and a residual outside its span."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, columns + 1, generator=generator, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64)
    differences = (basis[:, :columns] * spectrum) @ turn.T
    differences = differences / differences.norm(dim=0) * torch.logspace(0, -2, columns, dtype=torch.float64)
    inside = basis[:, :columns] @ torch.randn(columns, generator=generator, dtype=torch.float64)
    return differences, 0.95 * inside / inside.norm() + 0.3 * basis[:, columns]


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5])
def test_coefficients_of_a_float32_history_are_those_of_a_float64_factorization(condition):
    size, columns = 20_000, 10
    differences, newest = conditioned(size, columns, condition, seed=0)
    residuals = [newest.float()]
    for column in reversed(range(columns)):
        residuals.insert(0, residuals[0] - differences[:, column].float())
    history = make_history(columns, size, torch.float32)
    for residual in residuals:
        push_pair(history, [torch.zeros(size)], [residual])
    mixing = mixing_coefficients(history.gram()["parameters"], 0.0, CUTOFF)
    wide = [residual.double() for residual in residuals]
    exact = torch.stack([b - a for a, b in itertools.pairwise(wide)], dim=1)
    expected = orthogonal_solution(exact, wide[-1])
    assert mixing.numerical_rank == columns
    assert mixing.condition_number == pytest.approx(float(torch.linalg.cond(exact / exact.norm(dim=0))), rel=0.01)
    assert mixing.condition_number > 0.3 * condition
    assert (mixing.gamma - expected).norm() < 1e-4 * expected.norm()
    scales = exact.norm(dim=0)
    assert (scales * (mixing.gamma - expected)).norm() < 1e-4 * (scales * expected).norm()
