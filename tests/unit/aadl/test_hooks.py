"""The hooks around a step: counted once however a step is nested, and in an order that hides nothing from others."""

import importlib.util
import sys

import pytest
import torch
from small_runs import EAGER, RESIDUAL, closure_of, flat, identical, network, sgd, snapshot, statistics, train
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.torch_version import TorchVersion

import aadl
from aadl import uncompiled

COUNTS = ("steps", "macro_steps", "attempts", "accepted", "moved", "closure_evaluations")


class Once(torch.optim.SGD):
    """Hooked by torch beside its base class: its hooks run twice."""

    def step(self, closure=None):
        return super().step(closure)


class Twice(Once):
    def step(self, closure=None):
        return super().step(closure)


class Stumbling(torch.optim.SGD):
    """Gets over an exception of the step within its own."""

    def step(self, closure=None):
        with pytest.raises(KeyError):
            super().step(fail)
        return super().step(closure)


def fail():
    raise KeyError("no such batch")


def outcome(kind, way="plain", steps=40):
    """A run whose optimizer is of this class, after all these classes were hooked by torch."""
    for other in (torch.optim.SGD, Once, Twice, Stumbling):
        other([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    model = network()
    optimizer = aadl.accelerate(kind(model.parameters(), lr=0.05, momentum=0.5), **RESIDUAL | {"safeguard": True})
    closure = closure_of(model, optimizer)
    step = torch.compile(lambda: optimizer.step(), backend="eager") if way == "compiled" else optimizer.step
    for _ in range(steps):
        if way == "closure":
            optimizer.step(closure)
        else:
            closure()
            step()
    counts = {name: statistics(optimizer)[name] for name in COUNTS}
    assert counts["steps"] == steps and counts["accepted"] > 0 and counts["moved"] == 0
    assert (counts["closure_evaluations"] > 0) == (way == "closure")
    return snapshot(model, optimizer), counts


@pytest.mark.parametrize("way", ["plain", "closure"])
@pytest.mark.parametrize("kind", [Once, Twice, Stumbling])
def test_a_step_within_a_step_counts_once(kind, way):
    assert identical(outcome(kind, way), outcome(torch.optim.SGD, way))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_within_a_step_counts_once():
    torch._dynamo.reset()
    assert identical(outcome(Twice, "compiled"), outcome(torch.optim.SGD))


def test_a_step_that_a_closure_makes_belongs_to_the_outer_one():
    model = network()
    optimizer = aadl.accelerate(sgd(model), **RESIDUAL)
    closure = closure_of(model, optimizer)

    def with_a_step():
        closure()
        optimizer.step()
        return closure()

    for _ in range(20):
        optimizer.step(with_a_step)
    assert statistics(optimizer)["steps"] == 20 and statistics(optimizer)["moved"] == 0
    assert statistics(optimizer)["accepted"] > 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, Twice])
def test_a_step_that_a_closure_makes_counts_nowhere_in_a_trial(kind):
    """Two networks, the closure of one steps the other (and itself), as adversarial trainings do."""
    models = network(), network()
    first, second = (aadl.accelerate(kind(m.parameters(), lr=0.05), **EAGER | {"average": False}) for m in models)
    closures = [closure_of(m, o) for m, o in zip(models, (first, second), strict=True)]

    def closure():
        second.step(closures[1])
        closures[0]()
        first.step()
        return closures[0]()

    for number in range(1, 31):
        first.step(closure)
        assert statistics(first)["steps"] == statistics(second)["steps"] == number
    assert statistics(first)["closure_evaluations"] > 0 and statistics(second)["closure_evaluations"] > 0
    assert statistics(first)["accepted"] > 0 and statistics(second)["accepted"] > 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, Twice])
def test_a_step_that_fails_is_no_step_and_stops_none_after_it(kind):
    ends = []
    for failing in (False, True):
        model = network()
        optimizer = aadl.accelerate(kind(model.parameters(), lr=0.05), **RESIDUAL)
        for step in range(30):
            if failing and step % 7 == 3:
                with pytest.raises(KeyError):
                    optimizer.step(fail)
            train(model, optimizer, 1)
        assert statistics(optimizer)["steps"] == 30 and statistics(optimizer)["accepted"] > 0
        ends.append(snapshot(model, optimizer))
    assert identical(*ends)


def test_a_step_that_fails_after_it_wrote_is_a_change():
    class Breaking(torch.optim.SGD):
        broken = False

        def step(self, closure=None):
            super().step()
            if self.broken:
                fail()

    model = network()
    optimizer = aadl.accelerate(Breaking(model.parameters(), lr=0.05), **RESIDUAL | {"store_each_nth": 4})
    train(model, optimizer, 6)
    optimizer.broken = True
    with pytest.raises(KeyError):
        train(model, optimizer, 1)
    optimizer.broken = False
    start = flat(model)
    train(model, optimizer, 4)
    end = flat(model)
    assert statistics(optimizer)["moved"] == 1 and statistics(optimizer)["steps"] == 10
    assert torch.equal(aadl.accelerator_of(optimizer).history.blocks[0].residual, end - start)


@pytest.mark.parametrize("steps_taken_back", [False, True], ids=["accepted", "taken back"])
def test_hooks_of_others_see_the_weights_that_step_leaves(steps_taken_back, monkeypatch):
    monkeypatch.setattr("aadl.acceptance.must_revert", lambda *_: steps_taken_back)
    model = network()
    optimizer, seen, calls = sgd(model), {}, []

    def note(name):
        def hook(*_):
            calls.append(name)
            seen[name] = model[0].weight.detach().clone()

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("pre, all")),
        register_optimizer_step_post_hook(note("post, all")),
        optimizer.register_step_pre_hook(note("pre 1")),
        optimizer.register_step_post_hook(note("post 1")),
    ]
    try:
        aadl.accelerate(optimizer, **RESIDUAL)
        optimizer.register_step_pre_hook(note("pre 2"))
        optimizer.register_step_post_hook(note("post 2"))
        for _ in range(12):
            before = model[0].weight.detach().clone()
            train(model, optimizer, 1)
            after = model[0].weight.detach()
            assert all(torch.equal(value, before) for name, value in seen.items() if name.startswith("pre"))
            assert all(torch.equal(value, after) for name, value in seen.items() if name.startswith("post"))
        assert calls == ["pre, all", "pre 1", "pre 2", "post 1", "post 2", "post, all"] * 12
        assert statistics(optimizer)["accepted"] >= 2
        assert (statistics(optimizer)["reverted"] > 0) == steps_taken_back
        aadl.remove_acceleration(optimizer)
        train(model, optimizer, 1)
        assert calls[-6:] == ["pre, all", "pre 1", "pre 2", "post 1", "post 2", "post, all"]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("first", [False, True], ids=["registered after", "registered before"])
def test_what_a_pre_hook_of_somebody_else_writes_is_noticed(first):
    model, writes = network(), []

    def write(*_):
        if writes:
            with torch.no_grad():
                model[0].weight.mul_(writes.pop())

    optimizer = sgd(model)
    if first:
        optimizer.register_step_pre_hook(write)
    aadl.accelerate(optimizer, **RESIDUAL | {"frequency": 1000})
    if not first:
        optimizer.register_step_pre_hook(write)
    train(model, optimizer, 5)
    assert statistics(optimizer)["moved"] == 0
    writes.append(30.0)
    train(model, optimizer, 1)
    assert statistics(optimizer)["moved"] == 1


def test_steps_give_no_references_away():
    """A function of torch 2.6 to 2.8 does at every call, and up to Python 3.11 the references to None are counted."""
    model = network()
    optimizer = aadl.accelerate(sgd(model), **RESIDUAL)
    train(model, optimizer, 10)
    before = sys.getrefcount(None)
    train(model, optimizer, 300)
    assert sys.getrefcount(None) > before - 200


def test_torch_before_2_9_is_not_asked_for_its_compiler(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    specification = importlib.util.spec_from_file_location("compiler_of_torch_2_8", uncompiled.__file__)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.compiler_of_frames is None and uncompiled.compiler_of_frames is not None
