"""Verdicts carried out on the device and read by the host later are those the host would have reached at once.

There is no device here: the same code runs on the CPU, as if its numbers were not on the host.
"""

import copy
import math

import pytest
import torch
from histories import copy_histories_to_the_host
from small_runs import flat, identical, network, squared_error, train

import aadl
from aadl import decisions, judgments

SCHEDULES = {
    "every macro-step": {"store_each_nth": 1, "frequency": 1},
    "every other macro-step": {"store_each_nth": 2, "frequency": 4},
    "every third": {"store_each_nth": 1, "frequency": 3},
}


def train_network(settings, steps=80, optimizer_class=torch.optim.SGD, broken_at=(), broken=None, **options):
    """Weights after every step, and the statistics; some steps may have another loss."""
    model = network()
    optimizer = optimizer_class(model.parameters(), **({"lr": 0.4} | options))
    aadl.accelerate(optimizer, history_depth=4, **settings)
    weights = []
    for step in range(steps):
        train(model, optimizer, 1, **({"loss": broken} if step in broken_at else {}))
        weights.append(flat(model))
    return weights, copy.deepcopy(aadl.accelerator_of(optimizer).statistics)


def not_a_number(model):
    return math.nan * sum(p.sum() for p in model.parameters())


def same(weights, others):
    """Bit for bit, nan included."""
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(weights, others, strict=True))


def decide_on_the_device(monkeypatch):
    for module in (decisions, judgments):
        monkeypatch.setattr(module, "on_host", lambda number: False)


def outcomes(monkeypatch, settings, **options):
    on_host = train_network(settings, **options)
    decide_on_the_device(monkeypatch)
    return on_host, train_network(settings, **options)


def test_second_moments_return_once_where_an_update_is_not_finite(monkeypatch):
    """Not once more when the host reads what the device has decided, one step later."""
    settings = {"wait_iterations": 2, "store_each_nth": 2, "frequency": 4, "average": False, "safeguard": "residual"}
    adam = {"optimizer_class": torch.optim.Adam, "lr": 0.02, "steps": 40}
    reverted = 0
    for broken_at in range(20, 36):
        with monkeypatch.context() as patched:
            broken = {"broken_at": [broken_at], "broken": not_a_number}
            (weights, statistics), (deferred, later) = outcomes(patched, settings, **broken, **adam)
        assert same(weights, deferred) and identical(statistics, later), broken_at
        reverted += statistics["reverted"]
    assert reverted > 0


@pytest.mark.parametrize("amount", [math.nan, 10.0])
def test_losses_that_speak_against_a_candidate(amount, monkeypatch):
    settings = {"wait_iterations": 10, "store_each_nth": 5, "frequency": 10, "average": False, "safeguard": "residual"}
    broken = {"broken_at": range(20, 25), "broken": lambda model: squared_error(model) + amount}
    (weights, statistics), (deferred, later) = outcomes(monkeypatch, settings, lr=0.02, steps=40, **broken)
    assert same(weights, deferred) and identical(statistics, later)
    assert statistics["reverted"] == 1 and statistics["resets"] == ({} if amount == 10 else {"non_finite": 1})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("average", [False, "always"])
def test_deferred_verdicts_take_the_same_path(schedule, average, monkeypatch):
    settings = SCHEDULES[schedule] | {"average": average, "safeguard": "residual"}
    (weights, statistics), (deferred, later) = outcomes(monkeypatch, settings)
    assert same(weights, deferred)
    assert identical(statistics, later)
    assert statistics["accepted"] > 0


def test_rejected_reverted_and_suspended_ones_are_among_them(monkeypatch):
    monkeypatch.setattr("aadl.acceptance.REVERT_ABOVE", 0.9)
    total = {"accepted": 0, "reverted": 0, "suspended": 0, "backward": 0}
    for schedule in SCHEDULES.values():
        for rate in (0.1, 0.4, 0.8):
            settings = schedule | {"average": False, "safeguard": "residual"}
            with monkeypatch.context() as patch:
                (weights, statistics), (deferred, later) = outcomes(patch, settings, lr=rate, momentum=0.9)
            assert same(weights, deferred) and identical(statistics, later)
            counts = statistics | statistics["rejected"]
            total = {name: number + counts.get(name, 0) for name, number in total.items()}
    assert all(total.values()), total


def test_a_verdict_waits_for_the_next_step_or_for_who_asks(monkeypatch):
    decide_on_the_device(monkeypatch)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    aadl.accelerate(optimizer, store_each_nth=1, frequency=1, history_depth=4, safeguard="residual")
    accelerator = aadl.accelerator_of(optimizer)
    train(model, optimizer, 2)
    raw = accelerator.decisions
    assert raw.deferred and raw.statistics["accepted"] + sum(raw.statistics["rejected"].values()) == 0
    assert raw.statistics["attempts"] == 1
    said = accelerator.statistics
    assert not raw.deferred and said["accepted"] + sum(said["rejected"].values()) == 1
    while not raw.deferred:
        train(model, optimizer, 1)
    verdicts = raw.statistics["accepted"] + sum(raw.statistics["rejected"].values())
    accelerator.state_dict()  # nothing is left open in a saved state
    assert not raw.deferred
    assert raw.statistics["accepted"] + sum(raw.statistics["rejected"].values()) == verdicts + 1


@pytest.mark.parametrize("asked", [False, True])
def test_a_non_finite_residual_is_taken_back_on_the_device(asked, monkeypatch):
    if asked:
        decide_on_the_device(monkeypatch)
    x = torch.nn.Parameter(torch.linspace(1.0, 2.0, 5))
    optimizer = torch.optim.SGD([x], lr=0.1)
    aadl.accelerate(optimizer, store_each_nth=1, frequency=2, history_depth=3, average=False, safeguard="residual")
    curvature, poisoned = torch.linspace(0.5, 3.0, 5), 0
    for _ in range(30):
        accepted = aadl.accelerator_of(optimizer).statistics["accepted"]
        x.grad = curvature * x.detach()
        if poisoned == 0 and accepted:
            x.grad, poisoned = torch.full((5,), math.nan), 1
        optimizer.step()
    statistics = aadl.accelerator_of(optimizer).statistics
    assert poisoned and statistics["reverted"] >= 1 and statistics["resets"].get("non_finite", 0) >= 1
    assert torch.isfinite(x).all() and float(x.detach().norm()) < 1


# ---- a history on the host -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_history_that_is_copied_to_the_host_changes_nothing(schedule, momentum, monkeypatch):
    """Copies go from CPU to CPU here; staging and postponed stores are those of a device."""
    settings = SCHEDULES[schedule] | {"average": False, "safeguard": "residual"}
    weights, statistics = train_network(settings, momentum=momentum, lr=0.1)
    copy_histories_to_the_host(monkeypatch)
    there, later = train_network(settings, momentum=momentum, lr=0.1)
    assert same(weights, there) and identical(statistics, later)
    assert statistics["accepted"] > 0


def test_a_store_is_postponed_until_the_copy_had_time(monkeypatch):
    copy_histories_to_the_host(monkeypatch)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    aadl.accelerate(optimizer, store_each_nth=1, frequency=100, history_depth=4)
    accelerator = aadl.accelerator_of(optimizer)
    train(model, optimizer, 3)
    assert accelerator.is_copying and len(accelerator.history.columns) == 1
    state = accelerator.state_dict()  # stores first
    assert not accelerator.is_copying and len(accelerator.history.columns) == 2
    after = flat(model)
    rows = [state["rows"][f"parameters.{index}.mapped"].reshape(-1) for index in range(4)]
    assert torch.equal(torch.cat(rows), after)
    train(model, optimizer, 1)
    aadl.reset_history(optimizer)
    assert not accelerator.is_copying and accelerator.history.columns == []
