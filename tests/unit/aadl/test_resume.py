"""Saving and loading: a run continued in a fresh process repeats the uninterrupted one bit for bit."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT, SUPPORT
from small_runs import EAGER, INPUTS, TARGETS, adam, closure_of, flat, identical, network, snapshot, train

import aadl
from aadl.acceptance import Cause, count
from aadl.attached import VERSION

STEPS = 54
SAVED_AT = range(10, 44, 3)
"""Few steps, among them every situation that test_the_runs_were_interrupted_in_all_situations names."""
RESIDUAL = {"safeguard": "residual"}
RUNS = {
    "nesterov": (
        "SGD",
        {"lr": 0.02, "momentum": 0.9, "nesterov": True},
        {"store_each_nth": 2, "frequency": 4, "safeguard": False},
    ),
    "adam": ("Adam", {"lr": 0.05}, {"store_each_nth": 2, "frequency": 3, **RESIDUAL}),
    "adam by loss": ("Adam", {"lr": 0.05}, {"store_each_nth": 2, "frequency": 3}),
    "plain SGD": ("SGD", {"lr": 0.02}, {"history_depth": 3, **RESIDUAL}),
    "parameters only": ("SGD", {"lr": 0.02, "momentum": 0.9}, {"state_coupling": "params", **RESIDUAL}),
    "bfloat16 history": ("Adam", {"lr": 0.05}, {"history_dtype": torch.bfloat16, **RESIDUAL}),
    "always averaged": ("Adam", {"lr": 0.05}, {"average": "always", "store_each_nth": 3, "frequency": 5, **RESIDUAL}),
    "moving average alone": (
        "SGD",
        {"lr": 0.02, "momentum": 0.9},
        {"acceleration_type": "identity", "average": "always"},
    ),
    "averaged at times": (
        "SGD",
        {"lr": 0.02, "momentum": 0.9},
        {"average": True, "average_tolerance": 0.2, "safeguard": False},
    ),
    "coefficients only": ("Adam", {"lr": 0.05}, {"state_coupling": "combine", "safeguard": False}),
}


def start(name):
    kind, arguments, settings = RUNS[name]
    model = network()
    return model, getattr(torch.optim, kind)(model.parameters(), **arguments), EAGER | settings


def go_on(model, optimizer, first, last, after=lambda step: None):
    """Steps first..last on batches that depend on the step alone."""
    scheduler_rates = {20: 1.1, 30: 0.5}
    for step in range(first, last + 1):
        for group in optimizer.param_groups:
            group["lr"] *= scheduler_rates.get(step, 1)
        weight = 30.0 if 22 <= step <= 24 else 1.0  # a promise that is pending then is broken
        rows = torch.randperm(16, generator=torch.Generator().manual_seed(step))[:12]

        def loss(m, rows=rows, weight=weight):
            return weight * (m(INPUTS[rows]) - TARGETS[rows]).square().mean()

        optimizer.step(closure_of(model, optimizer, loss))
        after(step)


def values_of(state):
    """The plain values in the state of an accelerator."""
    return json.loads(state["values"])


def end_of(model, optimizer):
    return {**snapshot(model, optimizer), "accelerator": copy.deepcopy(aadl.accelerator_of(optimizer).state_dict())}


def continue_all(folder):
    """In the fresh process: load every checkpoint, continue it, save where it ends."""
    torch.set_num_threads(1)
    for path in sorted(Path(folder).glob("*.checkpoint")):
        saved = torch.load(path, weights_only=True)
        name, step = re.fullmatch(r"(.*)-(\d+)\.checkpoint", path.name).groups()
        model, optimizer, settings = start(name)
        aadl.accelerate(optimizer, **settings)
        if int(step) % 2:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        else:
            optimizer.load_state_dict(saved["optimizer"])
            model.load_state_dict(saved["model"])
        go_on(model, optimizer, int(step) + 1, STEPS)
        torch.save(end_of(model, optimizer), path.with_suffix(".end"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder with the ends of the continued runs, ends of the uninterrupted ones, what was going on at each save)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    ends, situations = {}, {}
    for name in RUNS:
        torch.manual_seed(0)
        model, optimizer, settings = start(name)
        aadl.accelerate(optimizer, **settings)
        accelerator = aadl.accelerator_of(optimizer)

        def save(step, name=name, model=model, optimizer=optimizer, accelerator=accelerator):
            if step in SAVED_AT:
                checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(checkpoint, folder / f"{name}-{step}.checkpoint")
                state = values_of(checkpoint["optimizer"]["aadl"])
                situations.setdefault(name, []).append(
                    {
                        "mid macro-step": state["progress"]["in_macro_step"] > 0,
                        "on trial": state["accepted"] is not None,
                        "confirmed": state["confirmed"] is not None,
                        "averaging": state["averaging"],
                        "reverted": accelerator.statistics["reverted"] > 0,
                        "paused": state["pause"]["until"] > accelerator.statistics["macro_steps"],
                    }
                )

        go_on(model, optimizer, 1, STEPS, save)
        ends[name] = end_of(model, optimizer)
    path = os.pathsep.join(map(str, (Path(__file__).resolve().parent, SUPPORT, ROOT)))
    command = [sys.executable, "-W", "error", "-c", f"import test_resume; test_resume.continue_all({str(folder)!r})"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=600)
    return folder, ends, situations


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_repeats_the_uninterrupted_one(uninterrupted, name):
    folder, ends, _ = uninterrupted
    assert values_of(ends[name]["accelerator"])["statistics"]["accepted"] >= 1
    for step in SAVED_AT:
        assert identical(torch.load(folder / f"{name}-{step}.end"), ends[name]), step


def test_the_runs_were_interrupted_in_all_situations(uninterrupted):
    _, _, situations = uninterrupted
    seen = {
        name: {key for entry in entries for key, value in entry.items() if value}
        for name, entries in situations.items()
    }
    assert "mid macro-step" in seen["nesterov"] & seen["adam"] & seen["always averaged"]
    assert "on trial" in seen["adam by loss"] & seen["adam"] & seen["plain SGD"] & seen["bfloat16 history"]
    assert "averaging" in seen["always averaged"] & seen["moving average alone"] & seen["averaged at times"]
    assert any("confirmed" in keys for keys in seen.values())
    assert any("reverted" in keys for keys in seen.values())
    assert any("paused" in keys for keys in seen.values())


LOSSES = {
    "accelerator": "nesterov",
    "history": "nesterov",
    "rows": "nesterov",
    "progress": "nesterov",
    "disturbed": "averaged at times",
    "averaging": "averaged at times",
    "accepted": "parameters only",
    "pause": "parameters only",
    "direction_pause": "adam",
}
"""Parts of the state, and a run in which each matters."""


@pytest.mark.parametrize("lost", LOSSES)
def test_every_part_of_the_state_matters(lost):
    """The other half of the test above: what a checkpoint would leave out changes how the run goes on."""
    name = LOSSES[lost]
    _, blank, settings = start(name)
    fresh = aadl.accelerator_of(aadl.accelerate(blank, **settings)).state_dict()
    for step in range(8, 44):
        ends = []
        for complete in (True, False):
            model, optimizer, settings = start(name)
            aadl.accelerate(optimizer, **settings)
            go_on(model, optimizer, 1, step)
            state = copy.deepcopy(optimizer.state_dict())
            if not complete and lost == "accelerator":
                del state["aadl"]
            elif not complete and lost == "rows":
                state["aadl"]["rows"] = copy.deepcopy(fresh["rows"])
            elif not complete:
                state["aadl"]["values"] = json.dumps(values_of(state["aadl"]) | {lost: values_of(fresh)[lost]})
            optimizer.load_state_dict(state)
            deviations = []

            def note(_, optimizer=optimizer, deviations=deviations):
                deviations.append(aadl.accelerator_of(optimizer).statistics["relative_standard_deviation"])

            go_on(model, optimizer, step + 1, STEPS, note)
            # `disturbed` only says which updates follow one another
            ends.append(deviations if lost == "disturbed" else snapshot(model, optimizer))
        if not identical(*ends):
            return
    raise AssertionError(f"{name} went on without {lost} as it did with it, wherever it was interrupted")


def accelerated(settings=EAGER, steps=12):
    model = network()
    optimizer = adam(model, **settings)
    train(model, optimizer, steps)
    return model, optimizer


def test_the_accelerator_alone_saves_and_loads():
    model, optimizer = accelerated()
    accelerator = aadl.accelerator_of(optimizer)
    state = copy.deepcopy(accelerator.state_dict())
    plain = snapshot(model, optimizer)
    ends = []
    for restore in (True, True, False):
        other = network()
        again = aadl.accelerate(torch.optim.Adam(other.parameters(), lr=0.02), **EAGER)
        other.load_state_dict(plain["model"])
        again.load_state_dict(copy.deepcopy(plain["optimizer"]))
        if restore:
            aadl.accelerator_of(again).load_state_dict(state)
        train(other, again, 10)
        ends.append(end_of(other, again))
    train(model, optimizer, 10)
    assert identical(ends[0], end_of(model, optimizer))
    assert identical(ends[1], ends[0])  # the state was not written to
    assert not identical(ends[2], ends[0])


def thaw(model, optimizer):
    model[0].requires_grad_(True)


def freeze(model, optimizer):
    model[2].requires_grad_(False)


def grow(model, optimizer):
    optimizer.add_param_group({"params": [model[0].bias]})


@pytest.mark.parametrize("saved_at", [10, 11, 12, 13])
@pytest.mark.parametrize("change", [thaw, freeze, grow])
def test_parameters_that_come_or_go_just_before_a_save(change, saved_at):
    """The history is still that of the parameters before."""

    def start():
        model = network()
        if change is thaw:
            model[0].requires_grad_(False)
        parameters = [p for p in model.parameters() if change is not grow or p is not model[0].bias]
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
        return model, aadl.accelerate(optimizer, **EAGER | {"store_each_nth": 3, "frequency": 3})

    model, optimizer = start()
    train(model, optimizer, saved_at)
    change(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 20)
    other, again = start()
    change(other, again)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(other, again, 20)
    assert identical(end_of(other, again), end_of(model, optimizer))
    assert aadl.accelerator_of(again).statistics["resets"] == {"parameters_changed": 1}


def test_a_history_of_parameters_that_have_left_is_not_saved():
    _, optimizer = accelerated()
    assert optimizer.state_dict()["aadl"]["rows"] != {}
    del optimizer.state[optimizer.param_groups[0]["params"].pop()]
    state = copy.deepcopy(optimizer.state_dict())
    assert state["aadl"]["rows"] == {}
    other = network()
    again = aadl.accelerate(torch.optim.Adam([*other.parameters()][:-1], lr=0.02), **EAGER)
    again.load_state_dict(state)
    train(other, again, 20)
    assert aadl.accelerator_of(again).statistics["accepted"] > 0


def test_a_saved_state_is_no_view_of_the_counters():
    _, optimizer = accelerated()
    accelerator = aadl.accelerator_of(optimizer)
    state = accelerator.state_dict()
    kept = state["values"]
    for _ in range(2):
        aadl.reset_history(optimizer)
        count(accelerator.statistics["rejected"], Cause.LOSS)
        assert accelerator.state_dict()["values"] != kept
        accelerator.load_state_dict(state)
    assert state["values"] == accelerator.state_dict()["values"] == kept
    assert accelerator.statistics is accelerator.statistics is not accelerator.state_dict()


def test_a_plain_checkpoint_resets_the_history():
    model, optimizer = accelerated()
    accelerator = aadl.accelerator_of(optimizer)
    plain_model = network()
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.02)
    train(plain_model, plain, 5)
    model.load_state_dict(plain_model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert "0 columns held, 0 of 0 accepted" in repr(accelerator)
    train(model, optimizer, 20)
    again = aadl.accelerate(plain, **EAGER)
    train(plain_model, again, 20)
    assert identical(end_of(model, optimizer), end_of(plain_model, again))
    assert accelerator.statistics["accepted"] > 0


def test_an_accelerated_checkpoint_loads_into_a_plain_optimizer():
    model, optimizer = accelerated()
    plain_model = network()
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.02)
    plain_model.load_state_dict(model.state_dict())
    plain.load_state_dict(optimizer.state_dict())
    assert identical(snapshot(plain_model, plain), snapshot(model, optimizer))
    assert "aadl" not in plain.state_dict()


def with_values(state, **changes):
    return state | {"values": json.dumps(values_of(state) | changes)}


def with_map(state, **changes):
    return with_values(state, map=values_of(state)["map"] | changes)


def without_value(state, name):
    return state | {"values": json.dumps({key: value for key, value in values_of(state).items() if key != name})}


def with_rows(state, change):
    return state | {"rows": change(dict(state["rows"]))}


MISMATCHES = {
    "no dict": (lambda state: [1], "got a list"),
    "empty": (lambda state: {}, "got version None with keys []"),
    "another version": (lambda state: state | {"version": 0}, f"have version {VERSION}, got version 0 with keys"),
    "a later version": (lambda state: state | {"version": VERSION + 1}, f"got version {VERSION + 1} with keys"),
    "something missing": (
        lambda state: {k: v for k, v in state.items() if k != "rows"},
        f"got version {VERSION} with keys",
    ),
    "no gaps": (lambda state: without_value(state, "outside"), "is damaged: KeyError('outside')"),
    "odd rates": (lambda state: with_values(state, rates={"odd": 1}), "is damaged"),
    "depth": (lambda state: with_map(state, history_depth=9), "delta_mapped has shape (4, 6, 3), not (9, 6, 3)"),
    "an odd depth": (lambda state: with_map(state, history_depth="4"), "is damaged"),
    "macro-step": (lambda state: with_map(state, store_each_nth=3), "store_each_nth=3"),
    "coupling": (lambda state: with_map(state, state_coupling="params"), "state_coupling='params'"),
    "dtype": (lambda state: with_map(state, history_dtype="torch.float64"), "history_dtype="),
    "no json": (lambda state: state | {"values": state["values"][:-1]}, "is damaged"),
    "no text": (lambda state: state | {"values": None}, "is damaged"),
    "no pause": (lambda state: without_value(state, "pause"), "is damaged: KeyError('pause')"),
    "no progress": (lambda state: without_value(state, "progress"), "is damaged: KeyError('progress')"),
    "an odd pause": (lambda state: with_values(state, pause={"length": 1, "odd": 2}), "is damaged"),
    "odd columns": (
        lambda state: with_values(state, history=values_of(state)["history"] | {"columns": [1]}),
        "is damaged",
    ),
    "shapes": (
        lambda state: with_rows(state, lambda rows: rows | {"parameters.0.mapped": torch.zeros(7, 3)}),
        "parameters of other shapes: parameters.0.mapped has shape (7, 3), not (6, 3)",
    ),
    "a row missing": (
        lambda state: with_rows(state, lambda rows: {k: v for k, v in rows.items() if k != "momentum.1.start"}),
        "it has 39 tensors and this accelerator 40, 'momentum.1.start' only one of them",
    ),
    "a row too many": (
        lambda state: with_rows(state, lambda rows: rows | {"parameters.4.mapped": torch.zeros(1)}),
        "it has 41 tensors and this accelerator 40, 'parameters.4.mapped' only one of them",
    ),
}


@pytest.mark.parametrize("way", ["optimizer", "accelerator"])
@pytest.mark.parametrize(("change", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_a_mismatched_checkpoint_is_refused_and_changes_nothing(change, message, way):
    settings = EAGER | {"store_each_nth": 2, "frequency": 4}
    model, optimizer = accelerated(settings, 13)  # in the middle of a macro-step
    accelerator = aadl.accelerator_of(optimizer)
    _, donor = accelerated(settings, 20)
    state = copy.deepcopy(donor.state_dict())
    state["aadl"] = change(state["aadl"])
    before = end_of(model, optimizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        if way == "optimizer":
            optimizer.load_state_dict(state)
        else:
            accelerator.load_state_dict(state["aadl"])
    assert identical(end_of(model, optimizer), before)
    reference_model, reference = accelerated(settings, 31)
    train(model, optimizer, 18)
    assert identical(end_of(model, optimizer), end_of(reference_model, reference))


def test_a_checkpoint_of_another_model_is_refused_by_torch_and_changes_nothing():
    model, optimizer = accelerated()
    before = end_of(model, optimizer)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict() | {"aadl": None})
    assert identical(end_of(model, optimizer), before)


def test_settings_that_do_not_define_the_pairs_may_change_on_resume():
    _, optimizer = accelerated()
    state = copy.deepcopy(optimizer.state_dict())
    _, again = accelerated(EAGER | {"frequency": 3, "relaxation": 0.5, "safeguard": False, "reg_acc": 0.0})
    again.load_state_dict(state)
    held = aadl.accelerator_of(again).state_dict()
    assert identical(held, state["aadl"])
    _, fresh = accelerated(steps=0)
    assert not identical(aadl.accelerator_of(fresh).state_dict(), held)


def test_a_state_of_other_weights_gives_no_false_pair():
    """The history stays, but the macro-step after it starts where the parameters are, not where the saved run was."""
    _, optimizer = accelerated(EAGER | {"frequency": 100})
    state = copy.deepcopy(optimizer.state_dict())
    other = network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    again = aadl.accelerate(torch.optim.Adam(other.parameters(), lr=0.02), **EAGER | {"frequency": 100})
    again.load_state_dict(state)
    start_values = flat(other)
    train(other, again, 1)
    end_values = flat(other)
    assert torch.equal(aadl.accelerator_of(again).history.blocks[0].residual, end_values - start_values)
