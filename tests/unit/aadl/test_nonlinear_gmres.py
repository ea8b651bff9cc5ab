"""Nonlinear GMRES on residuals: the textbook, exact relations, what users' loops do to it, resumes, and ranks."""

import copy
import math
import warnings

import gloo
import numpy as np
import pytest
import torch
import torch.distributed as dist
from parallel_runs import replica, shard
from small_runs import identical
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import aadl
from aadl import advice, nonlinear_gmres, pace
from aadl.least_squares import STEPS, change_by_steps
from aadl.mixing import Gram
from aadl.pace import Pace, clears_momentum

DOUBLE = torch.float64
INPUTS = torch.linspace(-1, 1, 192, dtype=DOUBLE).reshape(64, 3)
TARGETS = torch.sin(3 * INPUTS).sum(1, keepdim=True)
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OFTEN = {"frequency": 2, "history_depth": 6}


class SignSGD(torch.optim.Optimizer):
    """Steps of one length in every weight."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def residuals_of(model, rows=slice(None)):
    return model(INPUTS[rows]) - TARGETS[rows]


def loss_of(model):
    return float(residuals_of(model).detach().square().sum())


def accelerated(model, optimizer, observe=True, **settings):
    """Attach nonlinear GMRES; the residuals come from the closure, or from a function."""
    given = {} if observe else {"residuals": lambda: residuals_of(model)}
    return aadl.accelerator_of(aadl.accelerate(optimizer, "nonlinear_gmres", **given, **settings))


def closure_of(model, optimizer, rows=slice(None), observe=True):
    """The closure of a user; whatever is not accelerated has nothing to observe."""
    accelerator = aadl.attached.find_accelerator(optimizer)

    def closure():
        optimizer.zero_grad()
        residuals = residuals_of(model, rows)
        if observe and accelerator is not None:
            accelerator.observe(residuals)
        loss = residuals.square().mean()
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, observe=True):
    closure = closure_of(model, optimizer, observe=observe)
    for _ in range(steps):
        optimizer.step(closure)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# ---- the textbook ----------------------------------------------------------------------------------------------------


class Textbook:
    """Washio and Oosterlee's nonlinear GMRES on lists of pairs, by an orthogonal factorization, without a shortcut."""

    def __init__(self, residual, x, depth, damping, rows_per_column=8):
        self.residual, self.pairs, self.depth, self.damping = residual, [(x, residual(x))], depth, damping
        self.rows_per_column = rows_per_column

    def advance(self, x, accelerate):
        """The point where the optimizer has led, or a better one."""
        r = self.residual(x)
        self.pairs = [*self.pairs, (x, r)][-self.depth - 1 :]
        if not accelerate:
            return x
        most = max(1, len(r) // self.rows_per_column)
        earlier = self.pairs[:-1][-most:]
        ways = np.stack([r_j - r for _, r_j in earlier], axis=1)
        lengths = np.linalg.norm(ways, axis=0)
        unit = ways / lengths
        system = np.concatenate([unit, math.sqrt(self.damping) * np.eye(unit.shape[1])])
        right = np.concatenate([-r, np.zeros(unit.shape[1])])
        gamma = np.linalg.lstsq(system, right, rcond=None)[0] / lengths
        candidate = x + sum(g * (x_j - x) for g, (x_j, _) in zip(gamma, earlier, strict=True))
        after, before, predicted = self.residual(candidate), r @ r, np.sum((r + ways @ gamma) ** 2)
        accepted = after @ after < before
        ratio = (before - after @ after) / (before - predicted)
        if accepted and ratio > 0.75:
            self.damping = max(self.damping / 3, 1e-2)
        elif not accepted or ratio < 0.25:
            self.damping *= 4
        if not accepted:
            return x
        self.pairs = [*self.pairs, (candidate, after)][-self.depth - 1 :]
        return candidate


@pytest.mark.parametrize("observe", [True, False])
@pytest.mark.parametrize("frequency", [1, 3])
def test_iterates_are_those_of_the_textbook(observe, frequency):
    """The map is gradient descent; the textbook makes every evaluation of its own."""
    model, twin_model = network(), network()
    optimizer, descent = SGD(model.parameters(), lr=0.2), SGD(twin_model.parameters(), lr=0.2)
    accelerator = accelerated(
        model, optimizer, observe, frequency=frequency, history_depth=5, wait_iterations=0, reg_acc=1e-2
    )

    def residual(x):
        torch.nn.utils.vector_to_parameters(torch.tensor(x), twin_model.parameters())
        return residuals_of(twin_model).detach().reshape(-1).numpy()

    x = flat(twin_model).numpy().copy()
    twin = Textbook(residual, x, 5, 1e-2)
    if not observe:
        twin.pairs = []  # the function is not asked before the first step
    for step in range(1, 31):
        train(model, optimizer, 1, observe)
        residual(x)
        descent.zero_grad()
        residuals_of(twin_model).square().mean().backward()
        descent.step()
        due = step % frequency == 0
        looks = step == frequency and (observe or frequency == 1)  # whether the points stay, or for a first pair
        x = twin.advance(flat(twin_model).numpy().copy(), due and not looks)
        assert np.allclose(flat(model).numpy(), x, rtol=0, atol=1e-9), step
    assert accelerator.statistics["accepted"] >= 3


# ---- exact relations -------------------------------------------------------------------------------------------------


def linear_problem(rows=100, columns=6):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=generator, dtype=DOUBLE)
    right = torch.randn(rows, generator=generator, dtype=DOUBLE)
    return matrix, right


def cgls(matrix, right, steps):
    """Conjugate gradients for least squares from zero: the iterates of smallest residual in the Krylov spaces."""
    x = torch.zeros(matrix.shape[1], dtype=DOUBLE)
    residual = right.clone()
    gradient = direction = matrix.T @ residual
    iterates = [x]
    for _ in range(steps):
        image = matrix @ direction
        length = gradient @ gradient / (image @ image)
        x, residual = x + length * direction, residual - length * image
        new = matrix.T @ residual
        direction, gradient = new + new @ new / (gradient @ gradient) * direction, new
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_on_a_linear_problem_the_iterates_are_those_of_cgls(frequency):
    """Periodic equivalence (arXiv 2506.01081): with all pairs and gradient descent, every accelerated iterate is the
    CGLS iterate of as many steps, whatever the period."""
    matrix, right = linear_problem()
    weights = nn.Parameter(torch.zeros(6, dtype=DOUBLE))
    optimizer = SGD([weights], lr=0.01)
    settings = {"frequency": frequency, "history_depth": 12, "wait_iterations": 0, "reg_acc": 0}
    aadl.accelerate(optimizer, "nonlinear_gmres", residuals=lambda: matrix @ weights - right, **settings)
    accelerator = aadl.accelerator_of(optimizer)
    expected = cgls(matrix, right, 6)
    with torch.no_grad():  # the pair of the initial weights
        accelerator._lay_out(optimizer)
        accelerator._store(matrix @ weights.detach() - right)
    reached = 0
    for step in range(1, 5 if frequency == 1 else 7):
        weights.grad = matrix.T @ (matrix @ weights.detach() - right)
        optimizer.step()
        if step % frequency == 0:
            reached += 1
            assert torch.allclose(weights.detach(), expected[step], rtol=0, atol=1e-8), step
    assert reached >= 2 and accelerator.statistics["accepted"] == reached


def test_one_acceleration_is_a_gauss_newton_step_in_the_span_of_the_weights():
    """Weights far from the solution, two pairs, no damping: the step minimizes the linear model of the chord."""
    matrix, right = linear_problem(columns=3)
    weights = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    optimizer = SGD([weights], lr=0.002)
    settings = {"frequency": 3, "wait_iterations": 0, "reg_acc": 0}
    accelerator = aadl.accelerator_of(
        aadl.accelerate(optimizer, "nonlinear_gmres", residuals=lambda: matrix @ weights - right, **settings)
    )
    points = []
    handle = optimizer.register_step_pre_hook(lambda *_: points.append(weights.detach().clone()))
    for _ in range(3):
        weights.grad = matrix.T @ (matrix @ weights.detach() - right)
        optimizer.step()
    handle.remove()
    last = points[2] - 0.002 * matrix.T @ (matrix @ points[2] - right)  # where the third step has led
    span = torch.stack([points[1] - last, points[2] - last], dim=1)
    image = matrix @ span
    gamma = torch.linalg.lstsq(image, right - matrix @ last).solution
    assert torch.allclose(weights.detach(), last + span @ gamma, rtol=0, atol=1e-10)
    assert accelerator.statistics["accepted"] == 1 and accelerator.statistics["numerical_rank"] == 2


# ---- never above plain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [SGD, ADAM])
def test_a_candidate_is_taken_only_where_the_sum_of_squares_falls(optimizer_class):
    model = network()
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    losses = []
    optimizer.register_step_post_hook(lambda *_: losses.append(loss_of(model)))  # sees what the step leaves
    accelerator = accelerated(model, optimizer, observe=False, frequency=1)
    plain = []
    register = optimizer.register_step_post_hook(lambda *_: plain.append(loss_of(model)))
    optimizer._optimizer_step_post_hooks.move_to_end(register.id, last=False)  # before the accelerator
    train(model, optimizer, 40, observe=False)
    assert all(after <= before for before, after in zip(plain, losses, strict=True))
    assert (
        sum(after < before for before, after in zip(plain, losses, strict=True)) == accelerator.statistics["accepted"]
    )
    assert accelerator.statistics["accepted"] > 20


def test_a_check_on_other_points_can_refuse_a_candidate():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    aadl.accelerate(
        optimizer, "nonlinear_gmres", residuals=lambda: residuals_of(model), check=lambda: torch.ones(3), **OFTEN
    )
    train(model, optimizer, 12, observe=False)
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["accepted"] == 0 and counts["rejected"]["check"] > 0
    twin = network()
    train(twin, SGD(twin.parameters(), lr=0.05), 12)
    assert torch.equal(flat(model), flat(twin))  # a refused candidate leaves no trace


def test_few_residuals_get_few_coefficients():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    rows = slice(0, 3)
    settings = OFTEN | {"history_depth": 20}
    aadl.accelerate(optimizer, "nonlinear_gmres", residuals=lambda: residuals_of(model, rows), **settings)
    train(model, optimizer, 12, observe=False)
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["attempts"] > 0 and counts["numerical_rank"] == 1  # of three numbers


# ---- what users' loops do --------------------------------------------------------------------------------------------


def test_a_plain_loop_may_observe_before_the_step():
    ends = []
    for with_closure in (True, False):
        model = network()
        optimizer = ADAM(model.parameters(), lr=0.02)
        accelerator = accelerated(model, optimizer, observe=False, **OFTEN)
        closure = closure_of(model, optimizer)
        for _ in range(20):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        ends.append((flat(model), accelerator.statistics))
    assert torch.equal(ends[0][0], ends[1][0]) and identical(ends[0][1], ends[1][1])
    assert ends[0][1]["accepted"] > 5


def test_parts_that_micro_batches_hand_over_are_one_vector():
    """Gradient accumulation and several terms: as if the whole batch had been one."""
    ends = []
    for parts in ([slice(None)], [slice(0, 20), slice(20, 50), slice(50, None)]):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.05)
        accelerator = accelerated(model, optimizer, reg_acc=1e-2, **OFTEN)

        def closure(parts=parts, model=model, optimizer=optimizer, accelerator=accelerator):
            optimizer.zero_grad()
            for rows in parts:
                residuals = residuals_of(model, rows)
                accelerator.observe(residuals)
                (residuals.square().sum() / 64).backward()
            return loss_of(model)

        for _ in range(12):
            optimizer.step(closure)
        ends.append(flat(model))
        assert accelerator.statistics["accepted"] > 2
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-8)


def test_points_that_change_unannounced_are_noticed_and_nothing_is_learned_from_them():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = accelerated(model, optimizer, **OFTEN)
    for step in range(20):  # mini-batches of one size
        rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
        optimizer.step(closure_of(model, optimizer, rows))
    counts = accelerator.statistics
    assert counts["attempts"] == 0 and counts["resets"]["points"] > 3
    twin = network()
    plain = SGD(twin.parameters(), lr=0.05)
    for step in range(20):
        rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
        plain.step(closure_of(twin, plain, rows))
    assert torch.equal(flat(model), flat(twin))


def test_points_of_another_number_start_the_history_again():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = accelerated(model, optimizer, **OFTEN)
    for rows in [slice(0, 32)] * 7 + [slice(0, 48)] * 7:
        optimizer.step(closure_of(model, optimizer, rows))
    assert accelerator.statistics["accepted"] > 2
    assert accelerator.history.residuals.row.numel == 48


def test_reset_forgets_the_pairs():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = accelerated(model, optimizer, **OFTEN)
    train(model, optimizer, 7)
    assert accelerator.num_columns > 4
    aadl.reset_history(optimizer)
    assert accelerator.num_columns == 0 and accelerator.statistics["resets"] == {"user": 1}
    train(model, optimizer, 7)
    assert accelerator.statistics["attempts"] > 4


def test_weights_that_somebody_moves_between_observation_and_step_make_no_pair():
    """A pair is what was evaluated at these very weights."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = accelerated(model, optimizer, observe=False, frequency=100)
    closure = closure_of(model, optimizer)
    for _ in range(5):
        closure()
        with torch.no_grad():
            model[0].weight.add_(0.1)
        optimizer.step()
    assert accelerator.num_columns == 0
    for _ in range(5):
        closure()
        optimizer.step()
    assert accelerator.num_columns == 4


def test_a_line_search_observes_many_points_and_the_first_counts():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    accelerator = accelerated(model, optimizer, frequency=2)
    pairs = []
    optimizer.register_step_pre_hook(lambda *_: pairs.append(flat(model)))
    train(model, optimizer, 6)
    assert accelerator.statistics["attempts"] > 0
    plain = network()
    train(plain, torch.optim.LBFGS(plain.parameters(), max_iter=4, line_search_fn="strong_wolfe"), 6)
    assert loss_of(model) < 1.01 * loss_of(plain)


def test_an_exception_in_the_closure_spoils_no_pair():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = accelerated(model, optimizer, **OFTEN)
    train(model, optimizer, 3)
    closure = closure_of(model, optimizer)

    def failing():
        closure()
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(failing)
    train(model, optimizer, 9)
    assert accelerator.statistics["accepted"] > 1


def test_an_exception_on_trial_puts_the_plain_iterate_back():
    model, calls = network(), []

    def residuals():
        calls.append(1)
        if len(calls) == 4:  # at the candidate
            raise RuntimeError("on trial")
        return residuals_of(model)

    optimizer = SGD(model.parameters(), lr=0.05)
    aadl.accelerate(optimizer, "nonlinear_gmres", residuals=residuals, frequency=3)
    twin = network()
    plain = SGD(twin.parameters(), lr=0.05)
    train(twin, plain, 3)
    with pytest.raises(RuntimeError, match="on trial"):
        train(model, optimizer, 3, observe=False)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("observe", [True, False])
def test_residuals_that_are_not_finite_start_the_history_again(observe):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    bad = []

    def residuals():
        return residuals_of(model) * (math.nan if bad else 1.0)

    accelerator = aadl.accelerator_of(
        aadl.accelerate(optimizer, "nonlinear_gmres", residuals=None if observe else residuals, **OFTEN)
    )

    def closure():
        optimizer.zero_grad()
        if observe:
            accelerator.observe(residuals())
        loss = residuals_of(model).square().mean()
        loss.backward()
        return loss

    for step in range(16):
        bad[:] = [1] if step == 5 else []
        optimizer.step(closure)
    counts = accelerator.statistics
    assert counts["resets"]["non_finite"] == 1 and counts["accepted"] > 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_complex_weights_and_residuals_are_pairs_of_reals():
    torch.manual_seed(0)
    matrix, right = torch.randn(30, 4, dtype=torch.complex128), torch.randn(30, dtype=torch.complex128)
    weights = nn.Parameter(torch.zeros(4, dtype=torch.complex128))
    optimizer = SGD([weights], lr=0.01)
    accelerator = aadl.accelerator_of(aadl.accelerate(optimizer, "nonlinear_gmres", frequency=2))

    def closure():
        optimizer.zero_grad()
        residuals = matrix @ weights - right
        accelerator.observe(residuals)
        loss = residuals.abs().square().mean()
        loss.backward()
        return loss

    for _ in range(40):
        optimizer.step(closure)
    best = torch.linalg.lstsq(matrix, right).solution
    assert float((weights.detach() - best).abs().max()) < 1e-2
    assert accelerator.statistics["accepted"] > 5


def test_float32_weights_have_products_in_float64_and_bfloat16_rows_save_memory():
    ends = {}
    for dtype in (None, torch.bfloat16):
        model = network().float()
        optimizer = ADAM(model.parameters(), lr=0.02)
        residuals = [lambda model=model: model(INPUTS.float()) - TARGETS.float()]
        aadl.accelerate(optimizer, "nonlinear_gmres", residuals=residuals[0], history_dtype=dtype, **OFTEN)
        for _ in range(20):
            optimizer.zero_grad()
            residuals[0]().square().mean().backward()
            optimizer.step()
        accelerator = aadl.accelerator_of(optimizer)
        assert accelerator.history._matrix.dtype == torch.float64
        ends[dtype] = accelerator.history_bytes, accelerator.statistics["accepted"]
    elements = 41 + 64
    assert ends[None][0] == (6 + 2) * 4 * elements
    assert ends[torch.bfloat16][0] == (6 * 2 + 2 * 4) * elements
    assert min(accepted for _, accepted in ends.values()) > 5


def test_no_momentum_is_left_where_it_is_to_be_zeroed():
    seen = {}
    for momentum in ("keep", "zero"):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        accelerator = accelerated(model, optimizer, frequency=5, momentum=momentum)
        while not accelerator.statistics["accepted"]:
            train(model, optimizer, 5)
        buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        seen[momentum] = accelerator.statistics["accepted"], max(float(b.abs().max()) for b in buffers)
    assert seen["zero"][1] == 0 < seen["keep"][1]


# ---- the pace --------------------------------------------------------------------------------------------------------


def test_steps_that_undo_what_was_gained_make_accelerations_more_frequent():
    """A large rate with momentum: accelerated ten steps apart, such a training ends above the plain one."""
    periods, ends = {}, {}
    for frequency in (None, 10):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.4, momentum=0.9)
        accelerator = accelerated(model, optimizer, frequency=frequency)
        train(model, optimizer, 200)
        periods[frequency], ends[frequency] = accelerator.statistics["period"], loss_of(model)
    assert periods[None] < periods[10] == 10
    assert ends[None] < 0.5 * ends[10]


def test_points_learned_by_heart_make_accelerations_rare():
    own = Pace(10, adapts=True, due=10)
    for square in (1.0, 4.0, 16.0, 64.0):
        own.note_square(square, normalized=False)
    assert own.period == pace.SHORTEST and own.is_fast
    own.before = math.nan  # new points
    periods = []
    for jump in (1.3, 1.6, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.3, 1.1, 0.9, 0.0):
        own.note_jump(jump)
        own.note_square(1e9, normalized=False)
        periods.append(own.period)
        own.before = math.nan
    assert periods == [2, 10, 20, 40, 80, 160, 160, 160, 160, 80, 40, 40]


def test_only_steps_whose_length_is_free_shorten_the_period():
    for normalized, period in ((True, 10), (False, 5)):
        own = Pace(10, adapts=True, due=10)
        for square in (1.0, 4.0):
            own.note_square(square, normalized)
        assert own.period == period


def test_gains_that_normalized_steps_undo_are_left_alone():
    """Steps of one length go back and forth over the valley until the rate falls; then candidates are kept."""

    def train_with(kind, is_accelerated, **arguments):
        model = network()
        optimizer = kind(model.parameters(), **arguments)
        accelerator = accelerated(model, optimizer) if is_accelerated else None
        train(model, optimizer, 100)
        early = flat(model), None if accelerator is None else dict(accelerator.statistics)
        for group in optimizer.param_groups:
            group["lr"] = 1e-5
        train(model, optimizer, 100)
        return early, accelerator, loss_of(model)

    (start, _), _, plain = train_with(SignSGD, False, lr=0.05)
    (same, early), accelerator, end = train_with(SignSGD, True, lr=0.05)
    assert torch.equal(start, same)
    assert early["accepted"] == 0 < early["rejected"]["steps"]
    assert accelerator.statistics["accepted"] > 0 and end < 0.9 * plain
    _, accelerator, _ = train_with(SGD, True, lr=0.05)
    assert "steps" not in accelerator.statistics["rejected"]


def test_what_steps_change_is_read_from_the_products():
    residuals = torch.tensor([[4.0, 0.0, 1.0], [3.0, 1.0, 1.0], [3.0, -1.0, 0.0], [2.0, 1.0, 0.5]], dtype=DOUBLE)
    for rows in (residuals, residuals.flip(0)):
        steps, newest = rows.diff(dim=0), rows[-1]
        gram = Gram(steps @ steps.T, steps @ newest, float(newest @ newest))
        moved, gained = steps.square().sum(1).mean(), -rows.square().sum(1).diff().mean()
        assert change_by_steps(gram) == pytest.approx(max(float(moved), STEPS * float(gained)))


def test_the_jump_at_a_change_of_points_is_that_of_the_mean_square():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    accelerator = accelerated(model, optimizer, **OFTEN)
    jumps, seen = [], []
    note = accelerator.pace.note_jump
    accelerator.pace.note_jump = lambda jump: (jumps.append(jump), note(jump))
    for rows in [slice(0, 16)] * 7 + [slice(16, 64)] * 5:
        if len(seen) == 7:
            aadl.reset_history(optimizer)
        seen.append(float(residuals_of(model, rows).detach().square().mean()))
        optimizer.step(closure_of(model, optimizer, rows))
    assert [jump for jump in jumps if jump] == [pytest.approx(seen[7] / seen[6])]


def test_momentum_is_kept_where_steps_are_normalized_and_accelerations_are_rare():
    fast, slow = Pace(10, True, 0, period=2), Pace(10, True, 0)
    model = network()
    adam, muon = ADAM(model.parameters()), torch.optim.Muon([model[0].weight])
    assert clears_momentum("auto", fast, adam) and not clears_momentum("auto", slow, adam)
    assert not clears_momentum("auto", fast, muon)
    assert clears_momentum("zero", slow, muon) and not clears_momentum("keep", fast, adam)


# ---- refusals and warnings -------------------------------------------------------------------------------------------


def test_misuse_gets_one_sentence():
    model = network()

    def fresh():
        return SGD(model.parameters(), lr=0.1)

    for name, value in {
        "relaxation": 0.5, "average": True, "safeguard": False, "state_coupling": "combine", "shard_history": True,
        "history_device": "cpu", "local_sgd": True, "residuals": 1, "check": "points", "momentum": "half",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            aadl.accelerate(fresh(), "nonlinear_gmres", **{name: value})
    with pytest.raises(ValueError, match="residuals must be None with acceleration_type='anderson'"):
        aadl.accelerate(fresh(), residuals=lambda: torch.zeros(1))
    with pytest.raises(ValueError, match=r"observe needs .*nonlinear_gmres"):
        aadl.accelerator_of(aadl.accelerate(fresh())).observe(torch.zeros(1))
    optimizer = aadl.accelerate(fresh(), "nonlinear_gmres")
    with pytest.raises(ValueError, match="step was called without a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="this closure called no observe"):
        for _ in range(10):
            optimizer.step(lambda: residuals_of(model).square().mean())
    optimizer = aadl.accelerate(fresh(), "nonlinear_gmres")
    closure = closure_of(model, optimizer)
    closure.__module__ = "lightning.pytorch.loops"
    with pytest.raises(ValueError, match=r"needs residuals=fn here: the closure belongs to the loop of a framework"):
        optimizer.step(closure)
    optimizer = aadl.accelerate(fresh(), "nonlinear_gmres", residuals=lambda: 3.0, frequency=2)
    with pytest.raises(ValueError, match="residuals must return a tensor, or a list of tensors, got float"):
        train(model, optimizer, 2, observe=False)


def test_a_history_of_depth_zero_leaves_the_optimizer_alone():
    model, twin = network(), network()
    optimizer = aadl.accelerate(SGD(model.parameters(), lr=0.05), "nonlinear_gmres", history_depth=0)
    train(model, optimizer, 12)
    train(twin, SGD(twin.parameters(), lr=0.05), 12)
    assert torch.equal(flat(model), flat(twin))


def test_one_warning_where_nothing_is_ever_accepted():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    aadl.accelerate(
        optimizer, "nonlinear_gmres", residuals=lambda: residuals_of(model), check=lambda: torch.ones(3), frequency=1
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 3 * advice.EVENTS, observe=False)
    (warning,) = caught
    assert "aadl has accepted no candidate" in str(warning.message) and "check" in str(warning.message)


# ---- verdicts of a device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", ["keep", "zero"])
@pytest.mark.parametrize("frequency", [1, 3])
def test_a_device_decides_as_the_host_does(momentum, frequency, monkeypatch):
    ends = []
    for on_host in (True, False):
        if not on_host:
            monkeypatch.setattr(nonlinear_gmres, "on_host", lambda number: False)
        model = network()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.5)
        accelerator = accelerated(model, optimizer, frequency=frequency, history_depth=6, momentum=momentum)
        train(model, optimizer, 30)
        ends.append((flat(model), accelerator.statistics))
    (weights, counts), (others, later) = ends
    assert counts["accepted"] > 3
    assert counts["rejected"] == later["rejected"] or not counts["rejected"]
    assert torch.allclose(weights, others, rtol=0, atol=1e-3)  # a rejection costs the device the oldest column


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_after", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("observe", [True, False])
@pytest.mark.parametrize("optimizer_class", [SGD, ADAM])
def test_a_resumed_run_repeats_the_uninterrupted_one(saved_after, observe, optimizer_class, tmp_path):
    def start():
        model = network()
        optimizer = optimizer_class(model.parameters(), lr=0.02)
        return model, optimizer, accelerated(model, optimizer, observe, frequency=4, history_depth=5)

    model, optimizer, accelerator = start()
    train(model, optimizer, saved_after, observe)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 20, observe)
    assert accelerator.statistics["accepted"] > 2

    again, resumed, continued = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, 20, observe)
    assert torch.equal(flat(model), flat(again))
    assert identical(accelerator.statistics, continued.statistics)


def test_states_that_do_not_fit_are_refused_or_start_the_history_again():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    accelerator = accelerated(model, optimizer, frequency=4, history_depth=5)
    train(model, optimizer, 7)
    state = copy.deepcopy(accelerator.state_dict())
    deeper = SGD(model.parameters(), lr=0.02)
    other = accelerated(model, deeper, frequency=4, history_depth=9)
    other.load_state_dict(state)
    assert other.num_columns == 0 and other.statistics["resets"] == {"resumed": 1}
    train(model, deeper, 8)
    assert other.statistics["attempts"] > state_attempts(state)
    plain = aadl.accelerate(SGD(model.parameters(), lr=0.02))
    anderson = aadl.accelerator_of(plain)
    with pytest.raises(ValueError, match="acceleration_type='nonlinear_gmres'"):
        anderson.load_state_dict(state)
    with pytest.raises(ValueError, match=r"acceleration_type=.*this one acceleration_type='nonlinear_gmres'"):
        accelerator.load_state_dict(anderson.state_dict())
    with pytest.raises(ValueError, match="damaged"):
        accelerator.load_state_dict({**state, "values": "{}"})
    smaller = nn.Linear(2, 1).double()
    narrow = SGD(smaller.parameters(), lr=0.02)
    with pytest.raises(ValueError, match=r"other parameters|other shapes"):
        accelerated(smaller, narrow, frequency=4, history_depth=5).load_state_dict(state)


def state_attempts(state):
    import json

    return json.loads(state["values"])["statistics"]["attempts"]


def test_the_weights_of_a_model_may_be_exchanged_by_a_load():
    """Pairs stay true whatever the weights are; the next one is stored from where they are now."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = accelerated(model, optimizer, **OFTEN)
    train(model, optimizer, 6)
    model.load_state_dict(network().state_dict())
    before = loss_of(model)
    train(model, optimizer, 6)
    assert loss_of(model) < before and accelerator.statistics["attempts"] > 4


def test_removal_leaves_the_plain_optimizer():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerated(model, optimizer, **OFTEN)
    train(model, optimizer, 5)
    twin = copy.deepcopy(model)
    aadl.remove_acceleration(optimizer)
    assert "aadl" not in optimizer.state_dict()
    train(model, optimizer, 5)
    train(twin, SGD(twin.parameters(), lr=0.05), 5)
    assert torch.equal(flat(model), flat(twin))


# ---- ranks -----------------------------------------------------------------------------------------------------------


def on_ranks(rank, world_size, wrapper, frequency, saved_after=None):
    """Each rank has its own rows; returns weights, counters and the number of sums over ranks."""
    model = network()
    own = slice(rank * 64 // world_size, (rank + 1) * 64 // world_size)
    if wrapper == "shard":
        model = shard(model, init_device_mesh("cpu", (world_size,)))
        forward = model
    elif world_size > 1:
        forward = replica(model, rank, world_size)
    else:
        forward = model
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = aadl.accelerator_of(
        aadl.accelerate(optimizer, "nonlinear_gmres", frequency=frequency, history_depth=5, reg_acc=1e-2)
    )

    def closure():
        optimizer.zero_grad()
        residuals = forward(INPUTS[own]) - TARGETS[own]
        accelerator.observe(residuals)
        loss = residuals.square().mean()
        loss.backward()
        return loss

    sums = []
    if world_size > 1:
        original = aadl.ranks.dist.all_reduce

        def counting(tensor, *args, **kwargs):
            sums.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        aadl.ranks.dist.all_reduce = counting
    saved = None
    for step in range(1, 25):
        optimizer.step(closure)
        if step == saved_after:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if world_size > 1:
        aadl.ranks.dist.all_reduce = original
    ends = whole(model), accelerator.statistics, sums
    if saved is None:
        return ends
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for _ in range(24 - saved_after):
        optimizer.step(closure)
    return (*ends, whole(model), accelerator.statistics)


def whole(model):
    parts = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
    return torch.cat([p.reshape(-1) for p in parts])


@pytest.mark.parametrize("wrapper", ["replica", "shard"])
@pytest.mark.parametrize("frequency", [1, 4])
def test_ranks_with_rows_of_their_own_are_one_process_with_all_rows(wrapper, frequency, tmp_path):
    alone, counts, _ = on_ranks(0, 1, "replica", frequency)
    results = gloo.spawn_ranks(tmp_path / "ranks", on_ranks, 2, wrapper, frequency)
    for weights, statistics, sums in results:
        assert torch.allclose(weights, alone, rtol=0, atol=1e-6)
        assert [statistics[name] for name in ("attempts", "accepted")] == [
            counts[name] for name in ("attempts", "accepted")
        ]
        assert counts["accepted"] > 2
        by_us = [count for count in sums if count <= 5 * 5 + 5 + 4]
        assert len(by_us) <= 2 * (24 // frequency) + 2  # products and verdict, and one message about memory
    assert torch.equal(results[0][0], results[1][0])


def test_replicas_resume_bit_for_bit_each_with_its_own_rows(tmp_path):
    for weights, counts, _, again, resumed in gloo.spawn_ranks(tmp_path / "ranks", on_ranks, 2, "replica", 4, 11):
        assert torch.equal(weights, again) and identical(counts, resumed)
        assert counts["accepted"] > 2


def loads_of_rank_zero(rank, world_size, steps):
    """A checkpoint of rank 0 alone, loaded by both; the run goes on, from a history that starts again."""
    model = network()
    forward = replica(model, rank, world_size)
    own = slice(32 * rank, 32 * rank + 32)
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = aadl.accelerator_of(aadl.accelerate(optimizer, "nonlinear_gmres", frequency=4, history_depth=5))

    def closure():
        optimizer.zero_grad()
        residuals = forward(INPUTS[own]) - TARGETS[own]
        accelerator.observe(residuals)
        loss = residuals.square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    saved = [(model.state_dict(), optimizer.state_dict())]
    dist.broadcast_object_list(saved, src=0)
    model.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    columns = accelerator.num_columns
    for _ in range(12):
        optimizer.step(closure)
    return whole(model), columns, accelerator.statistics


@pytest.mark.parametrize("steps", [4, 10])
def test_the_state_of_another_rank_costs_the_pairs_and_nothing_else(steps, tmp_path):
    """After 4 steps the points were not compared yet, and rank 1 has nothing to compare with."""
    (first, columns, counts), (second, others, _) = gloo.spawn_ranks(tmp_path / "ranks", loads_of_rank_zero, 2, steps)
    assert torch.equal(first, second)
    assert columns > 0 and others == 0
    assert counts["accepted"] > 0
