"""Somebody else changes the parameters between steps: pairs stay true, and nothing that was written is undone."""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from small_runs import (
    ALWAYS,
    RESIDUAL,
    Pairs,
    flat,
    identical,
    network,
    sgd,
    snapshot,
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
    held = len(aadl.accelerator_of(optimizer).history.columns)
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
    num_changes = 0
    for step in range(30):
        step_with_true_pairs(model, optimizer, pairs)
        if step % 3 == 1:
            before = flat(model)
            change(model)
            num_changes += not torch.equal(before, flat(model))
    assert num_changes > 5
    assert statistics(optimizer)["accepted"] > 0


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
    for block, before, after in zip(accelerator.history.blocks, start, end, strict=True):
        if noticed or (block.kind == "parameters") != (which == "parameter"):
            assert torch.equal(block.residual, after - before)
        else:
            assert not torch.equal(block.residual, after - before)
    assert accelerator.history.columns[-1].consecutive != noticed
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
    start, accelerator = x.detach().clone(), aadl.accelerator_of(optimizer)
    for _ in range(3):
        assert not accelerator.history.has_pair
        optimizer.step()
    assert torch.equal(accelerator.history.blocks[0].residual, x.detach() - start)
    assert accelerator.history.columns == [] and accelerator.statistics["resets"] == {"user": 1}
    assert accelerator.statistics["steps"] == 11


# ---- within a macro-step -------------------------------------------------------------------------------------------

MACRO = {"wait_iterations": 1, "store_each_nth": 10, "frequency": 20, "average": False}
"""The schedule by default; a candidate is accepted at step 40 of the run below, and judged at 50."""


def macro_run(momentum=0.0, **settings):
    """(model, optimizer) with this schedule."""
    model = network()
    return model, aadl.accelerate(sgd(model, 0.02, momentum=momentum), **MACRO | settings)


def load(model, optimizer, weights):
    model.load_state_dict(weights)


def copy_in(model, optimizer, weights):
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(weights.values()))


def point_elsewhere(model, optimizer, weights):
    for name, p in model.named_parameters():
        p.data = weights[name].clone()


def copy_through_data(model, optimizer, weights):
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])


def start_again(model, optimizer, weights):
    with torch.no_grad():
        model[0].weight.copy_(weights["0.weight"])
    optimizer.state.clear()


def load_both(model, optimizer, weights):
    model.load_state_dict(weights)
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5).state_dict())


@pytest.mark.parametrize("at", [41, 45, 49])
@pytest.mark.parametrize("change", [load, copy_in, point_elsewhere, copy_through_data, start_again, load_both])
def test_no_candidate_is_taken_back_over_a_change(change, at):
    """After the change the run is that of the plain optimizer from there, until the next candidate."""
    (model, optimizer), plain_model = macro_run(0.5), network()
    weights = {name: 30 * value for name, value in model.state_dict().items()}
    accelerator = aadl.accelerator_of(optimizer)
    train(model, optimizer, at)
    assert accelerator.statistics["accepted"] > 0 and accelerator.decisions.accepted is not None
    change(model, optimizer, weights)
    plain = sgd(plain_model, 0.02, momentum=0.5)
    plain_model.load_state_dict(model.state_dict())
    plain.load_state_dict(copy.deepcopy({k: v for k, v in optimizer.state_dict().items() if k != "aadl"}))
    train(model, optimizer, 50 - at)
    train(plain_model, plain, 50 - at)
    assert identical(snapshot(model, optimizer)["model"], snapshot(plain_model, plain)["model"])
    assert accelerator.statistics["reverted"] == 0
    if change is not load_both:  # which starts everything again
        assert accelerator.statistics["moved"] == 1 and accelerator.decisions.accepted is None
        assert sum(column.written is None for column in accelerator.history.columns) == 3


def test_a_change_without_a_pending_candidate_starts_the_macro_step_again():
    model, optimizer = macro_run(frequency=10**6)
    train(model, optimizer, 34)
    load(model, optimizer, {name: 2 * value for name, value in model.state_dict().items()})
    start = flat(model)
    train(model, optimizer, 10)
    history = aadl.accelerator_of(optimizer).history
    end = flat(model)
    assert torch.equal(history.blocks[0].residual, end - start)
    assert len(history.columns) == 3 and statistics(optimizer)["moved"] == 1 and not history.columns[-1].consecutive


def clamp_through_data(model, step):
    for p in model.parameters():
        p.data.clamp_(-0.4, 0.4)


def clamp_elsewhere(model, step):
    for p in model.parameters():
        p.data = p.data.clamp(-0.4, 0.4)


def mask(model, step):
    with torch.no_grad():
        model[0].weight[::2] = 0


def change_gradients(model, step):
    for p in model.parameters():
        p.grad = None if step % 2 else torch.ones_like(p)


def synchronize(every):
    """As Lookahead does: after so many steps, the mean of the weights and of slow ones."""

    def change(model, step):
        if step == 1:
            model.slow = [p.detach().clone() for p in model.parameters()]
        if step % every == 0:
            with torch.no_grad():
                for slow, p in zip(model.slow, model.parameters(), strict=True):
                    p.copy_(slow.lerp_(p, 0.5))

    return change


def look_elsewhere(every, through=load):
    """Evaluates other weights, and puts those of the training back."""

    def change(model, step):
        if step % every == 0:
            own = copy.deepcopy(model.state_dict())
            through(model, None, {name: 0 * value for name, value in own.items()})
            through(model, None, own)

    return change


WRITES = {  # what is written after every step, and how many macro-steps of 40 it may cost
    "nothing": (lambda model, step: None, 0),
    "gradients": (change_gradients, 0),
    "clamp": (lambda model, step: clip(model), 0),
    "clamp through data": (clamp_through_data, 0),
    "clamp elsewhere": (clamp_elsewhere, 2),
    "mask": (mask, 0),
    "outer steps of 5": (synchronize(5), 2),
    "outer steps of 7": (synchronize(7), 2),
    "outer steps of 10": (synchronize(10), 0),
    "outer steps of 13": (synchronize(13), 10),
    "evaluation after each": (look_elsewhere(1), 0),
    "evaluation after 7": (look_elsewhere(7), 2),
    "evaluation after 35": (look_elsewhere(35), 8),
    "evaluation after 40": (look_elsewhere(40), 0),
    "evaluation through data": (look_elsewhere(7, copy_through_data), 0),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_comes_regularly_belongs_to_the_map(name):
    change, lost = WRITES[name]
    model, optimizer = macro_run()
    train(model, optimizer, 400, after=lambda step: change(model, step))
    counts = statistics(optimizer)
    stored = len(aadl.accelerator_of(optimizer).history.columns) + 1
    assert counts["macro_steps"] >= 40 - lost and stored == 11
    assert counts["accepted"] > 0 and counts["resets"] == {}


@pytest.mark.parametrize("through", [load, copy_through_data])
def test_values_that_are_put_back_cost_the_running_pair_at_most(through):
    ends = []
    for change in (lambda model, step: None, look_elsewhere(20, through)):
        model, optimizer = macro_run()
        train(model, optimizer, 200, after=lambda step, change=change, model=model: change(model, step))
        ends.append(snapshot(model, optimizer)["model"])
        assert statistics(optimizer)["moved"] == 0 and statistics(optimizer)["accepted"] > 0
    assert identical(*ends)  # between two macro-steps they cost nothing
    train(model, optimizer, 5)
    look_elsewhere(1, through)(model, 1)
    train(model, optimizer, 15)
    assert len(aadl.accelerator_of(optimizer).history.columns) == 10
    assert statistics(optimizer)["moved"] == (through is load)


def spectral(model):
    nn.utils.parametrizations.spectral_norm(model[0])


def weight_normalized(model):
    nn.utils.parametrizations.weight_norm(model[0])


def pruned(model):
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)


def compiled(model):
    model.compile(backend="eager")


@pytest.mark.parametrize("make", [spectral, weight_normalized, pruned, compiled])
def test_models_that_compute_their_weights_change_nothing_from_outside(make):
    torch._dynamo.reset()
    model = network()
    make(model)
    optimizer = aadl.accelerate(sgd(model, 0.02), **MACRO)
    train(model, optimizer, 200)
    counts = statistics(optimizer)
    assert counts["moved"] == 0 and counts["macro_steps"] == 20 and counts["accepted"] > 0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("store_each_nth", [2, 3])
def test_a_load_within_the_first_macro_step_leaves_no_false_pair(store_each_nth, steps):
    """Nobody knows yet whether the first write is one of many."""
    model, pairs = network(), []
    optimizer = aadl.accelerate(sgd(model), **ALWAYS | {"store_each_nth": store_each_nth, "frequency": 10**6})
    for step in range(1, 14):
        train(model, optimizer, 1)
        history = aadl.accelerator_of(optimizer).history
        pairs.append(flat(model))
        if step == steps:
            load(model, optimizer, {name: 3 * value for name, value in model.state_dict().items()})
            loaded = flat(model)
    assert history.has_pair and statistics(optimizer)["moved"] <= 1
    assert float(history.blocks[0].delta_residual.norm()) < 0.2 * float((loaded - pairs[steps - 1]).norm())


def test_a_load_is_noticed_beside_regular_writes():
    model, optimizer = macro_run()
    train(model, optimizer, 45, after=lambda step: clip(model))
    moved = statistics(optimizer)["moved"]
    load(model, optimizer, {name: 2 * value for name, value in model.state_dict().items()})
    train(model, optimizer, 1)
    assert statistics(optimizer)["moved"] == moved + 1
    assert aadl.accelerator_of(optimizer).steps_in_macro_step == 1


REGULAR = {"clamp": lambda model, step: clip(model), "elsewhere": clamp_elsewhere, "outer steps": synchronize(3)}


@pytest.mark.parametrize("change", REGULAR.values(), ids=REGULAR)
def test_a_resumed_run_knows_which_writes_are_regular(change):
    """It repeats the uninterrupted one bit for bit, wherever it was saved."""
    settings, saved = {"store_each_nth": 4, "frequency": 8}, {}
    model, optimizer = macro_run(0.5, **settings)

    def save(step):
        change(model, step)
        if step in (2, 9, 16, 19, 33, 42):
            state = model.state_dict(), optimizer.state_dict(), getattr(model, "slow", None)
            saved[step] = copy.deepcopy(state)

    train(model, optimizer, 60, after=save)
    assert statistics(optimizer)["accepted"] > 0
    for last, (weights, state, slow) in saved.items():
        other, again = macro_run(0.5, **settings)
        other.load_state_dict(weights)
        other.slow = slow
        again.load_state_dict(state)
        train(other, again, 60 - last, after=lambda step, other=other, last=last: change(other, step + last))
        assert identical(snapshot(other, again), snapshot(model, optimizer)), last
        assert identical(statistics(again), statistics(optimizer)), last


def test_macro_steps_that_never_end_give_one_warning():
    model, optimizer = macro_run()

    def write(step):  # each time in another way
        with torch.no_grad():
            for _ in range(step % 101):
                model[0].weight.mul_(1.0)

    train(model, optimizer, 9, after=write)
    with pytest.warns(UserWarning, match="the last 10 macro-steps of this SGD were abandoned") as said:
        train(model, optimizer, 80, after=lambda step: write(step + 9))
    assert len(said) == 1 and statistics(optimizer)["macro_steps"] == 0
    assert "store_each_nth=1" in str(said[0].message)
    with warnings.catch_warnings(record=True) as none:
        train(model, optimizer, 10)
        train(model, optimizer, 40, after=lambda step: write(step + 9))
    assert statistics(optimizer)["macro_steps"] > 0 and not none
