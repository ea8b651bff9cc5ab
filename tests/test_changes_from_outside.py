"""Somebody else changes the parameters between steps: pairs stay true, and nothing that was written is undone."""

import copy

import pytest
import torch
from small_runs import (
    ALWAYS,
    RESIDUAL,
    Pairs,
    identical,
    network,
    sgd,
    statistics,
    stored_columns,
    train,
)
from torch import nn

import aadl
from aadl.flat import SAMPLE

# ---- pairs stay true -----------------------------------------------------------------------------------------------


def step_with_true_pairs(model, optimizer, pairs):
    """One step, after which the stored columns are those of the pairs that were seen, reverted ones among them."""
    train(model, optimizer, 1)
    held = len(aadl.accelerator_of(optimizer)._history.columns)
    if held:
        assert identical(stored_columns(aadl.accelerator_of(optimizer)), pairs.columns(held))


def clip(model):
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.4, 0.4)


def exchange(model):
    for p in model.parameters():
        p.data = 0.9 * p.data


def overwrite(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def write_through_data(model):
    for p in model.parameters():
        p.data.mul_(0.9)


@pytest.mark.parametrize("change", [clip, exchange, overwrite, write_through_data])
@pytest.mark.parametrize("settings", [ALWAYS, RESIDUAL], ids=["all taken", "residual"])
def test_pairs_stay_true_where_the_user_changes_parameters(change, settings):
    model = network()
    optimizer = sgd(model)
    pairs = Pairs(optimizer)
    aadl.accelerate(optimizer, **settings)
    changed = 0
    for step in range(30):
        step_with_true_pairs(model, optimizer, pairs)
        if step % 3 == 1:
            before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            change(model)
            changed += not torch.equal(before, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert changed > 5
    assert statistics(optimizer)["accepted"] > 0


@pytest.mark.parametrize("settings", [ALWAYS, RESIDUAL], ids=["all taken", "residual"])
@pytest.mark.parametrize("average", [False, "always"])
def test_pairs_stay_true_after_accepting_rejecting_and_reverting(settings, average):
    model = network()
    optimizer = sgd(model, 0.01, momentum=0.9)
    pairs = Pairs(optimizer)
    aadl.accelerate(optimizer, **settings | {"average": average})
    for _ in range(60):
        step_with_true_pairs(model, optimizer, pairs)
    assert statistics(optimizer)["accepted"] > 3


def test_reset_abandons_the_running_macro_step():
    model = network()
    optimizer = aadl.accelerate(sgd(model), **ALWAYS | {"store_each_nth": 3, "frequency": 300})
    accelerator = aadl.accelerator_of(optimizer)
    train(model, optimizer, 10)
    assert len(accelerator._history.columns) == 2
    overwrite(model)
    aadl.reset_history(optimizer)
    assert accelerator.statistics["resets"] == {"user": 1}
    assert accelerator.statistics["steps"] == 10
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    train(model, optimizer, 2)
    assert not accelerator._history.has_pair
    train(model, optimizer, 1)
    end = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(accelerator._history.blocks[0].residual, end - start)
    assert accelerator._history.columns == []


# ---- changes from outside ------------------------------------------------------------------------------------------


def test_weights_restored_through_data_are_not_reverted():
    model = network()
    optimizer = aadl.accelerate(sgd(model), **ALWAYS | {"safeguard": "residual"})
    other = copy.deepcopy(model.state_dict())
    for value in other.values():
        value.mul_(30)
    accelerator = aadl.accelerator_of(optimizer)
    while accelerator._decisions.pending is None:
        train(model, optimizer, 1)
    for name, p in model.named_parameters():
        p.data.copy_(other[name])
    train(model, optimizer, 1)
    assert accelerator.statistics["reverted"] == 0
    assert accelerator.statistics["moved"] == 1
    start = torch.cat([other[name].reshape(-1) for name, _ in model.named_parameters()])
    end = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert float((end - start).norm()) < 0.5 * float(start.norm())


def test_a_cleared_momentum_buffer_starts_a_new_macro_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    aadl.accelerate(optimizer, **ALWAYS | {"state_coupling": "full", "wait_iterations": 10**9})
    history = None
    for step in range(6):
        train(model, optimizer, 1)
        if step == 4:
            for state in optimizer.state.values():
                state["momentum_buffer"].zero_()
    history = aadl.accelerator_of(optimizer)._history
    buffers = torch.cat([optimizer.state[p]["momentum_buffer"].reshape(-1) for p in model.parameters()])
    momentum = next(block for block in history.blocks if block.kind == "momentum")
    assert torch.equal(momentum.residual, buffers)  # from zero to here
    assert aadl.accelerator_of(optimizer).statistics["moved"] == 1


def test_parameters_of_another_shape_are_laid_out_again():
    model = network()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **ALWAYS)
    train(model, optimizer, 6)
    model[0].weight.data = torch.randn(8, 3)
    model[0].bias.data = torch.randn(8)
    model[2].weight.data = torch.randn(1, 8)
    for p in model.parameters():
        p.grad = None
    train(model, optimizer, 6)
    assert statistics(optimizer)["resets"] == {"parameters_changed": 1}


# ---- how changes are noticed ---------------------------------------------------------------------------------------


def in_place(p, part):
    with torch.no_grad():
        p[part] += 1.0


def through_data(p, part):
    p.data[part] += 1.0


def through_a_view(p, part):
    p.detach()[part] += 1.0


def new_memory(p, part):
    p.data = p.data.clone()
    p.data[part] += 1.0


def turned(p, part):
    p.data = p.data[[*range(SAMPLE), *reversed(range(SAMPLE, p.numel()))]]


INSIDE, BEYOND = slice(0, 1), slice(SAMPLE, None)
NOTICED = [
    ("parameter", in_place, INSIDE, True),
    ("parameter", in_place, BEYOND, True),
    ("parameter", through_a_view, BEYOND, True),
    ("parameter", new_memory, BEYOND, True),
    ("parameter", turned, BEYOND, True),
    ("parameter", through_data, INSIDE, True),
    ("parameter", through_data, slice(SAMPLE - 1, SAMPLE), True),
    ("momentum", in_place, BEYOND, True),
    ("momentum", through_a_view, BEYOND, True),
    ("momentum", new_memory, BEYOND, True),
    # documented: in place through `.data`, and none of the elements that are sampled of parameters
    ("parameter", through_data, BEYOND, False),
    ("momentum", through_data, INSIDE, False),
]


@pytest.mark.parametrize("store_each_nth", [1, 3])
@pytest.mark.parametrize(("which", "change", "part", "noticed"), NOTICED)
def test_what_is_noticed(which, change, part, noticed, store_each_nth):
    x = nn.Parameter(torch.linspace(1, 2, 3 * SAMPLE, dtype=torch.float64))
    weights = torch.linspace(0.1, 1, 3 * SAMPLE, dtype=torch.float64)
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.5)
    accelerator = aadl.accelerator_of(
        aadl.accelerate(optimizer, **ALWAYS | {"store_each_nth": store_each_nth, "frequency": 10**6})
    )

    def step():
        for _ in range(store_each_nth):
            x.grad = weights * x.detach()
            optimizer.step()

    for _ in range(3):
        step()
    assert accelerator.statistics["moved"] == 0
    changed = x if which == "parameter" else optimizer.state[x]["momentum_buffer"]
    change(changed, part)
    start = x.detach().clone(), optimizer.state[x]["momentum_buffer"].clone()
    step()
    assert accelerator.statistics["moved"] == noticed
    end = x.detach(), optimizer.state[x]["momentum_buffer"]
    for block, before, after in zip(accelerator._history.blocks, start, end, strict=True):
        if noticed or (block.kind == "parameters") != (which == "parameter"):
            assert torch.equal(block.residual, after - before)
        else:
            assert not torch.equal(block.residual, after - before)
    assert accelerator._history.columns[-1].consecutive != noticed
    for _ in range(2):
        step()
    assert accelerator.statistics["moved"] == noticed  # it starts again where the last one ended


def same_values(p):
    with torch.no_grad():
        p.copy_(p.detach().clone())


def same_values_elsewhere(p):
    p.data = p.data.clone()


@pytest.mark.parametrize("change", [same_values, same_values_elsewhere])
def test_writing_the_same_values_is_no_change(change):
    ends = []
    for changes in (False, True):
        model = network()
        optimizer = aadl.accelerate(sgd(model), **RESIDUAL)
        for _ in range(20):
            train(model, optimizer, 1)
            for p in model.parameters() if changes else ():
                change(p)
        assert statistics(optimizer)["moved"] == 0 and statistics(optimizer)["accepted"] > 0
        ends.append([p.detach().clone() for p in model.parameters()])
    assert identical(*ends)


def test_a_tensor_that_takes_the_place_of_a_buffer_is_noticed():
    model = network()
    optimizer = aadl.accelerate(sgd(model, momentum=0.9), **ALWAYS | {"frequency": 10**6})
    train(model, optimizer, 3)
    state = optimizer.state[model[0].weight]
    state["momentum_buffer"] = state["momentum_buffer"].clone()
    train(model, optimizer, 1)
    assert statistics(optimizer)["moved"] == 0
    state["momentum_buffer"] = state["momentum_buffer"] + 1
    train(model, optimizer, 1)
    assert statistics(optimizer)["moved"] == 1


@pytest.mark.parametrize("through", ["data", "version"])
@pytest.mark.parametrize("safeguard", [False, "residual"])
def test_a_reset_within_a_macro_step_begins_where_the_parameters_are(safeguard, through):
    """Whatever the optimizer does to them: one that writes through `.data`, and to rows that are not sampled."""

    class Rows(torch.optim.Optimizer):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    target = p.data if through == "data" else p.detach()
                    target[SAMPLE:] -= group["lr"] * p.data[SAMPLE:]

    x = nn.Parameter(torch.ones(3 * SAMPLE))
    optimizer = Rows([x], {"lr": 0.1})
    aadl.accelerate(optimizer, **ALWAYS | {"store_each_nth": 3, "frequency": 10**6, "safeguard": safeguard})
    for _ in range(8):
        optimizer.step()
    aadl.reset_history(optimizer)
    start = x.detach().clone()
    for _ in range(3):
        optimizer.step()
    assert torch.equal(aadl.accelerator_of(optimizer)._history.blocks[0].residual, x.detach() - start)
