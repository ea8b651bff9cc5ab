"""Nonlinear GMRES on residuals: the textbook, exact relations, what users' loops do to it, and resumes."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from residual_runs import (
    ADAM,
    INPUTS,
    OFTEN,
    SGD,
    TARGETS,
    attach,
    closure_of,
    loss_of,
    network,
    residuals_of,
    started,
    train,
    trained_plainly,
)
from small_runs import flat, identical, register_first
from small_runs import train as train_plainly
from torch import nn

import aadl
from aadl import advice, nonlinear_gmres

DOUBLE = torch.float64


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
    settings = {"frequency": frequency, "history_depth": 5, "wait_iterations": 0, "reg_acc": 1e-2}
    model, optimizer, accelerator = started(lr=0.2, observe=observe, **settings)
    twin_model = network()
    descent = SGD(twin_model.parameters(), lr=0.2)

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
    accelerator = attach(optimizer, residuals=lambda: matrix @ weights - right, **settings)
    expected = cgls(matrix, right, 6)
    reached = 0
    for step in range(1, 5 if frequency == 1 else 7):
        residuals = matrix @ weights.detach() - right
        accelerator.observe(residuals)
        weights.grad = matrix.T @ residuals
        optimizer.step()
        if step % frequency == 0:
            reached += 1
            assert torch.allclose(weights.detach(), expected[step], rtol=0, atol=1e-8), step
    assert reached >= 2 and accelerator.statistics["accepted"] == reached


# ---- never above plain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SGD, ADAM])
def test_a_candidate_is_taken_only_where_the_sum_of_squares_falls(make):
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    losses, plain = [], []
    optimizer.register_step_post_hook(lambda *_: losses.append(loss_of(model)))  # sees what the step leaves
    accelerator = attach(optimizer, residuals=lambda: residuals_of(model), frequency=1)
    register_first(optimizer, lambda *_: plain.append(loss_of(model)))
    train(model, optimizer, 40, observe=False)
    assert all(after <= before for before, after in zip(plain, losses, strict=True))
    lower = sum(after < before for before, after in zip(plain, losses, strict=True))
    assert lower == accelerator.statistics["accepted"] > 20


def test_a_check_on_other_points_can_refuse_a_candidate():
    model, optimizer, accelerator = started(observe=False, check=lambda: torch.ones(3), **OFTEN)
    train(model, optimizer, 12, observe=False)
    counts = accelerator.statistics
    assert counts["accepted"] == 0 and counts["rejected"]["check"] > 0
    assert torch.equal(flat(model), trained_plainly(12))  # a refused candidate leaves no trace


def test_a_check_sees_the_same_random_numbers_at_both_places():
    def residuals():
        return residuals_of(model) + 0.0 * torch.rand(1)

    model, optimizer, accelerator = started(residuals=residuals, check=lambda: torch.rand(3), **OFTEN)
    train(model, optimizer, 20, observe=False)
    counts = accelerator.statistics
    assert counts["accepted"] == 0 and counts["rejected"]["check"] > 3  # no better at the candidate


def test_few_residuals_get_few_coefficients():
    model, optimizer, accelerator = started(history_depth=20, frequency=2)
    for _ in range(12):
        optimizer.step(closure_of(model, optimizer, slice(0, 3)))
    assert accelerator.statistics["attempts"] > 0 and accelerator.statistics["numerical_rank"] == 1  # of three numbers


# ---- what users' loops do --------------------------------------------------------------------------------------------


def test_a_plain_loop_may_observe_before_the_step():
    ends = []
    for with_closure in (True, False):
        model, optimizer, accelerator = started(ADAM, lr=0.02, observe=False, **OFTEN)
        closure = closure_of(model, optimizer)
        for _ in range(20):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        ends.append((flat(model), accelerator.statistics))
    assert identical(*ends) and ends[0][1]["accepted"] > 5


def test_parts_that_micro_batches_hand_over_are_one_vector():
    """Gradient accumulation and several terms: as if the whole batch had been one."""
    ends = []
    for parts in ([slice(None)], [slice(0, 20), slice(20, 50), slice(50, None)]):
        model, optimizer, accelerator = started(reg_acc=1e-2, **OFTEN)

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
    def batch(step):  # mini-batches of one size
        return slice(16 * (step % 4), 16 * (step % 4) + 16)

    model, optimizer, accelerator = started(**OFTEN)
    for step in range(20):
        optimizer.step(closure_of(model, optimizer, batch(step)))
    counts = accelerator.statistics
    assert counts["attempts"] == 0 and counts["resets"]["points"] > 3
    assert torch.equal(flat(model), trained_plainly(20, rows=batch))


@pytest.mark.parametrize("steps", [7, 8])
def test_points_of_another_number_empty_the_history(steps):
    """The first step with them is one after an acceleration, or another one."""
    model, optimizer, accelerator = started(**OFTEN)
    for rows in [slice(0, 32)] * steps + [slice(0, 48)] * 7:
        optimizer.step(closure_of(model, optimizer, rows))
    assert accelerator.statistics["accepted"] > 2
    assert accelerator.statistics["resets"] == {"points": 1}
    assert accelerator.history.residuals.row.numel == 48


def test_reset_forgets_the_pairs():
    model, optimizer, accelerator = started(**OFTEN)
    train(model, optimizer, 7)
    assert accelerator.num_columns > 4
    aadl.reset_history(optimizer)
    assert accelerator.num_columns == 0 and accelerator.statistics["resets"] == {"user": 1}
    train(model, optimizer, 7)
    assert accelerator.statistics["attempts"] > 4


def test_weights_that_somebody_moves_between_observation_and_step_make_no_pair():
    """A pair is what was evaluated at these very weights."""
    model, optimizer, accelerator = started(observe=False, frequency=100)
    closure = closure_of(model, optimizer)
    for moves in (True, False):
        for _ in range(5):
            closure()
            if moves:
                with torch.no_grad():
                    model[0].weight.add_(0.1)
            optimizer.step()
        assert accelerator.num_columns == (0 if moves else 4)


def test_a_line_search_observes_many_points_and_the_first_one_counts():
    make = lambda parameters, lr: torch.optim.LBFGS(parameters, lr, 4, line_search_fn="strong_wolfe")  # noqa: E731
    model, optimizer, accelerator = started(make, lr=1, frequency=2)
    train(model, optimizer, 6)
    assert accelerator.statistics["attempts"] > 0
    plain = network()
    train(plain, make(plain.parameters(), 1), 6)
    assert loss_of(model) < 1.01 * loss_of(plain)


def test_an_exception_in_the_closure_spoils_no_pair():
    model, optimizer, accelerator = started(**OFTEN)
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
    calls = []

    def residuals():
        calls.append(1)
        if len(calls) == 5:  # at the candidate: after three steps, and a second look
            raise RuntimeError("on trial")
        return residuals_of(model)

    model, optimizer, accelerator = started(residuals=residuals, frequency=3)
    with pytest.raises(RuntimeError, match="on trial"):
        train(model, optimizer, 3, observe=False)
    assert torch.equal(flat(model), trained_plainly(3))
    assert accelerator.statistics["attempts"] == 1 and accelerator.statistics["rejected"] == {"closure": 1}


@pytest.mark.parametrize("observe", [True, False])
def test_residuals_that_are_not_finite_empty_the_history(observe):
    bad = []

    def residuals():
        return residuals_of(model) * (math.nan if bad else 1.0)

    model, optimizer, accelerator = started(residuals=None if observe else residuals, **OFTEN)

    def closure():
        if observe:
            accelerator.observe(residuals())
        return closure_of(model, optimizer, observe=False)()

    for step in range(16):
        bad[:] = [1] if step == 5 else []
        optimizer.step(closure)
    counts = accelerator.statistics
    assert counts["resets"]["non_finite"] == 1 and counts["accepted"] > 2
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["plain", "conjugated"])
def test_complex_weights_and_residuals_are_pairs_of_reals(kind):
    torch.manual_seed(0)
    matrix, right = torch.randn(30, 4, dtype=torch.complex128), torch.randn(30, dtype=torch.complex128)
    weights = nn.Parameter(torch.zeros(4, dtype=torch.complex128))
    optimizer = SGD([weights], lr=0.01)
    accelerator = attach(optimizer, frequency=2)

    def loss(weights):
        residuals = matrix @ weights - right
        accelerator.observe(residuals if kind == "plain" else residuals.conj())
        return residuals.abs().square().mean()

    train_plainly(weights, optimizer, 40, with_closure=True, loss=loss)
    best = torch.linalg.lstsq(matrix, right).solution
    assert float((weights.detach() - best).abs().max()) < 1e-2
    assert accelerator.statistics["accepted"] > 5


def test_float32_weights_have_products_in_float64_and_bfloat16_rows_save_memory():
    num_bytes = {}
    for dtype in (None, torch.bfloat16):
        model = network().float()
        optimizer = ADAM(model.parameters(), lr=0.02)
        single = lambda model=model, rows=None: model(INPUTS.float()) - TARGETS.float()  # noqa: E731
        accelerator = attach(optimizer, residuals=single, history_dtype=dtype, **OFTEN)
        for _ in range(20):
            optimizer.step(closure_of(model, optimizer, observe=False, residuals=single))
        products = np.array(accelerator.history.plain_state()["matrix"])
        assert (products != products.astype(np.float32)).any()
        num_bytes[dtype] = accelerator.history_bytes
        assert accelerator.statistics["accepted"] > 5
    elements = 41 + 64
    assert num_bytes == {None: (6 + 2) * 4 * elements, torch.bfloat16: (6 * 2 + 2 * 4) * elements}


def test_no_momentum_is_left_where_it_is_to_be_zeroed():
    largest = {}
    for buffers in ("keep", "zero"):
        model, optimizer, accelerator = started(lr=0.01, momentum=0.9, frequency=5, buffers=buffers)
        while not accelerator.statistics["accepted"]:
            train(model, optimizer, 5)
        largest[buffers] = max(float(optimizer.state[p]["momentum_buffer"].abs().max()) for p in model.parameters())
    assert largest["zero"] == 0 < largest["keep"]


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
    with pytest.raises(ValueError, match="observe takes one tensor a call, got tuple"):
        aadl.accelerator_of(optimizer).observe((torch.zeros(1), torch.zeros(1)))
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
    model, optimizer, _ = started(history_depth=0)
    train(model, optimizer, 12)
    assert torch.equal(flat(model), trained_plainly(12))


def test_one_warning_where_nothing_is_ever_accepted():
    model, optimizer, _ = started(observe=False, check=lambda: torch.ones(3), frequency=1)
    with pytest.warns(UserWarning, match=r"aadl has accepted no candidate.*check") as caught:
        train(model, optimizer, 3 * advice.EVENTS, observe=False)
    assert len(caught) == 1


# ---- verdicts of a device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["keep", "zero"])
@pytest.mark.parametrize("frequency", [1, 3])
def test_a_device_decides_as_the_host_does(buffers, frequency, monkeypatch):
    ends = []
    for on_host in (True, False):
        if not on_host:
            monkeypatch.setattr(nonlinear_gmres, "on_host", lambda number: False)
        model, optimizer, accelerator = started(momentum=0.5, frequency=frequency, history_depth=6, buffers=buffers)
        train(model, optimizer, 30)
        ends.append((flat(model), accelerator.statistics))
    (weights, counts), (others, later) = ends
    assert counts["accepted"] > 3
    assert counts["rejected"] == later["rejected"] or not counts["rejected"]
    assert torch.allclose(weights, others, rtol=0, atol=1e-3)  # a rejection costs the device the oldest column


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_after", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("observe", [True, False])
@pytest.mark.parametrize("make", [SGD, ADAM])
def test_a_resumed_run_repeats_the_uninterrupted_one(saved_after, observe, make, tmp_path):
    settings = {"lr": 0.02, "observe": observe, "frequency": 4, "history_depth": 5}
    model, optimizer, accelerator = started(make, **settings)
    train(model, optimizer, saved_after, observe)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 20, observe)
    assert accelerator.statistics["accepted"] > 2

    again, resumed, continued = started(make, **settings)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, 20, observe)
    assert torch.equal(flat(model), flat(again))
    assert identical(accelerator.statistics, continued.statistics)


def test_states_that_do_not_fit_are_refused_or_empty_the_history():
    model, optimizer, accelerator = started(lr=0.02, frequency=4, history_depth=5)
    train(model, optimizer, 7)
    state = copy.deepcopy(accelerator.state_dict())
    model, deeper, other = started(lr=0.02, frequency=4, history_depth=9)
    other.load_state_dict(state)
    assert other.num_columns == 0 and other.statistics["resets"] == {"resumed": 1}
    train(model, deeper, 8)
    assert other.statistics["attempts"] > json.loads(state["values"])["statistics"]["attempts"]
    plain = aadl.accelerate(SGD(model.parameters(), lr=0.02))
    anderson = aadl.accelerator_of(plain)
    with pytest.raises(ValueError, match="acceleration_type='nonlinear_gmres'"):
        anderson.load_state_dict(state)
    with pytest.raises(ValueError, match="acceleration_type='anderson', this one acceleration_type='nonlinear_gmres'"):
        accelerator.load_state_dict(anderson.state_dict())
    with pytest.raises(ValueError, match="damaged"):
        accelerator.load_state_dict({**state, "values": "{}"})
    narrow = SGD(nn.Linear(2, 1).double().parameters(), lr=0.02)
    narrow_accelerator = attach(narrow, frequency=4, history_depth=5)
    with pytest.raises(ValueError, match=r"other parameters|other shapes"):
        narrow_accelerator.load_state_dict(state)
