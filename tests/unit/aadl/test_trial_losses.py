"""Judging candidates by the loss: two evaluations of the closure that leave no trace."""

import copy
import itertools
import math
import threading

import pytest
import torch
from small_runs import (
    EAGER,
    INPUTS,
    TARGETS,
    adam,
    closure_of,
    flat,
    identical,
    nesterov,
    network,
    snapshot,
    squared_error,
    train,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

import aadl
from aadl.trial import without_trace

BACKWARD = torch.Tensor.backward
LOSS = EAGER | {"safeguard": "loss", "average": False, "frequency": 1}


def noisy_network():
    """A network with everything that a second evaluation could disturb."""
    return network(nn.BatchNorm1d(6), nn.Dropout(0.3))


class Scored:
    """A closure that trains as usual but reports the next of given numbers as its loss; notes what it saw."""

    def __init__(self, model, optimizer, scores, form="documented"):
        self.model, self.optimizer, self.scores, self.form = model, optimizer, iter(scores), form
        self.masks, self.values = [], []

    def __call__(self):
        self.masks.append(torch.rand(3))
        self.values.append(flat(self.model))
        self.optimizer.zero_grad()
        loss = squared_error(self.model)
        loss.backward()
        score = next(self.scores)
        return score if self.form == "float" else loss * 0 + score


def everything(model, optimizer):
    """All that a trial evaluation might leave a trace in."""
    gradients = [p.grad for p in model.parameters()]
    return copy.deepcopy([snapshot(model, optimizer), gradients, torch.get_rng_state()])


def rising():
    """By little, so that no training seems to go back."""
    return (1 + number / 2**20 for number in itertools.count())


def falling():
    return iter(range(10**6, 0, -1))


@pytest.mark.parametrize("make", [adam, nesterov])
@pytest.mark.parametrize("form", ["documented", "float"])
def test_rejected_trials_leave_no_trace(make, form):
    outcomes = []
    for settings in ({}, LOSS | {"wait_iterations": 10**9}, LOSS):
        model = noisy_network()
        optimizer = make(model, **settings)
        torch.manual_seed(5)
        closure = Scored(model, optimizer, rising(), form)
        trace = []
        for _ in range(40):
            optimizer.step(closure)
            trace.append(everything(model, optimizer))
        outcomes.append(trace)
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["rejected"]["loss"] >= 3
    assert statistics["accepted"] == 0
    assert statistics["closure_evaluations"] == 2 * statistics["rejected"]["loss"]
    assert identical(outcomes[0], outcomes[1])
    assert identical(outcomes[0], outcomes[2])
    assert torch.Tensor.backward is BACKWARD


@pytest.mark.parametrize(
    ("scores", "accepted"),
    [(rising(), False), (falling(), True), *((itertools.repeat(loss), False) for loss in (1.0, math.nan, math.inf))],
)
def test_a_candidate_must_be_strictly_better(scores, accepted):
    model = network()
    optimizer = adam(model, **LOSS)
    for _ in range(30):
        optimizer.step(Scored(model, optimizer, scores))
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["closure_evaluations"] > 0
    assert (statistics["accepted"] > 0) == accepted
    assert ("loss" in statistics["rejected"]) != accepted


@pytest.mark.parametrize("maximize", [False, True])
def test_better_means_higher_where_the_optimizer_maximizes(maximize):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, maximize=maximize)
    aadl.accelerate(optimizer, **LOSS)
    losses = train(model, optimizer, 60, with_closure=True, loss=lambda m: (1 - 2 * maximize) * squared_error(m))
    assert aadl.accelerator_of(optimizer).statistics["accepted"] > 0
    assert (losses[-1] > losses[0]) == maximize
    closure = Scored(model, optimizer, rising())
    before = dict(aadl.accelerator_of(optimizer).statistics)
    for _ in range(30):
        optimizer.step(closure)
    after = aadl.accelerator_of(optimizer).statistics
    assert after["closure_evaluations"] > before["closure_evaluations"]
    assert (after["accepted"] > before["accepted"]) == maximize


def minimax(**settings):
    """(closure, optimizer) of a saddle point: x makes the loss small, and y makes it large."""
    x, y = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [x]}, {"params": [y], "maximize": True}], lr=0.05)
    slopes = torch.tensor([0.5, 1.0, 2.0])

    def closure():
        optimizer.zero_grad()
        loss = (x.square() * slopes - y.square() + 0.3 * x * y).sum()
        loss.backward()
        return loss

    return closure, aadl.accelerate(optimizer, **settings)


def test_the_loss_judges_no_saddle_point():
    closure, optimizer = minimax(**EAGER)
    for _ in range(40):
        optimizer.step(closure)
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["closure_evaluations"] == 0 and counts["accepted"] > 0
    assert all(float(p.detach().norm()) < 1e-3 for group in optimizer.param_groups for p in group["params"])
    with pytest.raises(ValueError, match="safeguard must be True, False or 'residual' where only some parameter gro"):
        minimax(**LOSS)
    with pytest.raises(ValueError, match="'nonlinear_gmres' makes a sum of squares small, and this SGD has groups wit"):
        minimax(acceleration_type="nonlinear_gmres")


def test_a_gain_that_grows_stops_no_maximization():
    model = network()
    start = float(squared_error(model).detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, maximize=True)
    aadl.accelerate(optimizer, **LOSS)
    train(model, optimizer, 60, with_closure=True, loss=lambda m: 0.65 * start - squared_error(m))
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["accepted"] > 0 and "stopped" not in counts["rejected"]


def test_the_trials_compare_the_plain_point_with_the_candidate_on_the_same_random_numbers():
    model = noisy_network()
    optimizer = nesterov(model, **LOSS)
    closure = Scored(model, optimizer, rising())
    trials = 0
    for _ in range(30):
        first = len(closure.masks)
        optimizer.step(closure)
        if len(closure.masks) == first + 1:
            continue
        trials += 1
        base, plain, candidate = closure.masks[first:]
        assert torch.equal(plain, candidate)
        assert not torch.equal(base, plain)
        _, plain, candidate = closure.values[first:]
        assert torch.equal(plain, flat(model))
        assert not torch.equal(candidate, plain)
    assert trials >= 5


@pytest.mark.parametrize("form", ["forward", "documented", "float"])
def test_all_forms_of_a_closure_are_judged_alike(form):
    """Gradients are computed outside, so that a forward-only closure trains too."""
    runs = []
    for used in ("documented", form):
        model = network()
        optimizer = adam(model, **LOSS)
        for _ in range(40):
            closure_of(model, optimizer)()

            def forward(model=model):
                return squared_error(model)

            def number(model=model):
                return squared_error(model).item()

            documented = closure_of(model, optimizer)
            optimizer.step({"forward": forward, "float": number, "documented": documented}[used])
        runs.append((snapshot(model, optimizer), aadl.accelerator_of(optimizer).statistics["accepted"]))
    assert runs[0][1] > 0
    assert identical(runs[0], runs[1])


def test_a_closure_may_differentiate_inside():
    """Like a physics-informed network: the loss holds derivatives of the network, and trials need them too."""
    points = INPUTS.clone().requires_grad_()

    def pde_loss(model):
        values = model(points)
        (slopes,) = torch.autograd.grad(values.sum(), points, create_graph=True)
        return (slopes.sum(1, keepdim=True) - TARGETS).square().mean()

    model = network()
    optimizer = adam(model, **LOSS)
    losses = train(model, optimizer, 60, with_closure=True, loss=pde_loss)
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["accepted"] > 0
    assert losses[-1] < 0.7 * losses[0]
    assert points.grad is not None  # by the base optimizer's own calls


class Interruption(Exception):
    pass


EXCEPTIONS = [
    ("loss", Interruption, "closure", True),
    ("loss", KeyboardInterrupt, "closure", True),
    (True, Interruption, "closure", False),
    (True, KeyboardInterrupt, "closure", True),
]
"""safeguard, what the closure raises in a trial, the cause that is counted, whether `step` raises it."""


@pytest.mark.parametrize("place", ["plain", "candidate"])
@pytest.mark.parametrize(("mode", "error", "cause", "propagates"), EXCEPTIONS)
def test_an_exception_in_a_trial_leaves_everything_restored(mode, error, cause, propagates, place):
    model, plain_model = noisy_network(), noisy_network()
    optimizer, plain = nesterov(model, **LOSS | {"safeguard": mode}), nesterov(plain_model)
    torch.manual_seed(5)
    closure = Scored(model, optimizer, falling())
    number_in_step, raised, failed = 0, 0, 0

    def failing():
        nonlocal number_in_step, failed
        number_in_step += 1
        value = closure()
        if number_in_step == (2 if place == "plain" else 3):
            failed += 1
            raise error
        return value

    random = torch.get_rng_state()
    plain_closure = Scored(plain_model, plain, falling())
    for _ in range(40):
        number_in_step = 0
        try:
            optimizer.step(failing)
        except error:
            raised += 1
        mine = everything(model, optimizer)
        torch.set_rng_state(random)
        plain.step(plain_closure)
        random = torch.get_rng_state()
        assert identical(mine, everything(plain_model, plain))
        assert torch.Tensor.backward is BACKWARD
        assert not nn.modules.module._global_forward_pre_hooks
    statistics = aadl.accelerator_of(optimizer).statistics
    assert failed >= 3 and raised == (failed if propagates else 0)
    assert statistics["rejected"][cause] == failed and set(statistics["rejected"]) <= {cause, "backward"}
    assert statistics["attempts"] == statistics["accepted"] + sum(statistics["rejected"].values())
    assert statistics["accepted"] == 0 and statistics["moved"] == 0
    while not statistics["accepted"]:  # the losses fall: one of the next candidates is taken
        optimizer.step(closure)
        assert statistics["steps"] < 200


def test_backward_of_other_threads_goes_on():
    """A trial in one thread, a training step in another; and the trials of two threads may end in any order."""
    inside, done = threading.Event(), threading.Event()
    leaf = torch.ones(1, requires_grad=True)

    def trial():
        with without_trace([], is_closure=True):
            inside.set()
            done.wait(600)

    with without_trace([leaf], is_closure=True):
        thread = threading.Thread(target=trial)
        thread.start()
        inside.wait(600)
        (leaf * 3).sum().backward()
        assert leaf.grad.item() == 0
        leaf.grad = None
    (leaf * 3).sum().backward()
    assert leaf.grad.item() == 3
    done.set()
    thread.join()
    assert torch.Tensor.backward is BACKWARD
    (leaf * 3).sum().backward()
    assert leaf.grad.item() == 6


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_trials_of_two_threads_leave_the_compiler_as_it_was():
    """The trial that begins first ends first; torch compiles again when both are over, and not before."""
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.ones(2))
    inside, done = threading.Event(), threading.Event()

    def trial():
        with without_trace([], is_closure=True):
            inside.set()
            done.wait(600)

    thread = threading.Thread(target=trial)
    with without_trace([], is_closure=True):
        thread.start()
        assert inside.wait(600)
    torch.compile(lambda x: x + 2, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1
    done.set()
    thread.join()
    torch.compile(lambda x: x + 3, backend=counter)(torch.ones(2))
    assert counter.frame_count == 2


def test_loss_safeguard_without_closure_is_refused_at_the_first_step():
    model = network()
    optimizer = adam(model, **LOSS)
    closure = closure_of(model, optimizer)
    closure()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"safeguard='loss' needs optimizer\.step\(closure\)"):
        optimizer.step()
    assert identical(before, everything(model, optimizer))
    optimizer.step(closure)
    optimizer.step(closure=closure)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(None)
    assert aadl.accelerator_of(optimizer).statistics["steps"] == 2
