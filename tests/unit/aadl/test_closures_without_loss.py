"""Closures that give no loss, or fail in trials, are given up; those of frameworks are left alone."""

import copy
import functools
import math
import types
import warnings
from unittest import mock

import pytest
import torch
from small_runs import EAGER, INPUTS, RESIDUAL, TARGETS, closure_of, identical, network, snapshot, statistics
from torch import nn

import aadl
from aadl.parameters import belongs_to_a_loop

LOSS = EAGER | {"safeguard": "loss", "average": False, "frequency": 1}

# ---- closures without a loss -----------------------------------------------------------------------------------------

VALUELESS = {
    "got None": lambda loss: None,
    "got a tuple": lambda loss: (loss, loss),
    "got a dict": lambda loss: {"loss": loss},
    r"got a tensor of shape \(2,\)": lambda loss: loss.expand(2),
    "got a str": lambda loss: "0.5",
}


def valueless(model, optimizer, shape, calls):
    documented = closure_of(model, optimizer)

    def closure():
        calls.append(None)
        return VALUELESS[shape](documented())

    return closure


def followed(model, optimizer, closure, steps):
    """Snapshots after each step, and the warnings that were given."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        trace = []
        for _ in range(steps):
            optimizer.step(closure)
            trace.append(snapshot(model, optimizer))
    return trace, [str(warning.message) for warning in given]


@pytest.mark.parametrize("shape", VALUELESS)
def test_a_closure_without_a_loss_is_tried_once_and_candidates_are_judged_by_the_residual(shape):
    model, calls = network(), []
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **RESIDUAL | {"safeguard": True})
    _, given = followed(model, optimizer, valueless(model, optimizer, shape, calls), 40)
    counts = statistics(optimizer)
    assert counts["rejected"]["closure"] == 1 and "loss" not in counts["rejected"] and counts["accepted"] > 2
    assert counts["attempts"] == counts["accepted"] + sum(counts["rejected"].values())
    assert len(calls) == 40 + counts["closure_evaluations"] == 41
    (message,) = given
    assert "return the loss from the closure" in message and shape.replace("\\", "") in message


def test_a_warning_that_is_an_error_does_not_end_a_step():
    model = network()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **EAGER)
    for _ in range(10):  # warnings are errors in these tests
        optimizer.step(valueless(model, optimizer, "got None", []))
    assert statistics(optimizer)["rejected"]["closure"] == 1 and statistics(optimizer)["steps"] == 10


@pytest.mark.parametrize("shape", VALUELESS)
def test_a_closure_without_a_loss_is_an_error_where_the_loss_is_insisted_on(shape):
    model = network()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **LOSS)
    for _ in range(2):  # and stays one
        with pytest.raises(ValueError, match=f"closure must return the training loss, {shape}"):
            for _ in range(10):
                optimizer.step(valueless(model, optimizer, shape, []))


@pytest.mark.parametrize("at", [3, 12])
def test_a_resumed_run_remembers_that_the_closure_gives_no_loss(at):
    def start():
        model = network()
        optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **RESIDUAL | {"safeguard": True})
        return model, optimizer, valueless(model, optimizer, "got a tuple", [])

    whole, given = followed(*start(), 24)
    model, optimizer, closure = start()
    begun, before = followed(model, optimizer, closure, at)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    model, optimizer, closure = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    rest, after = followed(model, optimizer, closure, 24 - at)
    assert identical(whole, begun + rest)
    assert len(given) == len(before) + len(after) == 1 and statistics(optimizer)["accepted"] > 0


def attacking(model, optimizer):
    """Its loss takes the gradient of its inputs, which no trial computes."""

    def closure():
        optimizer.zero_grad()
        inputs = INPUTS.clone().requires_grad_()
        (model(inputs) - TARGETS).square().mean().backward()
        attacked = INPUTS + 0.01 * inputs.grad.sign()
        optimizer.zero_grad()
        loss = (model(attacked) - TARGETS).square().mean()
        loss.backward()
        return loss

    return closure


def test_a_closure_that_needs_gradients_of_its_inputs_is_given_up_after_three_trials_and_never_fatal():
    model = network()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **EAGER)
    _, given = followed(model, optimizer, attacking(model, optimizer), 30)
    counts = statistics(optimizer)
    assert counts["rejected"]["closure"] == counts["closure_evaluations"] == 3 and counts["accepted"] > 0
    assert len(given) == 1 and "AttributeError" in given[0]
    assert counts["attempts"] == counts["accepted"] + sum(counts["rejected"].values())


def test_a_closure_that_fails_now_and_then_is_tried_on():
    model = network()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **LOSS | {"safeguard": True})
    documented, calls, failures = closure_of(model, optimizer), 0, 0

    def closure():
        nonlocal calls, failures
        calls += 1
        in_trial = "grad" in vars(torch.Tensor)
        if in_trial and failures < 2 * (1 + statistics(optimizer)["accepted"]):  # two in a row, then some good ones
            failures += 1
            raise OSError("the data cannot be read")
        return documented()

    _, given = followed(model, optimizer, closure, 40)
    counts = statistics(optimizer)
    assert counts["rejected"]["closure"] == failures >= 4 and counts["accepted"] > 1 and not given
    assert calls == 40 + counts["closure_evaluations"]


# ---- closures of frameworks ------------------------------------------------------------------------------------------


def from_module(name, source):
    """What the last line of a source defines, in a module of that name."""
    module = types.ModuleType(name)
    exec(source, vars(module))
    return module.made


FUNCTION = """
def made(*arguments, **more):
    return arguments[-1]()
"""
CLASS = """
class made:
    def __call__(self):
        return 1.0

    def wrap(self, *arguments):
        return arguments[-1]()
"""


def users():
    return 1.0


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning", "lightning_fabric"])
def test_a_closure_of_a_framework_is_known_behind_what_wraps_it(package):
    function = from_module(f"{package}.plugins.precision", FUNCTION)
    kind = from_module(f"{package}.loops.closure", CLASS)
    decorated = functools.wraps(function)(lambda: function())
    decorated.__module__ = "script"
    inherited = type("Own", (kind,), {"__module__": "script"})
    owned = [
        function, functools.partial(function, 1, users), kind(), kind().wrap, functools.partial(kind().wrap, users),
        functools.partial(functools.partial(kind().wrap, 1), users), decorated, inherited(),
    ]  # fmt: skip
    assert all(map(belongs_to_a_loop, owned))


def test_closures_of_users_are_their_own():
    class Trainer:
        def closure(self):
            return 1.0

    lookalike = from_module("lightning_of_mine.loops", FUNCTION)
    module = nn.Linear(1, 1)
    free = [users, lambda: 1.0, functools.partial(users), Trainer().closure, mock.Mock(), lookalike, module, None]
    assert not any(map(belongs_to_a_loop, free))


@pytest.mark.parametrize("asked", [True, "loss"])
def test_a_closure_of_a_framework_is_evaluated_in_trials_only_where_asked(asked):
    model, calls = network(), []
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **RESIDUAL | {"safeguard": asked})
    documented = closure_of(model, optimizer)
    function = from_module("lightning.pytorch.plugins.precision", FUNCTION)

    def training_step():
        calls.append(None)
        return documented()

    for _ in range(40):
        optimizer.step(closure=functools.partial(function, model, training_step))
    counts = statistics(optimizer)
    assert len(calls) == 40 + counts["closure_evaluations"]
    assert (counts["closure_evaluations"] > 0) == (asked == "loss") and counts["accepted"] > 0
    assert counts["attempts"] == counts["accepted"] + sum(counts["rejected"].values())
    assert math.isfinite(counts["gain"])
