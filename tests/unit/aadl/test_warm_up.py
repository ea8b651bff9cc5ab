"""While the learning rate rises above all before, nothing is extrapolated; afterwards the gain is as ever."""

import copy
import json
import warnings

import pytest
import torch
from small_runs import closure_of, flat, identical, network, snapshot, statistics
from torch import nn

import aadl
from aadl import advice
from aadl.learning_rates import LearningRates

DEFAULTS = {"safeguard": "residual", "average": False}
"""Macro-steps of ten steps, and an acceleration at every second one."""


def rising(steps):
    return lambda step: min((step + 1) / steps, 1.0)


def momentum(model, lr=0.02):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(model, optimizer, schedule, steps, lr=0.02, first=0):
    """Steps at the rates lr * schedule(step)."""
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            rate = lr * schedule(step)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        optimizer.zero_grad()
        closure_of(model, optimizer)()
        optimizer.step()


def admission_losses(seed, accelerated):
    """Losses of a training whose first candidates, made of the pairs of its warm-up, went far astray."""
    torch.manual_seed(50 + seed)
    inputs = torch.rand(320, 7)
    target = (inputs @ torch.rand(7, 1) / 3).sigmoid() + 0.03 * torch.randn(320, 1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = momentum(model)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, 50)
    if accelerated:
        aadl.accelerate(optimizer)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
    return losses


def test_no_training_is_led_astray_in_its_warm_up():
    """They rose to 12.9, 3.4, 1.6 and 3.9 times plain's loss."""
    for seed in range(4):
        plain, fast = admission_losses(seed, False), admission_losses(seed, True)
        assert max(loss / max(plain[step:]) for step, loss in enumerate(fast)) < 2


OPTIMIZERS = {
    "momentum": momentum,
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
    "a rate that is a tensor": lambda model: momentum(model, torch.tensor(0.02)),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_is_plain_in_its_warm_up_and_accelerated_afterwards(name):
    plain, model = network(), network()
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](plain)
    aadl.accelerate(optimizer, **DEFAULTS)
    train(model, optimizer, rising(100), 100)
    train(plain, other, rising(100), 100)
    assert torch.equal(flat(model), flat(plain))
    assert statistics(optimizer)["attempts"] == 0 and statistics(optimizer)["resets"] == {}
    train(model, optimizer, rising(100), 20, first=100)
    assert statistics(optimizer)["attempts"] == 1
    assert len(aadl.accelerator_of(optimizer).history.columns) > 5  # they stay, and only those of one rate are used
    assert statistics(optimizer)["numerical_rank"] <= 2


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.02), {}),
        (momentum, {"store_each_nth": 1, "frequency": 2}),
        (momentum, {"safeguard": False}),
    ],
)
def test_where_updates_are_proportional_to_the_rate_or_nobody_guards_a_warm_up_is_as_other_steps(make, settings):
    model = network()
    optimizer = aadl.accelerate(make(model), **DEFAULTS | settings)
    train(model, optimizer, rising(100), 100)
    assert statistics(optimizer)["attempts"] > 0
    assert not any(column.warm_up for column in aadl.accelerator_of(optimizer).history.columns)


def test_a_rate_that_rises_to_where_it_has_been_is_no_warm_up():
    model = network()
    optimizer = aadl.accelerate(momentum(model), **DEFAULTS)
    train(model, optimizer, lambda step: 1 - 0.5 * abs(step % 80 - 40) / 40, 40)
    attempts = statistics(optimizer)["attempts"]
    train(model, optimizer, lambda step: 1 - 0.5 * abs(step % 80 - 40) / 40, 120, first=40)
    assert statistics(optimizer)["attempts"] > attempts + 2
    assert not any(column.warm_up for column in aadl.accelerator_of(optimizer).history.columns[-8:])


def test_records_are_those_of_each_group():
    groups = [{"lr": 0.1, "params": []}, {"lr": 1.0, "params": []}]
    rates, optimizer = LearningRates(), torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    settings = aadl.accelerator_of(aadl.accelerate(optimizer, **DEFAULTS)).settings
    seen = []
    for pair in ((0.1, 1.0), (0.2, 1.0), (0.1, 1.0), (0.2, 1.04), (0.2, 1.08), (0.2, 1.2), (0.0, 0.0), (0.2, 1.2)):
        for group, rate in zip(groups, pair, strict=True):
            group["lr"] = rate
        rates.end_macro_step(groups, None, 10)
        seen.append(rates.warm_up(optimizer, settings))
    assert seen == [False, True, False, False, False, True, False, False]
    assert LearningRates(**json.loads(json.dumps(rates.state()))).highest == [0.2, 1.2]


def test_a_later_rise_leaves_the_last_candidate_to_its_judges():
    model = network()
    optimizer = aadl.accelerate(momentum(model, 0.01), **DEFAULTS)
    accelerator, step = aadl.accelerator_of(optimizer), 0
    while not statistics(optimizer)["accepted"]:
        assert step < 400
        train(model, optimizer, rising(1), 20, 0.01, step)
        step += 20
    train(model, optimizer, rising(1), 10, 0.012, step)
    assert accelerator.history.columns[-1].warm_up and accelerator.decisions.accepted is None
    assert statistics(optimizer)["trust_ratio"] == statistics(optimizer)["trust_ratio"]  # judged: it is a number
    attempts = statistics(optimizer)["attempts"]
    train(model, optimizer, rising(1), 10, 0.014, step + 10)
    assert statistics(optimizer)["attempts"] == attempts


def test_a_long_warm_up_is_not_taken_for_idleness():
    x = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=1e-9, momentum=0.9)
    aadl.accelerate(optimizer, **DEFAULTS | {"frequency": 10})
    texts, rising_steps = [], 2 * advice.STEPS
    for step in range(rising_steps + advice.STEPS + 20):
        if step % 10 == 0 and step < rising_steps:
            optimizer.param_groups[0]["lr"] *= 1.1
        x.grad = torch.ones_like(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        texts += [(step, str(warning.message)) for warning in caught]
    ((step, text),) = texts
    assert step == rising_steps + advice.STEPS - 1 and statistics(optimizer)["resets"] == {}
    assert advice.CURES["learning_rate"] not in text


@pytest.mark.parametrize("at", [25, 45, 60])
def test_a_run_that_resumes_in_its_warm_up_repeats_the_uninterrupted_one(at):
    model = network()
    optimizer = aadl.accelerate(momentum(model), **DEFAULTS)
    train(model, optimizer, rising(50), at)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, rising(50), 140 - at, first=at)
    assert statistics(optimizer)["accepted"] > 0
    again = network()
    resumed = aadl.accelerate(momentum(again), **DEFAULTS)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, rising(50), 140 - at, first=at)
    assert identical(snapshot(model, optimizer), snapshot(again, resumed))


def test_a_state_from_before_loads():
    model = network()
    optimizer = aadl.accelerate(momentum(model), **DEFAULTS)
    train(model, optimizer, rising(50), 45)
    state = optimizer.state_dict()
    values = json.loads(state["aadl"]["values"])
    del values["rates"]["highest"], values["progress"]["warmed_up"]
    values["history"]["columns"] = [column[:-1] for column in values["history"]["columns"]]
    state["aadl"]["values"] = json.dumps(values)
    again = network()
    resumed = aadl.accelerate(momentum(again), **DEFAULTS)
    resumed.load_state_dict(state)
    train(again, resumed, rising(50), 100, first=45)
    assert statistics(resumed)["attempts"] > 0
