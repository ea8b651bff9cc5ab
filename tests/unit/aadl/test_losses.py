"""Losses of the training itself, seen where backward passes begin, take back a candidate that they speak against."""

import copy
import math
import threading

import pytest
import torch
from small_runs import (
    INPUTS,
    TARGETS,
    flat,
    identical,
    is_torchs_engine,
    network,
    sgd,
    snapshot,
    squared_error,
    statistics,
    through_a_file,
    train,
)
from torch.utils.checkpoint import checkpoint

import aadl
from aadl import passes
from aadl.losses import FEWEST, WINDOW, Losses

SETTINGS = {
    "wait_iterations": 10,
    "history_depth": 4,
    "store_each_nth": 5,
    "frequency": 10,
    "average": False,
    "safeguard": "residual",
}
"""A candidate after 20 steps, judged after 25."""
KINDS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def accelerated(make=KINDS["SGD"], **more):
    """A training whose first candidate was accepted by the step before."""
    model = network()
    optimizer = aadl.accelerate(make(model.parameters()), **SETTINGS | more)
    train(model, optimizer, 20)
    assert statistics(optimizer)["accepted"] == 1 and aadl.accelerator_of(optimizer).decisions.accepted
    return model, optimizer


def plus(amount):
    """The loss and a constant: gradients stay as they are."""
    return lambda model: squared_error(model) + amount


def plain_weights(make, steps):
    model = network()
    train(model, make(model.parameters()), steps)
    return flat(model)


@pytest.mark.parametrize("amount", [math.nan, math.inf, 10.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_behind_a_boundary_is_taken_back(kind, amount):
    """Nothing but the loss tells."""
    make = KINDS[kind]
    model, optimizer = accelerated(make)
    train(model, optimizer, 4, loss=plus(amount))
    assert statistics(optimizer)["reverted"] == 0
    train(model, optimizer, 1, loss=plus(amount))
    counts = statistics(optimizer)
    assert counts["reverted"] == 1 and counts["resets"] == ({} if amount == 10 else {"non_finite": 1})
    assert torch.equal(flat(model), plain_weights(make, 20))


@pytest.mark.parametrize(
    ("amounts", "taken_back"),
    [
        ((0, math.nan, 0, 0, 0), 0),
        ((0, 0, 0, 0, math.nan), 0),
        ((0, 0, 0, math.nan, math.nan), 1),
        ((math.nan, 0, math.nan, 0, math.inf), 1),
        ((math.nan, math.nan, 0, 0, 0), 0),
    ],
)
def test_how_many_losses_that_are_not_finite_are_enough(amounts, taken_back):
    """Half of them, or the last two."""
    model, optimizer = accelerated()
    for amount in amounts:
        train(model, optimizer, 1, loss=plus(amount))
    assert statistics(optimizer)["reverted"] == taken_back


@pytest.mark.parametrize("amount", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("distance", [1, 2, 3, 10, 50])
def test_batches_whose_loss_is_never_finite_cost_no_candidate(distance, amount):
    """A label that is masked, or a batch without labels; gradients are as always."""
    runs = []
    for more in (0.0, amount):
        model = network()
        optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.05), safeguard="residual")
        for step in range(1, 401):
            train(model, optimizer, 1, loss=plus(0.0 if step % distance else more))
        runs.append((flat(model), copy.deepcopy(statistics(optimizer))))
    assert identical(*runs) and runs[0][1]["accepted"] > 5


def test_a_loss_that_rises_for_some_steps_only_is_noise():
    model, optimizer = accelerated()
    train(model, optimizer, 4, loss=plus(10.0))
    train(model, optimizer, 6)
    assert statistics(optimizer)["reverted"] == 0


def test_a_boundary_that_momentum_leads_over_later():
    """In the second macro-step, before the next candidate."""
    model, optimizer = accelerated()
    train(model, optimizer, 5)
    assert aadl.accelerator_of(optimizer).decisions.confirmed
    train(model, optimizer, 5, loss=plus(math.nan))
    assert statistics(optimizer)["reverted"] == 1
    assert torch.equal(flat(model), plain_weights(KINDS["SGD"], 20))


def box(weights):
    """A linear loss in a box of logarithmic barriers; its gradients look alike on both sides of a wall."""
    slopes = torch.tensor([1.5, -0.3, -2.2, 0.6, -1.1, -1.4])
    return slopes @ weights - 0.01 * (1 - weights * weights).log().sum()


@pytest.mark.parametrize(
    ("make", "rate"), [(torch.optim.Adam, 3e-3), (torch.optim.RMSprop, 3e-3), (torch.optim.SGD, 3e-3)]
)
def test_a_logarithmic_barrier_holds_without_a_closure(make, rate):
    ends = []
    for accelerate in (False, True):
        weights = torch.nn.Parameter(torch.zeros(6))
        optimizer = make([weights], lr=rate)
        if accelerate:
            aadl.accelerate(optimizer)
        for _ in range(590):  # the last candidate has been judged
            optimizer.zero_grad()
            box(weights).backward()
            optimizer.step()
        ends.append(float(box(weights).detach()))
    assert ends[1] <= ends[0] + 0.02
    assert statistics(optimizer)["accepted"] > 0


@pytest.mark.parametrize(("store_each_nth", "frequency"), [(1, 2), (2, 4), (FEWEST - 1, 2 * FEWEST - 2)])
def test_few_losses_are_no_rise(store_each_nth, frequency):
    settings = SETTINGS | {"store_each_nth": store_each_nth, "frequency": frequency}
    runs = []
    for amount in (0.0, 10.0):
        model = network()
        optimizer = aadl.accelerate(KINDS["SGD"](model.parameters()), **settings)
        for _ in range(60):
            judged = aadl.accelerator_of(optimizer).decisions.accepted is not None
            train(model, optimizer, 1, loss=plus(amount if judged else 0.0))
        runs.append((flat(model), copy.deepcopy(statistics(optimizer))))
    assert identical(*runs) and runs[0][1]["accepted"] > 0


@pytest.mark.parametrize(("amount", "taken_back"), [(10.0, False), (-10.0, True), (math.nan, True)])
def test_where_the_optimizer_maximizes(amount, taken_back):
    """The negative of the loss."""
    runs = []
    for more in (0.0, amount):
        model = network()
        optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02, maximize=True), **SETTINGS)
        train(model, optimizer, 20, loss=lambda model: -squared_error(model))
        train(model, optimizer, 5, loss=lambda model, more=more: more - squared_error(model))
        runs.append(statistics(optimizer)["reverted"])
    assert runs == [0, taken_back]


def test_a_saddle_point_has_no_loss_that_falls():
    model, more = network(), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [more], "maximize": True}, {"params": [*model.parameters()]}]
    optimizer = aadl.accelerate(torch.optim.SGD(groups, lr=0.02), **SETTINGS)
    train(model, optimizer, 20, loss=lambda model: squared_error(model) - more.square().sum())
    assert statistics(optimizer)["accepted"] == 1
    train(model, optimizer, 5, loss=lambda model: squared_error(model) - more.square().sum() + 10)
    assert statistics(optimizer)["reverted"] == 0


def test_a_gradient_that_is_given_has_a_sign():
    """(-loss).backward() and loss.backward(-1) minimize the same."""
    model, optimizer = accelerated()
    for _ in range(5):
        optimizer.zero_grad()
        (-squared_error(model) - 10).backward(torch.tensor(-1.0))
        optimizer.step()
    assert statistics(optimizer)["reverted"] == 1


def by_parts(model, optimizer):
    """Of two micro-batches one has a loss that is not finite."""
    for rows, amount in ((slice(8), 0.0), (slice(8, 16), math.nan)):
        (((model(INPUTS[rows]) - TARGETS[rows]) ** 2).mean() / 2 + amount).backward()


def as_vector(model, optimizer):
    """Such a loss of each row is not one number."""
    ((model(INPUTS) - TARGETS) ** 2 + math.nan).backward(torch.full((16, 1), 1 / 16))


def by_grad(model, optimizer):
    parameters = list(model.parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(plus(math.nan)(model), parameters), strict=True):
        p.grad = gradient


def of_another_model(model, optimizer):
    squared_error(model).backward()
    plus(math.nan)(network()).backward()


def in_another_thread(model, optimizer):
    thread = threading.Thread(target=lambda: plus(math.nan)(model).backward())
    thread.start()
    thread.join()


def into_gradients_that_are_there(model, optimizer):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    plus(math.nan)(model).backward()


def with_checkpoints(model, optimizer):
    """A backward pass within another one begins at activations."""
    hidden = checkpoint(model[0], INPUTS.clone().requires_grad_(), use_reentrant=True)
    masked = torch.cat([hidden, torch.full((16, 1), -math.inf)], 1)
    ((model[2](model[1](masked[:, :6])) - TARGETS) ** 2).mean().backward()


@pytest.mark.parametrize(
    ("backward", "seen"),
    [
        (by_parts, 1),
        (as_vector, 0),
        (by_grad, 0),
        (of_another_model, 0),
        (in_another_thread, 0),
        (into_gradients_that_are_there, 1),
        (with_checkpoints, 0),
    ],
)
def test_which_losses_are_seen(backward, seen):
    model, optimizer = accelerated()
    for _ in range(5):
        optimizer.zero_grad()
        backward(model, optimizer)
        optimizer.step()
    assert statistics(optimizer)["reverted"] == seen


class Probing(torch.optim.SGD):
    """Evaluates its closure at another point as well, as line searches do."""

    def step(self, closure):
        loss = closure()
        closure(probing=True)
        return loss, super().step()


@pytest.mark.parametrize("drops", [False, True])
def test_of_a_closure_the_first_loss_of_a_step_counts(drops):
    model = network()
    optimizer = aadl.accelerate(Probing(model.parameters(), lr=0.02), **SETTINGS)
    for amounts in [(0.0, math.nan)] * 25:

        def closure(probing=False, amounts=amounts):
            value = squared_error(model) + amounts[probing]
            if not probing or drops:
                optimizer.zero_grad()
            (value if not probing or drops else 0 * value).backward()
            return value

        optimizer.step(closure)
    assert statistics(optimizer)["accepted"] == 1 and statistics(optimizer)["reverted"] == 0
    for _ in range(15):
        optimizer.step(lambda probing=False: closure(probing, (math.nan, 0.0)))
    assert statistics(optimizer)["reverted"] == 1


def test_the_losses_of_a_trial_are_not_those_of_the_training():
    """Where the closure judges, a rise says nothing: the step after the trial has another batch."""
    model = network()
    optimizer = aadl.accelerate(KINDS["SGD"](model.parameters()), **SETTINGS | {"safeguard": True})
    train(model, optimizer, 20, with_closure=True)
    assert statistics(optimizer)["accepted"] == 1 and statistics(optimizer)["closure_evaluations"] == 2
    seen = aadl.accelerator_of(optimizer).losses
    assert len(seen.recent) == WINDOW and seen.since == []
    train(model, optimizer, 5, with_closure=True, loss=plus(10.0))
    assert statistics(optimizer)["reverted"] == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_tells_nothing(fused):
    """Without fused kernels it does not even call the step."""
    model, optimizer = accelerated(lambda p: torch.optim.Adam(p, lr=0.01, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in (math.inf, math.inf, 0, 0, 0, 0, 0):
        optimizer.zero_grad()
        scaler.scale(squared_error(model) * (1 + number)).backward()
        scaler.step(optimizer)
        scaler.update()
    counts = statistics(optimizer)
    assert counts["skipped_steps"] == 2 * fused and counts["steps"] == 25 and counts["reverted"] == 0


def test_micro_batches_of_a_step_are_one_loss():
    model, optimizer = accelerated()
    seen = aadl.accelerator_of(optimizer).losses
    optimizer.zero_grad()
    for amount in (1.0, 2.0, 6.0):
        (squared_error(model) * 0 + amount).backward()
    optimizer.step()
    assert seen.since == [3.0] and seen.recent[-1] == 3.0 and len(seen.recent) == WINDOW


def test_averages_are_taken_back_too():
    """Of acceleration_type "identity", whose direction nobody tests."""
    model = network()
    optimizer = aadl.accelerate(KINDS["SGD"](model.parameters()), "identity", **SETTINGS | {"average": "always"})
    for _ in range(60):
        judged = aadl.accelerator_of(optimizer).decisions.accepted is not None
        train(model, optimizer, 1, loss=plus(10.0 if judged else 0.0))
    counts = statistics(optimizer)
    assert counts["accepted"] > 1 and counts["reverted"] >= counts["accepted"] - 1


@pytest.mark.parametrize("amount", [10.0, math.nan])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_resumed_run_has_seen_the_same_losses(after, amount):
    make = KINDS["momentum"]
    model, optimizer = accelerated(make)
    train(model, optimizer, after, loss=plus(amount))
    kept = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    again = network()
    other = aadl.accelerate(make(again.parameters()), **SETTINGS)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    for each, its_optimizer in ((model, optimizer), (again, other)):
        train(each, its_optimizer, 5 - after, loss=plus(amount))
        train(each, its_optimizer, 40)
    assert identical(snapshot(model, optimizer), snapshot(again, other))
    assert identical(statistics(optimizer), statistics(other))
    assert statistics(other)["reverted"] == 1


def test_states_from_before_load():
    import json

    model, optimizer = accelerated()
    state = aadl.accelerator_of(optimizer).state_dict()
    values = json.loads(state["values"])
    del values["losses"]
    aadl.accelerator_of(optimizer).load_state_dict(state | {"values": json.dumps(values)})
    train(model, optimizer, 5)
    assert statistics(optimizer)["reverted"] == 0
    with pytest.raises(ValueError, match="the saved state of the accelerator is damaged"):
        wrong = json.dumps(values | {"losses": {"lowest": 3}})
        aadl.accelerator_of(optimizer).load_state_dict(state | {"values": wrong})


def test_nobody_watches_longer_than_needed():
    assert is_torchs_engine()
    model = network()
    optimizer = aadl.accelerate(KINDS["SGD"](model.parameters()), **SETTINGS)
    assert not is_torchs_engine()
    aadl.remove_acceleration(optimizer)
    assert is_torchs_engine()
    aadl.accelerate(optimizer, **SETTINGS)
    train(model, optimizer, 3)
    del optimizer
    assert is_torchs_engine()
    for more in ({"safeguard": False}, {"history_depth": 0}):
        optimizer = aadl.accelerate(KINDS["SGD"](model.parameters()), **SETTINGS | more)
        assert is_torchs_engine() and aadl.accelerator_of(optimizer)


def test_backward_passes_without_steps_fill_no_memory(monkeypatch):
    monkeypatch.setattr(passes, "MOST", 12)
    model, optimizer = accelerated()
    for _ in range(40):
        squared_error(model).backward()
    assert len(aadl.accelerator_of(optimizer).losses.passes.coming) == 12


def test_the_rise_on_a_device():
    """There the numbers stay tensors; here they lie on the CPU."""
    on_host, on_device, one_way = Losses(), Losses(), sgd(network())
    for number, value in enumerate([3.0, 1.0, math.nan, 2.0, *[2.5] * 4, 2.0, 1.0]):
        for each, one in ((on_host, value), (on_device, torch.tensor(value))):
            each.recent.append(one)
            assert len(each.recent) == number + 1
    for since, rise in [([6.0, 5.5, 7.0, 5.25], 0.25), ([6.0, 2.0, 7.0, 8.0], -3.0), ([9.0] * 3, 0.0), ([], 0.0)]:
        for each, kind in ((on_host, float), (on_device, torch.tensor)):
            each.begin_trial(one_way, judged=False, reverted=0)
            each.since = [kind(value) for value in since]
            assert float(each.rise()) == pytest.approx(rise, abs=1e-4)
    for each, kind in ((on_host, float), (on_device, torch.tensor)):
        each.begin_trial(one_way, judged=True, reverted=0)
        each.since = [kind(value) for value in (1.0, math.inf)]
        assert math.isnan(float(each.rise()))


@pytest.mark.parametrize("slope", [1e-3, 1e-2])
def test_losses_that_rose_before_a_candidate_tell_nothing(slope):
    """The weight of a part of the loss grows by a plan, or two networks play against each other."""
    runs = []
    for amount in (0.0, slope):
        model = network()
        optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.05), safeguard="residual")
        for step in range(600):
            train(model, optimizer, 1, loss=plus(amount * step))
        runs.append((flat(model), copy.deepcopy(statistics(optimizer))))
    assert identical(*runs) and runs[0][1]["accepted"] > 5


def test_losses_of_a_candidate_that_was_taken_back_are_no_measure_of_the_next():
    """The second one is hardly better."""
    model, optimizer = accelerated()
    train(model, optimizer, 5, loss=plus(10.0))
    train(model, optimizer, 5)
    assert statistics(optimizer)["accepted"] == 2 and statistics(optimizer)["reverted"] == 1
    train(model, optimizer, 5, loss=plus(8.0))
    assert statistics(optimizer)["reverted"] == 2
