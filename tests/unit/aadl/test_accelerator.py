"""The accelerator on an optimizer: attaching, detaching, and everything else that torch lets happen around a step."""

import copy
import gc
import json
import math
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from small_runs import (
    ALWAYS,
    EAGER,
    RESIDUAL,
    adam,
    closure_of,
    identical,
    network,
    sgd,
    snapshot,
    squared_error,
    statistics,
    train,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

import aadl

# ---- attaching and detaching ---------------------------------------------------------------------------------------


HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def test_statistics_are_read_only_and_always_the_same_dictionary():
    model = network()
    optimizer = aadl.accelerate(sgd(model), **ALWAYS)
    accelerator = aadl.accelerator_of(optimizer)
    counts = accelerator.statistics
    train(model, optimizer, 12)
    assert counts is accelerator.statistics is accelerator.decisions.statistics
    assert counts["steps"] == 12 and counts["accepted"] > 0
    with pytest.raises(AttributeError):
        accelerator.statistics = {}


def test_removal_leaves_the_optimizer_as_it_was():
    model, plain_model = network(), network()
    optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.02) for m in (model, plain_model))
    before, methods = dict(vars(optimizer)), (optimizer.step, type(optimizer).step)
    aadl.accelerate(optimizer, **ALWAYS)
    assert any(getattr(optimizer, name) for name in HOOKS)
    assert (optimizer.step, type(optimizer).step) == methods
    train(model, optimizer, 12)
    assert statistics(optimizer)["accepted"] > 0
    aadl.remove_acceleration(optimizer)
    assert not any(getattr(optimizer, name) for name in HOOKS)
    after = vars(optimizer)
    assert after.keys() == before.keys() == vars(plain).keys()
    assert all(after[name] is before[name] for name in before)
    assert optimizer.state_dict().keys() == plain.state_dict().keys()

    plain_model.load_state_dict(copy.deepcopy(model.state_dict()))
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 30)
    train(plain_model, plain, 30)
    assert identical(snapshot(model, optimizer), snapshot(plain_model, plain))


def test_the_accelerator_says_what_it_is_attached_to():
    model = network()
    optimizer = adam(model, **ALWAYS)
    accelerator = aadl.accelerator_of(optimizer)
    train(model, optimizer, 12)
    text = repr(accelerator)
    assert text.startswith("AndersonAccelerator(Adam, anderson, relaxation=1, wait_iterations=2, history_depth=4, ")
    counts = accelerator.statistics
    assert text.endswith(f"4 columns held, {counts['accepted']} of {counts['attempts']} accepted)")
    assert accelerator.optimizer is optimizer
    aadl.remove_acceleration(optimizer)
    assert repr(accelerator) == "AndersonAccelerator(removed)"


def test_a_copied_or_pickled_optimizer_is_a_plain_one():
    model = network()
    optimizer = adam(model, **ALWAYS)
    train(model, optimizer, 12)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(ValueError, match=r"this Adam is not accelerated: call aadl\.accelerate"):
            aadl.accelerator_of(again)
        assert "aadl" not in again.state_dict()
        assert identical(again.state_dict()["state"], optimizer.state_dict()["state"])
        aadl.accelerate(again, **ALWAYS)
    assert "aadl" in optimizer.state_dict()


@pytest.mark.parametrize(
    ("copying", "message"),
    [
        (copy.deepcopy, "without its optimizer"),
        (copy.copy, "save its state_dict"),
        (pickle.dumps, "save its state_dict"),
    ],
)
def test_the_accelerator_itself_is_neither_copied_nor_pickled(copying, message):
    accelerator = aadl.accelerator_of(aadl.accelerate(sgd(network())))
    with pytest.raises(TypeError, match=message):
        copying(accelerator)


def test_optimizer_and_accelerator_are_freed_together():
    model = network()
    optimizer = aadl.accelerate(sgd(model, momentum=0.9), **ALWAYS)
    train(model, optimizer, 10)
    accelerator = aadl.accelerator_of(optimizer)
    references = weakref.ref(optimizer), weakref.ref(accelerator)
    del optimizer
    gc.collect()
    assert references[0]() is None
    assert repr(accelerator).startswith("AndersonAccelerator(nothing, ")
    with pytest.raises(ReferenceError, match="no longer exists"):
        _ = accelerator.optimizer
    del accelerator
    gc.collect()
    assert references[1]() is None


# ---- the step and what others hang on it ---------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
def test_step_returns_what_the_base_optimizer_returns(keyword):
    model, plain_model = network(), network()
    optimizer, plain = aadl.accelerate(sgd(model), **ALWAYS), sgd(plain_model)
    closure, plain_closure = closure_of(model, optimizer), closure_of(plain_model, plain)
    for _ in range(20):
        plain_model.load_state_dict(model.state_dict())
        value = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert identical(value.detach(), plain.step(plain_closure).detach())
    assert statistics(optimizer)["accepted"] > 0
    token = object()
    assert optimizer.step(lambda: token) is token
    assert optimizer.step() is None


SCHEDULERS = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30),
    "LambdaLR from zero": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, t / 5)),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=31),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_built_before_and_after(make):
    runs = []
    for order in ("plain", "before", "after"):
        model = network()
        optimizer = sgd(model, momentum=0.9)
        if order == "after":
            aadl.accelerate(optimizer, **RESIDUAL)
        scheduler = make(optimizer)
        if order == "before":
            aadl.accelerate(optimizer, **RESIDUAL)
        rates = []

        def after(step, rates=rates, scheduler=scheduler):
            rates.append(scheduler.get_last_lr())
            scheduler.step()

        losses = train(model, optimizer, 30, after=after)
        runs.append((rates, scheduler.last_epoch, losses, snapshot(model, optimizer)["model"]))
    plain, before, after_ = runs
    assert before[:2] == after_[:2] == plain[:2]
    assert identical(before[2:], after_[2:])
    assert statistics(optimizer)["steps"] == sum(rate != [0.0] for rate in plain[0])
    assert before[2][-1] < before[2][0]


def test_rates_of_groups_that_do_not_train_reset_nothing():
    model, frozen = network(), nn.Parameter(torch.zeros(2), requires_grad=False)
    optimizer = sgd(model)
    aadl.accelerate(optimizer, **RESIDUAL)
    train(model, optimizer, 6)
    optimizer.add_param_group({"params": [frozen], "lr": 1.0})
    train(model, optimizer, 6)
    optimizer.param_groups[1]["lr"] = 7.0
    train(model, optimizer, 6)
    assert statistics(optimizer)["resets"] == {}
    assert statistics(optimizer)["accepted"] > 0


def test_a_group_that_comes_within_a_macro_step_leaves_the_rates_as_they_are():
    model, frozen = network(), nn.Parameter(torch.zeros(2), requires_grad=False)
    optimizer = sgd(model)
    aadl.accelerate(optimizer, store_each_nth=10, frequency=20)
    train(model, optimizer, 24)
    optimizer.add_param_group({"params": [frozen], "lr": 0.1})
    train(model, optimizer, 26)
    assert {column.learning_rate for column in aadl.accelerator_of(optimizer).history.columns} == {1.0}
    assert statistics(optimizer)["resets"] == {}


def state_of(optimizer):
    state = copy.deepcopy(aadl.accelerator_of(optimizer).state_dict())
    return state | {"values": json.loads(state["values"])}


@pytest.mark.parametrize("arguments", [{}, {"fused": True}], ids=["plain", "fused"])
def test_steps_that_a_grad_scaler_skips_leave_history_and_counters_alone(arguments):
    def run(settings):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02, **arguments)
        if settings:
            aadl.accelerate(optimizer, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        for step in range(30):
            optimizer.zero_grad()
            scaler.scale(squared_error(model)).backward()
            overflow = step in (0, 7, 8, 15, 22)
            if overflow:
                next(model.parameters()).grad[0] = math.inf
            held = before = None
            if settings:
                held = state_of(optimizer)
                before = snapshot(model, optimizer)["model"]
            scaler.step(optimizer)
            scaler.update()
            if settings and settings["history_depth"]:
                now = state_of(optimizer)
                if overflow and (step or not arguments):  # a fused first step notes where it starts
                    skipped = [values["statistics"].pop("skipped_steps") for values in (held["values"], now["values"])]
                    assert skipped[1] - skipped[0] == len(arguments)
                    assert identical(held, now)
                    assert identical(before, snapshot(model, optimizer)["model"])
                assert identical(held, now) == (overflow and (step > 0 or not arguments))
        return snapshot(model, optimizer), optimizer

    plain, _ = run({})
    idle, _ = run(ALWAYS | {"history_depth": 0})
    accelerated, optimizer = run(ALWAYS)
    assert identical(plain, idle)
    assert not identical(plain, accelerated)
    assert statistics(optimizer)["steps"] == 25
    assert statistics(optimizer)["accepted"] > 5


@pytest.mark.parametrize("settings", [RESIDUAL, RESIDUAL | {"safeguard": "loss"}], ids=["residual", "loss"])
def test_a_compiled_model_is_compiled_once(settings):
    """Neither hooks nor trial evaluations make it compile again, and the run is that of the plain model."""
    ends, counters = [], []
    for compiled, accelerated in ((True, False), (True, True), (False, True)):
        torch._dynamo.reset()
        counters.append(CompileCounter())
        model = network(nn.BatchNorm1d(6))
        used = torch.compile(model, backend=counters[-1]) if compiled else model
        optimizer = sgd(model, momentum=0.9)
        if accelerated:
            aadl.accelerate(optimizer, **settings)
        train(used, optimizer, 30, with_closure=True)
        ends.append(snapshot(model, optimizer))
    assert statistics(optimizer)["accepted"] > 0
    assert counters[0].frame_count == counters[1].frame_count > 0
    assert identical(ends[1], ends[2])
    assert not identical(ends[0], ends[1])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_accelerates_and_is_not_compiled_again_and_again():
    ends, counters = [], []
    for compiled, accelerated in ((True, False), (True, True), (False, True)):
        torch._dynamo.reset()
        counters.append(CompileCounter())
        model = network()
        optimizer = sgd(model, momentum=0.9, foreach=True)
        if accelerated:
            aadl.accelerate(optimizer, **RESIDUAL)
        closure = closure_of(model, optimizer)

        def step(optimizer=optimizer):
            optimizer.step()

        step = torch.compile(step, backend=counters[-1]) if compiled else step
        for _ in range(30):
            closure()
            step()
        ends.append(snapshot(model, optimizer))
    assert identical(ends[1], ends[2])
    assert not identical(ends[0], ends[1])
    assert counters[1].frame_count <= 2 * counters[0].frame_count + 2


# ---- modes of torch ------------------------------------------------------------------------------------------------


def state_before_the_first_step(optimizer, step):
    if step == 0:
        optimizer.state_dict()


def state_after_every_step(optimizer, step):
    optimizer.state_dict()


def load_its_own_state(optimizer, step):
    if step == 7:
        accelerator = aadl.accelerator_of(optimizer)
        accelerator.load_state_dict(copy.deepcopy(accelerator.state_dict()))
        optimizer.load_state_dict(optimizer.state_dict())


def look_at_it(optimizer, step):
    repr(aadl.accelerator_of(optimizer)), statistics(optimizer), aadl.accelerator_of(optimizer).history_bytes


MODES = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients disabled": lambda: torch.set_grad_enabled(False),
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", [state_before_the_first_step, state_after_every_step, load_its_own_state, look_at_it])
def test_what_is_called_under_a_mode_of_torch_disturbs_no_step(call, mode):
    ends = []
    for used in (False, True):
        model = network()
        optimizer = aadl.accelerate(sgd(model), **RESIDUAL | {"store_each_nth": 2})
        closure = closure_of(model, optimizer)
        for step in range(30):
            if used:
                with MODES[mode]():
                    call(optimizer, step)
            closure()
            optimizer.step()
        assert statistics(optimizer)["accepted"] > 0
        ends.append(snapshot(model, optimizer))
    assert identical(*ends)


@pytest.mark.parametrize("average", [False, "always"])
@pytest.mark.parametrize("mode", MODES)
def test_steps_under_a_mode_of_torch(mode, average):
    ends = []
    for used in (False, True):
        model = network()
        optimizer = sgd(model)
        with MODES[mode]() if used else nullcontext():
            aadl.accelerate(optimizer, **RESIDUAL | {"average": average})
        closure = closure_of(model, optimizer)
        for _ in range(30):
            closure()
            with MODES[mode]() if used else nullcontext():
                optimizer.step()
        train(model, optimizer, 10)
        assert statistics(optimizer)["accepted"] > 0
        ends.append(snapshot(model, optimizer))
    assert identical(*ends)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_torch_changes_nothing(dtype):
    ends, before = [], torch.get_default_dtype()
    for default in (before, dtype):
        model = network()
        optimizer = aadl.accelerate(sgd(model), **RESIDUAL | {"average": "always"})
        torch.set_default_dtype(default)
        try:
            train(model, optimizer, 30)
            state = copy.deepcopy(optimizer.state_dict())
        finally:
            torch.set_default_dtype(before)
        assert statistics(optimizer)["accepted"] > 0
        ends.append((snapshot(model, optimizer), state))
    assert identical(*ends)


def test_tensors_without_values_are_refused_and_real_ones_are_left_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match=r"shape \(6, 3\) is a FakeTensor"):
        aadl.accelerate(sgd(network()), **RESIDUAL)
    optimizer = aadl.accelerate(sgd(network()), **RESIDUAL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert aadl.accelerator_of(optimizer).state_dict()["rows"] == {}
        with pytest.raises(ValueError, match="this SGD cannot be accelerated within FakeTensorMode"):
            optimizer.step()
    ends = []
    for used in (False, True):
        model = network()
        optimizer = aadl.accelerate(sgd(model), **RESIDUAL)
        for _ in range(20):
            with FakeTensorMode(allow_non_fake_inputs=True) if used else nullcontext():
                optimizer.state_dict()
            train(model, optimizer, 1)
        ends.append(snapshot(model, optimizer))
    assert identical(*ends) and statistics(optimizer)["accepted"] > 0


def test_a_shallow_copy_of_an_optimizer_is_a_plain_one_and_its_steps_are_noticed():
    model = network()
    optimizer = aadl.accelerate(sgd(model), **RESIDUAL | {"store_each_nth": 4, "frequency": 8})
    train(model, optimizer, 6)
    again = copy.copy(optimizer)
    with pytest.raises(ValueError, match="this SGD is not accelerated"):
        aadl.accelerator_of(again)
    train(model, again, 1)
    assert statistics(optimizer)["steps"] == 6 and statistics(optimizer)["moved"] == 0
    train(model, optimizer, 1)
    assert statistics(optimizer)["moved"] == 1


@pytest.mark.parametrize("other_is_accelerated", [False, True])
def test_two_optimizers_of_the_same_parameters(other_is_accelerated):
    """Each takes the steps of the other for a part of its map."""
    model = network()
    one, other = sgd(model, 0.02), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    settings = EAGER | {"store_each_nth": 5, "frequency": 10, "average": False}
    aadl.accelerate(one, **settings)
    if other_is_accelerated:
        aadl.accelerate(other, **settings)
    losses = []
    for _ in range(200):
        losses += train(model, one, 1)
        train(model, other, 1)
    assert losses[-1] < 0.5 * losses[0]
    assert statistics(one)["accepted"] > 0 and statistics(one)["macro_steps"] > 25
