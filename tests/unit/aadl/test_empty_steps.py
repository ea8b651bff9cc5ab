"""A step that writes to no parameter is no step: not of a macro-step, not of the history, and no candidate's judge."""

import copy
from unittest import mock

import pytest
import torch
from quadratics import quadratic
from small_runs import ALWAYS, EAGER, identical, statistics
from torch import nn

import aadl
from aadl.empty_steps import COMPARED
from aadl.history_layout import Layout
from aadl.watch import have_moved

PROBLEM = quadratic(100, seed=3, size=12)
SHORT = EAGER | {"safeguard": "residual", "average": False}
LONG = SHORT | {"store_each_nth": 4, "frequency": 8}
ALONE = SHORT | {"store_each_nth": 4, "frequency": 4, "wait_iterations": 4}


class ByData(torch.optim.Optimizer):
    """Heavy ball in the style of old optimizers, which leave no mark on version counters."""

    def __init__(self, parameters, lr, momentum):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    p.data.add_(buffer, alpha=-group["lr"])


class Replacing(ByData):
    """Puts other memory under its parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


class Fused(torch.optim.SGD):
    """By kernels that leave version counters alone, in the torch of today."""

    def __init__(self, parameters, lr, momentum):
        super().__init__(parameters, lr=lr, momentum=momentum, fused=True)


def every_third(kind):
    """A class whose step makes a step at every third call."""

    class Accumulating(kind):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls % 3 == 0:
                super().step()

    return Accumulating


def made(kind, settings, **options):
    """Two halves of the weights as parameters, the first of which starts where it stays for long."""
    x = [nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in range(2)]
    optimizer = kind(x, **{"lr": 0.3, "momentum": 0.5} | options)
    return x, optimizer if settings is None else aadl.accelerate(optimizer, **settings)


def set_gradients(x, scale=1.0):
    gradient = scale * PROBLEM.gradient(torch.cat([p.detach() for p in x]))
    for p, part in zip(x, gradient.split(6), strict=True):
        p.grad = part.clone()


def run(x, optimizer, steps, calls=1, without=0):
    """`calls` calls of step for every step, and `without` more before it that have no gradients at all."""
    for _ in range(steps):
        for p in x:
            p.grad = None
        for _ in range(without):
            optimizer.step()
        for _ in range(calls):
            set_gradients(x)
            optimizer.step()
    return torch.cat([p.detach() for p in x])


@pytest.mark.parametrize(("kind", "settings"), [
    (torch.optim.SGD, SHORT), (torch.optim.SGD, SHORT | {"frequency": 1}), (torch.optim.SGD, LONG),
    (torch.optim.SGD, ALONE), (ByData, SHORT), (ByData, SHORT | {"frequency": 1}), (Fused, SHORT),
])  # fmt: skip
def test_gradients_accumulated_in_step_give_the_run_that_steps_at_once(kind, settings):
    x, optimizer = made(kind, settings)
    expected = run(x, optimizer, 80)
    y, again = made(every_third(kind), settings)
    found = run(y, again, 80, calls=3)
    once, thrice = dict(statistics(optimizer)), dict(statistics(again))
    assert thrice.pop("skipped_steps") == 160 and once.pop("skipped_steps") == 0
    assert torch.equal(found, expected)
    assert identical(once, thrice) and once["accepted"] > 5


def test_macro_steps_begin_with_a_step_where_counters_do_not_tell():
    """Calls within one count although they change nothing, but its residual is not zero."""
    x, optimizer = made(every_third(ByData), LONG)
    run(x, optimizer, 80, calls=3)
    counts = statistics(optimizer)
    assert counts["skipped_steps"] == 80 and counts["steps"] == 160 and counts["macro_steps"] == 40


@pytest.mark.parametrize("settings", [SHORT, LONG], ids=["1", "4"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_a_step_without_any_gradient_is_no_step(kind, settings):
    options = {} if kind is torch.optim.SGD else {"lr": 0.02}
    make = kind if kind is not torch.optim.Adam else lambda x, lr, momentum: torch.optim.Adam(x, lr=lr)
    x, optimizer = made(make, settings, **options)
    expected = run(x, optimizer, 60)
    y, again = made(make, settings, **options)
    found = run(y, again, 60, without=1)
    assert torch.equal(found, expected)
    assert statistics(again)["skipped_steps"] == 60 and statistics(again)["steps"] == 60
    assert statistics(again)["accepted"] == statistics(optimizer)["accepted"] > 0


@pytest.mark.parametrize("settings", [SHORT, LONG], ids=["1", "4"])
@pytest.mark.parametrize("kind", [ByData, Replacing, Fused])
def test_steps_that_leave_no_mark_count(kind, settings):
    """Also those that leave the first parameter where it is."""
    x, optimizer = made(kind, settings)
    for step in range(60):
        set_gradients(x)
        if step % 3:
            x[0].grad = None
        optimizer.step()
    assert statistics(optimizer)["skipped_steps"] == 0 and statistics(optimizer)["steps"] == 60


def test_steps_that_seldom_leave_a_mark_count():
    """As those of a wrapper that copies averaged weights now and then, around an optimizer that writes to `.data`."""

    class Wrapping(ByData):
        calls = 0

        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            self.calls += 1
            if self.calls % 5 == 0:
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.99)

    for settings in (SHORT, LONG):
        x, optimizer = made(Wrapping, settings)
        run(x, optimizer, 60)
        assert statistics(optimizer)["skipped_steps"] == 0 and statistics(optimizer)["steps"] == 60


def test_updates_of_zero_count_where_the_optimizer_writes_them_and_not_where_it_returns():
    for kind, written in ((torch.optim.SGD, True), (torch.optim.LBFGS, False)):
        x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = aadl.accelerate(kind([x], lr=0.1), **SHORT)

        def closure(x=x):
            x.grad = torch.zeros_like(x)
            return (0.0 * x).sum()

        for _ in range(10):
            optimizer.step(closure)
        counts = statistics(optimizer)
        assert (counts["steps"], counts["skipped_steps"]) == ((10, 0) if written else (0, 10))
        assert counts["macro_steps"] == counts["steps"]


def test_a_candidate_waits_for_a_step_to_judge_it():
    x, optimizer = made(torch.optim.SGD, SHORT)
    decisions = aadl.accelerator_of(optimizer).decisions
    for _ in range(100):
        if decisions.accepted is None:
            run(x, optimizer, 1)
    waiting, reach, before = decisions.accepted, decisions.reach, torch.cat([p.detach() for p in x])
    for p in x:
        p.grad = None
    for _ in range(5):
        optimizer.step()
    assert waiting is not None and decisions.accepted is waiting and decisions.reach == reach
    assert torch.equal(torch.cat([p.detach() for p in x]), before)
    run(x, optimizer, 1)
    assert decisions.accepted is not waiting


@pytest.mark.parametrize("at", range(100, 106))
def test_a_resumed_run_knows_what_the_counters_of_the_optimizer_tell(at):
    """Saved anywhere between two steps, and within a macro-step or not."""
    ends = []
    for resumed in (False, True):
        x, optimizer = made(every_third(torch.optim.SGD), LONG)
        for call in range(180):
            set_gradients(x)
            optimizer.step()
            if resumed and call == at:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = every_third(torch.optim.SGD)(x, lr=0.3, momentum=0.5)
                optimizer.calls = call + 1
                aadl.accelerate(optimizer, **LONG)
                optimizer.load_state_dict(state)
        ends.append((torch.cat([p.detach() for p in x]), dict(statistics(optimizer))))
    assert identical(*ends) and ends[0][1]["skipped_steps"] == 120


def test_a_device_is_asked_a_few_times_whether_unmarked_steps_write():
    """Unless some of them write nothing; here the device is a CPU of which no element is read."""
    for kind, calls in ((ByData, 1), (every_third(ByData), 3)):
        asked = mock.Mock(side_effect=Layout.is_at_start, autospec=True)
        with (
            mock.patch.object(Layout, "is_on_host", False),
            mock.patch.object(Layout, "elements", lambda self, anywhere=False: []),
            mock.patch.object(Layout, "is_at_start", lambda self, asked=asked: asked(self)),
        ):
            x, optimizer = made(kind, ALWAYS)
            run(x, optimizer, 100, calls=calls)
        assert asked.call_count == (COMPARED if calls == 1 else 300)
        assert statistics(optimizer)["steps"] == 100 and statistics(optimizer)["skipped_steps"] == 100 * (calls - 1)


def test_an_optimizer_whose_counters_tell_costs_a_device_no_wait_but_for_calls_that_write_nothing():
    asked = mock.Mock(side_effect=Layout.is_at_start)
    with (
        mock.patch.object(Layout, "is_on_host", False),
        mock.patch.object(Layout, "is_at_start", lambda self: asked(self)),
    ):
        x, optimizer = made(torch.optim.SGD, SHORT)
        run(x, optimizer, 40)
        assert asked.call_count == 0
        run(x, optimizer, 40, without=2)
    assert asked.call_count == 80
    assert statistics(optimizer)["steps"] == 80 and statistics(optimizer)["skipped_steps"] == 80


@pytest.mark.parametrize("is_on_host", [True, False])
def test_steps_that_leave_no_mark_any_more_count(is_on_host):
    """The part whose kernels leave marks is frozen; a device shows no elements."""
    x = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))]
    groups = [{"params": x[:1], "fused": True}, {"params": x[1:]}]
    with (
        mock.patch.object(Layout, "is_on_host", is_on_host),
        mock.patch.object(Layout, "elements", lambda self, anywhere=False: []),
    ):
        optimizer = aadl.accelerate(torch.optim.SGD(groups, lr=0.01), **LONG)
        for step in range(60):
            optimizer.zero_grad()
            (sum(p.square().sum() for p in x) if step < 20 else x[0].square().sum()).backward()
            optimizer.step()
    assert statistics(optimizer)["steps"] == 60 and statistics(optimizer)["skipped_steps"] == 0


def test_counters_are_compared_of_as_many_tensors_as_are_asked():
    tensors = [torch.zeros(1) for _ in range(3)]
    versions = [tensor._version for tensor in tensors]
    assert not have_moved(tensors, versions, 3)
    tensors[2].add_(1)
    assert have_moved(tensors, versions, 3) and not have_moved(tensors, versions, 2)
    tensors[0].add_(1)
    assert have_moved(tensors, versions, 1)
    with torch.inference_mode():
        assert not have_moved([torch.zeros(1), tensors[1]], versions, 2)


class IntoMomentum(torch.optim.Optimizer):
    """Adds each gradient to its momentum, and moves the parameters at every third call."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for p in self.param_groups[0]["params"]:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.mul_(0.5 if self.calls % 3 == 1 else 1.0).add_(p.grad / 3)
            if self.calls % 3 == 0:
                p.sub_(buffer, alpha=0.05)


@pytest.mark.parametrize("settings", [SHORT, LONG])
def test_calls_that_write_to_momentum_alone_belong_to_the_step_that_comes(settings):
    x = torch.nn.Parameter(torch.ones(6))
    optimizer = aadl.accelerate(IntoMomentum([x]), **settings)
    for _ in range(180):
        optimizer.zero_grad()
        (x.square() * torch.linspace(0.1, 1, 6)).sum().backward()
        optimizer.step()
    counts = statistics(optimizer)
    assert (counts["steps"], counts["skipped_steps"], counts["moved"]) == (60, 120, 0)
    assert counts["accepted"] > 1 and counts["trust_ratio"] == counts["trust_ratio"]  # judged: it is a number


def test_steps_that_leave_no_mark_from_some_time_on_count():
    """Their first elements, which are looked at within a macro-step, never move."""
    x = torch.nn.Parameter(torch.ones(6))
    weights = torch.tensor([0.0, *torch.linspace(0.1, 1, 5)])
    optimizer = aadl.accelerate(torch.optim.SGD([x], lr=0.05), **LONG)
    for step in range(100):
        optimizer.param_groups[0]["fused"] = step >= 50
        optimizer.zero_grad()
        (x.square() * weights).sum().backward()
        optimizer.step()
    assert statistics(optimizer)["steps"] >= 98 and statistics(optimizer)["accepted"] > 5
