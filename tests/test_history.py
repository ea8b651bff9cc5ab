import copy
import itertools
import math
import resource

import pytest
import torch
from quadratics import quadratic, sgd

import aadl
from aadl.history import Column, History, make_block
from aadl.mixing import mixing_coefficients

CUTOFF = 1e-14
PURE = {"history_depth": 4, "store_each_nth": 1, "reg_acc": 0, "safeguard": False, "average": False}


# ---- the ring against explicit vectors -------------------------------------------------------------------------------


def make_history(depth=3, size=50, dtype=torch.float64, ring=None, kinds=("parameters",), residuals=True):
    blocks = [make_block(kind, [torch.zeros(size, dtype=dtype)], depth, residuals, ring) for kind in kinds]
    return History(depth, blocks)


def push_pair(history, starts, mapped, macro_step=0, ratio=1.0):
    """Store one pair per block."""
    history.begin([[x] for x in starts])
    history.push([[g] for g in mapped], Column(macro_step, True, 1.0), ratio)


def random_pairs(count, size=50, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, size, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def explicit(pairs):
    """f_k, g_k, DF and DG of pairs (x_j, g_j), columns oldest first, in float64."""
    x, g = (torch.stack([pair[part] for pair in pairs], dim=1).double() for part in (0, 1))
    f = g - x
    return f[:, -1], g[:, -1], f[:, 1:] - f[:, :-1], g[:, 1:] - g[:, :-1]


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


@pytest.mark.parametrize("size", [16_383, 16_384, 16_385, 70_000])
def test_inner_products_of_rows_longer_than_a_piece(size):
    pairs, history = random_pairs(4, size, dtype=torch.float32), make_history(size=size, dtype=torch.float32)
    for x, g in pairs:
        push_pair(history, [torch.zeros_like(x)], [g])
    residuals = [g for _, g in pairs]
    df = torch.stack([b - a for a, b in itertools.pairwise(residuals)], dim=1).double()
    gram = history.gram()["parameters"]
    assert torch.allclose(gram.matrix, df.T @ df, rtol=1e-13)
    assert torch.allclose(gram.projection, df.T @ residuals[-1].double(), rtol=1e-12)


@pytest.mark.parametrize("ring", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 4, 6])
def test_the_candidate_is_the_combination_of_the_differences(ring, count):
    pairs, history = random_pairs(count), make_history(ring=ring)
    for x, g in pairs:
        push_pair(history, [x], [g])
    f, g, df, dg = explicit(pairs[-4:])
    columns = df.shape[1]
    a, b, c = torch.arange(1.0, columns + 1).double(), torch.linspace(-1, 2, columns).double(), 0.25
    history.combine(a, b, c)
    target = torch.zeros(50, dtype=torch.float64)
    history.write_candidate([[target]])
    coarseness = {None: 1e-13, torch.float32: 1e-6, torch.bfloat16: 0.15}[ring]
    assert torch.allclose(target, g - dg @ a - df @ b - c * f, rtol=0, atol=coarseness)
    assert not torch.allclose(target, g - dg @ a.flip(0) - df @ b - c * f, atol=0.5)
    history.write_mapped([[target]])
    assert torch.equal(target, pairs[-1][1])


def test_advance_is_the_product_of_correction_and_mean_update():
    pairs, history = random_pairs(4), make_history()
    for x, g in pairs:
        push_pair(history, [x], [g])
    f, _, df, dg = explicit(pairs)
    a, mean = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.0, 0.5, 1.0]).double()
    history.combine(a, torch.zeros(3).double(), 0.0)
    assert history.advance(torch.zeros(3).double()) == pytest.approx(float(-(dg @ a) @ f))
    assert history.advance(mean) == pytest.approx(float(-(dg @ a) @ (f - df @ mean)))
    assert history.advance(mean) != pytest.approx(history.advance(torch.zeros(3).double()))


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
    history.write_candidate([[target] for target in targets])
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
    assert history.gram().keys() == history.residual_squares([[torch.ones(4)]] * 2).keys() == {"parameters"}


def test_residual_squares_store_nothing():
    pairs, history = random_pairs(3), make_history()
    for x, g in pairs:
        push_pair(history, [x], [g])
    before = copy.deepcopy(history.state_dict())
    history.continue_from_mapped()
    value = torch.randn(50, dtype=torch.float64)
    expected = float((value - pairs[-1][1]).square().sum())
    assert history.residual_squares([[value]])["parameters"] == pytest.approx(expected)
    after = history.state_dict()
    assert torch.equal(before["blocks"][0]["delta_residual"], after["blocks"][0]["delta_residual"])
    assert torch.equal(before["blocks"][0]["mapped"], after["blocks"][0]["mapped"]) and len(history.columns) == 2


def test_clear_forgets_the_pairs_and_keeps_the_start():
    pairs, history = random_pairs(9), make_history()
    for x, g in pairs[:5]:
        push_pair(history, [x], [g])
    history.continue_from_mapped()
    history.clear()
    assert history.columns == [] and not history.has_pair
    assert torch.equal(history.blocks[0].start, pairs[4][1])
    for x, g in pairs[5:8]:
        push_pair(history, [x], [g])
    f, _, df, _ = explicit(pairs[5:8])
    gram = history.gram()["parameters"]
    assert torch.allclose(gram.matrix, df.T @ df) and torch.allclose(gram.projection, df.T @ f)


@pytest.mark.parametrize("ring", [None, torch.bfloat16])
@pytest.mark.parametrize("with_gram", [False, True])
def test_a_restored_history_goes_on_bit_for_bit(ring, with_gram):
    pairs, history = random_pairs(8), make_history(ring=ring)
    for x, g in pairs[:5]:
        push_pair(history, [x], [g])
    if with_gram:
        history.gram()
    history.continue_from_mapped()
    restored = make_history(ring=ring)
    restored.load_state_dict(copy.deepcopy(history.state_dict()))
    for branch in (history, restored):
        branch.push([[pairs[5][1]]], Column(6, True, 1.0))
        push_pair(branch, *([value] for value in pairs[6]))
    one, other = history.gram()["parameters"], restored.gram()["parameters"]
    assert torch.equal(one.matrix, other.matrix) and torch.equal(one.projection, other.projection)
    assert one.square == other.square and history.columns == restored.columns
    for branch in (history, restored):
        branch.combine(torch.ones(3).double(), torch.zeros(3).double(), 0.0)
    assert torch.equal(history.blocks[0].own_start, restored.blocks[0].own_start)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depth": 2}, "history_depth 3"),
        ({"size": 40}, "other shapes"),
        ({"kinds": ("parameters", "momentum")}, "1 blocks"),
        ({"kinds": ("momentum",)}, "other shapes"),
    ],
)
def test_the_state_of_another_history_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        make_history(**other).load_state_dict(make_history().state_dict())


def test_the_state_of_another_memory_format_is_refused():
    tensor = torch.zeros(2, 3, 4, 5)
    one, other = (
        History(2, [make_block("parameters", [tensor.to(memory_format=layout)], 2, True, None)])
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    with pytest.raises(ValueError, match="memory formats"):
        other.load_state_dict(one.state_dict())


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
        history.write_candidate([[target]])
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


def orthogonal_solution(differences, residual):
    q, r = torch.linalg.qr(differences)
    return torch.linalg.solve_triangular(r, (q.T @ residual)[:, None], upper=True)[:, 0]


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


@pytest.mark.slow
def test_coefficients_at_the_size_of_resnet50():
    size, columns = 25_557_032, 3
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    mixer = (torch.logspace(0, -5, columns, dtype=torch.float64)[:, None] * turn.T).float()
    history = make_history(columns, size, torch.float32)
    residual, zeros = torch.randn(size, generator=generator), torch.zeros(size)
    directions = torch.randn(columns, size, generator=generator)  # nearly orthogonal at this size
    push_pair(history, [zeros], [residual])
    for column in range(columns):
        residual = residual + torch.mv(directions.T, mixer[:, column])
        push_pair(history, [zeros], [residual])
    del directions, zeros
    mixing = mixing_coefficients(history.gram()["parameters"], 0.0, CUTOFF)
    rows = [history.blocks[0].delta_residual[slot] for slot in history.order()]
    triangles = []  # a tall factorization in pieces: R of the R's
    for start in range(0, size, 1 << 20):
        piece = torch.stack([row[start : start + (1 << 20)].double() for row in [*rows, residual]], dim=1)
        triangles = [torch.linalg.qr(torch.cat([*triangles, piece]), mode="r").R]
    factor = triangles[0]
    expected = torch.linalg.solve_triangular(factor[:columns, :columns], factor[:columns, columns:], upper=True)[:, 0]
    assert mixing.numerical_rank == columns and 2e4 < mixing.condition_number < 5e5
    assert (mixing.gamma - expected).norm() < 1e-4 * expected.norm()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 1024**2  # KiB


# ---- true pairs ------------------------------------------------------------------------------------------------------
# A pair is true when its mapped iterate is what the optimizer makes of its start, whatever happened in between.


class Map:
    """One macro-step of SGD on a mildly nonlinear problem, run beside the library: (x, momentum) -> (x, momentum)."""

    def __init__(self, size=12, store_each_nth=1, momentum=0.0):
        self.problem = quadratic(20.0, seed=1, size=size)
        self.store_each_nth, self.momentum = store_each_nth, momentum

    def loss(self, x):
        distance = x - self.problem.solution
        return 0.5 * distance @ (self.problem.matrix @ distance) + 0.1 * (1 - torch.cos(distance)).sum()

    def gradient(self, x):
        return self.problem.gradient(x) + 0.1 * torch.sin(x - self.problem.solution)

    def __call__(self, x, velocity, lr):
        for _ in range(self.store_each_nth):
            velocity = self.momentum * velocity + self.gradient(x)
            x = x - lr * velocity
        return x, velocity

    def accelerated(self, **acceleration):
        schedule = {"store_each_nth": self.store_each_nth, "frequency": 2 * self.store_each_nth}
        return sgd(self.problem, PURE | schedule | acceleration, lr=0.3, momentum=self.momentum)

    def run(self, x, optimizer, steps):
        for _ in range(steps):
            x.grad = self.gradient(x.detach())
            optimizer.step()


def stored_pairs(optimizer):
    """(x_j, v_j, g_j, w_j, lr factor) newest first, reconstructed from the rows of the history."""
    accelerator = aadl.accelerator_of(optimizer)
    history = accelerator._history
    blocks = {block.kind: block for block in history.blocks}
    own, momentum = blocks["parameters"], blocks.get("momentum")
    columns = [(history.order()[i], history.columns[i].learning_rate) for i in range(len(history.columns))]
    rate = accelerator._progress.get("pair_learning_rate", 1.0)
    g, f = own.mapped.clone(), own.residual.clone()
    w, e = (momentum.mapped.clone(), momentum.residual.clone()) if momentum else (torch.zeros(()), torch.zeros(()))
    pairs = []
    for slot, column_rate in [*reversed(columns), (None, None)]:
        pairs.append((g - f, w - e, g, w, rate))
        if slot is None:
            return pairs
        x, f = g - f, f * (column_rate / rate)  # the row belongs to the rate of its newer pair
        g, rate = x + f, column_rate
        g, f = g - own.delta_mapped[slot], f - own.delta_residual[slot]
        if momentum:
            w, e = w - momentum.delta_mapped[slot], e - momentum.delta_residual[slot]


def assert_true_pairs(evaluate, optimizer, count=5, lr=0.3):
    pairs = stored_pairs(optimizer)
    assert len(pairs) == count
    for x, v, g, w, rate in pairs:
        expected, velocity = evaluate(x, v, lr * rate)
        assert torch.allclose(g, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(g, evaluate(x + 1e-6, v, lr * rate)[0], rtol=0, atol=1e-9)
        if evaluate.momentum:
            assert torch.allclose(w, velocity, rtol=0, atol=1e-12)


MAPS = [(1, 0.0), (3, 0.0), (1, 0.5), (3, 0.5)]


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
@pytest.mark.parametrize("frequency", [1, 2, 5])
def test_pairs_are_true_after_accepted_candidates(store_each_nth, momentum, frequency):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(frequency=frequency * store_each_nth)
    for _ in range(9):
        evaluate.run(x, optimizer, store_each_nth)
        assert_true_pairs(evaluate, optimizer, min(5, aadl.accelerator_of(optimizer).statistics["macro_steps"]))
    assert aadl.accelerator_of(optimizer).statistics["accepted"] >= 1


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
def test_pairs_are_true_after_candidates_rejected_by_the_loss(store_each_nth, momentum):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(safeguard="loss")
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = evaluate.loss(x)
        loss.backward()
        calls.append(loss)
        return loss.detach() + len(calls)  # every call is worse than the last one: the candidate never wins

    plain, base = sgd(evaluate.problem, lr=0.3, momentum=momentum)
    for _ in range(16 * store_each_nth):
        optimizer.step(closure)
        evaluate.run(plain, base, 1)
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["rejected"].get("loss", 0) >= 2 and statistics["accepted"] == 0
    assert_true_pairs(evaluate, optimizer)
    assert torch.allclose(x, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
def test_pairs_are_true_after_reverted_candidates(store_each_nth, momentum, monkeypatch):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(safeguard="residual", frequency=store_each_nth)
    statistics = aadl.accelerator_of(optimizer).statistics
    evaluate.run(x, optimizer, 4 * store_each_nth)
    statistics["accepted"] = statistics["reverted"] = 0
    monkeypatch.setattr("aadl.safeguard.must_revert", lambda square, pending: True)
    for _ in range(6):
        evaluate.run(x, optimizer, store_each_nth)
        assert_true_pairs(evaluate, optimizer, len(stored_pairs(optimizer)))
    assert statistics["reverted"] >= 2
    assert_true_pairs(evaluate, optimizer)


def test_a_reverted_candidate_leaves_the_plain_iterate(monkeypatch):
    evaluate = Map(momentum=0.5)
    x, optimizer = evaluate.accelerated(safeguard="residual", frequency=8)
    plain, base = sgd(evaluate.problem, lr=0.3, momentum=0.5)
    monkeypatch.setattr("aadl.safeguard.must_revert", lambda square, pending: True)
    evaluate.run(x, optimizer, 8)
    evaluate.run(plain, base, 8)
    assert not torch.equal(x, plain)  # accelerated
    evaluate.run(x, optimizer, 1)  # judged and taken back
    assert torch.equal(x, plain)
    assert torch.equal(optimizer.state[x]["momentum_buffer"], base.state[plain]["momentum_buffer"])


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
@pytest.mark.parametrize("steps", [6, 7, 8])
def test_pairs_are_true_after_a_resume(store_each_nth, momentum, steps):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated()
    evaluate.run(x, optimizer, steps)
    y, resumed = evaluate.accelerated()
    with torch.no_grad():
        y.copy_(x)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        evaluate.run(x, optimizer, store_each_nth)
        evaluate.run(y, resumed, store_each_nth)
        assert torch.equal(x, y)
        assert_true_pairs(evaluate, resumed, len(stored_pairs(resumed)))
    evaluate.run(y, resumed, 3 * store_each_nth)
    assert_true_pairs(evaluate, resumed)


@pytest.mark.parametrize("frequency", [1, 2, 100])
def test_pairs_are_true_after_changes_of_the_learning_rate(frequency):
    evaluate = Map()
    x, optimizer = evaluate.accelerated(frequency=frequency)
    rates = [0.3, 0.3, 0.28, 0.28, 0.28, 0.29, 0.3, 0.3, 0.27]
    for number, rate in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = rate
        evaluate.run(x, optimizer, 1)
        assert_true_pairs(evaluate, optimizer, min(number, 5))
    assert aadl.accelerator_of(optimizer).statistics["resets"] == {}
    assert len({pair[-1] for pair in stored_pairs(optimizer)}) > 2


def test_mixing_after_a_change_of_the_learning_rate_is_mixing_at_the_new_rate():
    """Linear map, relaxation 1 and 0.5: the iterate equals textbook mixing of all pairs evaluated at the new rate."""
    problem = quadratic(20.0, seed=1, size=12)
    for relaxation in (1.0, 0.5):
        options = {"history_depth": 3, "frequency": 2, "relaxation": relaxation}
        x, optimizer = sgd(problem, PURE | options, lr=0.5)
        starts = []
        for rate in (0.5, 0.5, 0.45, 0.45, 0.5, 0.55):
            optimizer.param_groups[0]["lr"] = rate
            x.grad = problem.gradient(x.detach())
            starts.append(x.detach().clone())
            optimizer.step()
        assert aadl.accelerator_of(optimizer).statistics["accepted"] == 3
        candidates = [
            textbook([(start, start - rate * problem.gradient(start)) for start in starts[-4:]], relaxation)
            for rate in (0.55, 0.5)
        ]
        assert torch.allclose(x, candidates[0], rtol=0, atol=1e-10)
        assert not torch.allclose(x, candidates[1], rtol=0, atol=1e-6)


def textbook(pairs, relaxation):
    f, g, df, dg = explicit(pairs)
    gamma = orthogonal_solution(df, f)
    return g - dg @ gamma - (1 - relaxation) * (f - df @ gamma)


def test_a_large_change_of_the_learning_rate_starts_the_history_anew():
    evaluate = Map()
    x, optimizer = evaluate.accelerated()
    evaluate.run(x, optimizer, 6)
    optimizer.param_groups[0]["lr"] = 0.03
    evaluate.run(x, optimizer, 3)
    assert aadl.accelerator_of(optimizer).statistics["resets"] == {"learning_rate": 1}
    assert_true_pairs(evaluate, optimizer, 3, lr=0.03)


@pytest.mark.parametrize(("store_each_nth", "momentum"), MAPS)
@pytest.mark.parametrize("kind", ["anderson", "identity"])
def test_pairs_are_true_with_averaging(store_each_nth, momentum, kind):
    evaluate = Map(store_each_nth=store_each_nth, momentum=momentum)
    x, optimizer = evaluate.accelerated(average="always", acceleration_type=kind, average_window=3)
    y, unaveraged = evaluate.accelerated()
    for number in range(1, 10):
        evaluate.run(x, optimizer, store_each_nth)
        evaluate.run(y, unaveraged, store_each_nth)
        assert_true_pairs(evaluate, optimizer, min(number, 5))
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["averaging"] and statistics["accepted"] >= 3 and not torch.allclose(x, y, rtol=1e-3)


@pytest.mark.parametrize("in_place", [True, False])
def test_pairs_are_true_after_somebody_else_moved_the_parameters(in_place):
    evaluate = Map()
    x, optimizer = evaluate.accelerated()
    for number in range(1, 10):
        evaluate.run(x, optimizer, 1)
        with torch.no_grad():
            if in_place:
                x.mul_(0.9)
            else:
                x.data = 0.9 * x.data
        assert_true_pairs(evaluate, optimizer, min(number, 5))
