"""The ring of differences against explicit vectors, and the coefficients that come out of float32 histories."""

import itertools
import math

import pytest
import torch
from histories import explicit, filled_history, make_history, orthogonal_solution, push_pair, random_pairs

from aadl.block import make_block
from aadl.history import KINDS, Column, History
from aadl.mixing import mixing_coefficients

CUTOFF = 1e-14


# ---- the ring against explicit vectors -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 9))
def test_inner_products_are_those_of_the_newest_pairs(count):
    pairs, history = random_pairs(count), make_history()
    for number, (x, g) in enumerate(pairs):
        push_pair(history, [x], [g], number)
        if number % 2:
            history.gram()  # products are kept between calls
    f, _, df, _ = explicit(pairs[-4:])
    gram = history.gram()["parameters"]
    assert torch.allclose(gram.matrix, df.T @ df) and torch.allclose(gram.projection, df.T @ f)
    assert gram.square == pytest.approx(float(f @ f))
    assert [column.macro_step for column in history.columns] == list(range(max(1, count - 3), count))
    if count > 2:
        assert not torch.allclose(gram.matrix.flip(0, 1), gram.matrix)  # the order matters


@pytest.mark.parametrize("ring", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 4, 6])
def test_the_candidate_is_the_combination_of_the_differences(ring, count):
    pairs, history = random_pairs(count), make_history(ring=ring)
    for x, g in pairs:
        push_pair(history, [x], [g])
    f, g, df, dg = explicit(pairs[-4:])
    columns = df.shape[1]
    a, b, c = torch.arange(1.0, columns + 1).double(), torch.linspace(-1, 2, columns).double(), 0.25
    assert history.combine(a, b, c) is None
    target = torch.zeros(50, dtype=torch.float64)
    history.take(True, [[target]])
    coarseness = {None: 1e-13, torch.float32: 1e-6, torch.bfloat16: 0.15}[ring]
    assert torch.allclose(target, g - dg @ a - df @ b - c * f, rtol=0, atol=coarseness)
    assert not torch.allclose(target, g - dg @ a.flip(0) - df @ b - c * f, atol=0.5)
    history.write_mapped([[target]])
    assert torch.equal(target, pairs[-1][1])


@pytest.mark.parametrize(("relaxation", "kinds"), [(1.0, 1), (0.6, 1), (0.6, 2)])
def test_advance_is_the_product_of_correction_and_mean_update(relaxation, kinds):
    """With the momentum coming along, which the advance is not about."""
    history = make_history(kinds=("parameters", "momentum")[:kinds])
    pairs = random_pairs(4)
    for (x, g), (v, w) in zip(pairs, random_pairs(4, seed=1), strict=True):
        push_pair(history, [x, v][:kinds], [g, w][:kinds])
    f, g, df, dg = explicit(pairs)
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.5, 0.0, -1.0]).double()
    advances = []
    for mean in (torch.zeros(3).double(), torch.tensor([0.0, 0.5, 1.0]).double()):
        advances.append(history.combine(a, b, 1 - relaxation, mean))
        correction = -dg @ a - df @ b - (1 - relaxation) * f
        assert torch.allclose(history.blocks[0].own_start, g + correction)
        assert advances[-1].shape == () and advances[-1].dtype == torch.float64
        assert float(advances[-1]) == pytest.approx(float(correction @ (f - df @ mean)))
    assert not torch.allclose(*advances)


def test_kinds_are_kept_apart_and_follow_the_same_coefficients():
    history = make_history(kinds=("parameters", "momentum"))
    pairs, momenta = random_pairs(4, seed=1), random_pairs(4, seed=2)
    for (x, g), (start, end) in zip(pairs, momenta, strict=True):
        push_pair(history, [x, start], [g, end])
    for kind, stored in (("parameters", pairs), ("momentum", momenta)):
        _, _, df, _ = explicit(stored)
        assert torch.allclose(history.gram()[kind].matrix, df.T @ df)
    a = torch.tensor([1.0, 2.0, 3.0]).double()
    history.combine(a, torch.ones(3).double(), 0.5)
    targets = [torch.zeros(50, dtype=torch.float64) for _ in range(2)]
    history.take(True, [[target] for target in targets])
    _, end, _, differences = explicit(momenta)
    assert torch.allclose(targets[1], end - differences @ a)  # relaxation and rate are matters of the parameters


def test_blocks_of_one_kind_are_added():
    history = make_history(kinds=("parameters", "parameters"))
    joined = []
    for (x, g), (y, h) in zip(random_pairs(3, seed=1), random_pairs(3, seed=2), strict=True):
        push_pair(history, [x, y], [g, h])
        joined.append((torch.cat([x, y]), torch.cat([g, h])))
    _, _, df, _ = explicit(joined)
    assert torch.allclose(history.gram()["parameters"].matrix, df.T @ df)


def test_a_momentum_block_without_residuals_enters_no_product():
    blocks = [make_block("parameters", [torch.zeros(4)], 2, True, None)]
    blocks += [make_block("momentum", [torch.zeros(4)], 2, False, None)]
    history = History(2, blocks)
    for number in range(3):
        history.begin([[torch.zeros(4)], [torch.zeros(4)]])
        history.push([[torch.randn(4)], [torch.randn(4)]], Column(number, True, 1.0))
    assert history.gram().keys() == {"parameters"}
    squares = history.measurements()[:, 0]
    assert squares.tolist() == [pytest.approx(float(blocks[0].residual.double().square().sum())), 0.0]
    assert squares[0] > 0 and blocks[1].residual is None


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


def test_measurements_are_sums_by_kind():
    history = make_history(kinds=("momentum", "parameters", "parameters"))
    assert KINDS == ("parameters", "momentum")
    newest = []
    for number in range(3):
        newest = random_pairs(3, seed=number)
        push_pair(history, [x for x, _ in newest], [g for _, g in newest])
    momentum, *parameters = [float((g - x).square().sum()) for x, g in newest]
    measurements = history.measurements()
    assert measurements.shape == (2, 4) and measurements.dtype == torch.float64
    assert measurements[:, 0].tolist() == pytest.approx([sum(parameters), momentum])
    parts = history.gram()
    for row, kind in zip(measurements.tolist(), KINDS, strict=True):
        assert row == pytest.approx([parts[kind].square, parts[kind].rounding, parts[kind].jump, parts[kind].along])
        assert row[2] > 0


# ---- where the next macro-step starts --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_a_push_ends_with_the_start_at_the_mapped_iterate(keep_last, ratio):
    pairs, history = random_pairs(3), make_history()
    for x, g in pairs[:2]:
        push_pair(history, [x], [g])
    for from_mapped in (False, True):
        last = history.blocks[0].mapped.clone()
        if not from_mapped:
            history.begin([[pairs[2][0]]])
        history.push([[pairs[2][1] + from_mapped]], Column(0, True, 1.0), ratio, keep_last=keep_last)
        block = history.blocks[0]
        assert block.start is block.mapped and torch.equal(block.start, pairs[2][1] + from_mapped)
        assert history.starts_at([[pairs[2][1] + from_mapped]]) and not history.starts_at([[last]])
        assert torch.equal(block.own_start, last) == keep_last  # what `take` may bring back, at the rate it was made


def test_what_a_push_keeps_comes_back():
    pairs = random_pairs(4)
    history = filled_history(pairs[:3])
    push_pair(history, [pairs[3][0]], [pairs[3][1]], keep_last=True)
    without = filled_history(pairs)
    target = pairs[3][1].clone()
    history.take(True, [[target]])
    assert torch.equal(target, pairs[2][1]) and history.starts_at([[pairs[2][1]]])
    one, other = history.gram()["parameters"], without.gram()["parameters"]
    assert torch.equal(one.matrix, other.matrix) and torch.equal(one.projection, other.projection)  # nothing is lost
    history.write_mapped([[target]])
    assert torch.equal(target, pairs[3][1])


@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_on_a_device_does_what_one_on_the_host_does(flag):
    pairs, ends = random_pairs(4), []
    for given in (flag, torch.tensor(flag)):
        history = make_history(kinds=("parameters", "momentum"))
        for (x, g), (v, w) in zip(pairs, random_pairs(4, seed=1), strict=True):
            push_pair(history, [x, v], [g, w])
        plain = [block.mapped.clone() for block in history.blocks]
        tensors = [[value.clone()] for value in plain]
        history.combine(torch.ones(3).double(), torch.zeros(3).double(), 0.0)
        history.take(given, tensors)
        assert history.starts_at(tensors)
        assert [torch.equal(values[0], value) for values, value in zip(tensors, plain, strict=True)] == [not flag] * 2
        assert all(torch.equal(block.mapped, value) for block, value in zip(history.blocks, plain, strict=True))
        history.push([[value + 1] for value in plain], Column(0, True, 1.0))
        ends.append((tensors, history.gram()))
    (one, first), (other, second) = ends
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
    for kind in first:
        assert torch.equal(first[kind].matrix, second[kind].matrix)
        assert torch.equal(first[kind].projection, second[kind].projection)


def test_a_flag_on_a_device_leaves_not_a_number_behind():
    """A candidate that is not finite and not taken must not shine through."""
    history = filled_history(random_pairs(3))
    history.blocks[0].own_start.fill_(math.nan)
    target = history.blocks[0].mapped.clone()
    history.take(torch.tensor(False), [[target]])
    assert torch.equal(target, history.blocks[0].mapped) and history.starts_at([[target]])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_newest_columns_are_forgotten_and_those_before_stay(count):
    pairs = random_pairs(6)
    history = filled_history(pairs)
    steps = [column.macro_step for column in history.columns]
    kept = max(0, len(steps) - count)
    history.forget_last(count)
    assert [column.macro_step for column in history.columns] == steps[:kept] and not history.has_pair
    rows = history.blocks[0].delta_residual[history.order()]
    assert torch.equal(rows, explicit(pairs)[2].T[-3:][:kept])


def test_clear_forgets_the_pairs_and_keeps_the_start():
    pairs = random_pairs(9)
    history = filled_history(pairs[:5])
    history.clear()
    assert history.columns == [] and not history.has_pair
    assert torch.equal(history.blocks[0].start, pairs[4][1]) and history.blocks[0].delta_residual.any()
    for x, g in pairs[5:8]:
        push_pair(history, [x], [g])
    f, _, df, _ = explicit(pairs[5:8])
    gram = history.gram()["parameters"]
    assert torch.allclose(gram.matrix, df.T @ df) and torch.allclose(gram.projection, df.T @ f)


@pytest.mark.parametrize("from_mapped", [False, True])
def test_clear_wipes_rows_that_are_not_finite(from_mapped):
    pairs = random_pairs(7)
    history = filled_history(pairs[:3])
    push_pair(history, [pairs[3][0]], [pairs[3][1] * math.nan])
    if not from_mapped:
        history.begin([[pairs[4][0]]])
    history.clear(wipe=True)
    block = history.blocks[0]
    assert not any(tensor.any() for name, tensor in block.tensors.items() if name.startswith("delta"))
    assert block.start is block.own_start
    assert block.start.isnan().all() if from_mapped else torch.equal(block.start, pairs[4][0])
    for x, g in pairs[4:]:
        push_pair(history, [x], [g])
    f, _, df, _ = explicit(pairs[4:])
    gram = history.gram()["parameters"]
    assert torch.allclose(gram.matrix, df.T @ df) and torch.allclose(gram.projection, df.T @ f)


def test_what_does_not_move_stays_bit_identical():
    generator = torch.Generator().manual_seed(0)
    frozen = torch.randn(20, generator=generator)  # float32, and coefficients that do not sum to round numbers
    moving = [torch.randn(20, generator=generator) for _ in range(5)]
    for ring in (None, torch.bfloat16):
        history = make_history(size=40, dtype=torch.float32, ring=ring)
        for x, g in itertools.pairwise(moving):
            push_pair(history, [torch.cat([frozen, x])], [torch.cat([frozen, g])])
        history.combine(torch.tensor([0.3, -1.7, 2.9]).double(), torch.tensor([0.1, 0.7, -0.2]).double(), 0.3)
        target = torch.zeros(40)
        history.take(True, [[target]])
        assert torch.equal(target[:20], frozen) and not torch.equal(target[20:], moving[-1])


# ---- fp32 histories --------------------------------------------------------------------------------------------------


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
