"""Checkpoints of two ranks: a run goes on, on 2, 4 and 1, as if nothing had happened."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gloo
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_runs import (
    CALM,
    agree,
    distance,
    gentle_adam,
    gentle_momentum,
    go_on,
    network,
    part_of_batch,
    replica,
    sharded,
)
from small_runs import EAGER, identical
from stopped_runs import run_to_the_end
from suite_cases import run_config
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import aadl
from experiments.distributed.ranks import Ranks

SETTINGS = CALM | EAGER | {"store_each_nth": 2, "frequency": 4, "average": False, "safeguard": "residual"}
KINDS = {  # wrapper, optimizer, settings
    "momentum": (sharded, gentle_momentum, SETTINGS | {"history_depth": 3}),
    "adam": (sharded, gentle_adam, SETTINGS),
    "shared history": (replica, gentle_adam, SETTINGS | {"shard_history": True}),
}
STEPS = 62
SAVED_AT = (1, 2, 31, 32, 33, 38)
RESUMED_AT = {2: (1, 2, 31, 32, 33, 38), 1: (2, 33), 4: (33,)}
"""By number of ranks; there are two cores."""


def build(kind, rank, size):
    wrap, make, settings = KINDS[kind]
    model = wrap(network(), rank, size)
    return model, aadl.accelerate(make(model.parameters()), **settings)


def situation(optimizer):
    values = json.loads(aadl.accelerator_of(optimizer).state_dict()["values"])
    return {
        "mid macro-step": values["progress"]["in_macro_step"] > 0,
        "pending": values["accepted"] is not None,
        "no pair": not values["history"]["has_pair"],
        "accepted": values["statistics"]["accepted"],
    }


def save_all(rank, size, folder):
    """The uninterrupted runs; checkpoints lie where they were made on the way."""
    results = {}
    for kind in KINDS:
        model, optimizer = build(kind, rank, size)
        situations = {}

        def save(step, model, optimizer, kind=kind, situations=situations):
            if step in SAVED_AT:
                weights, state = get_state_dict(model, optimizer)
                whole = {"model": weights, "optimizer": state, "aadl": aadl.accelerator_of(optimizer)}
                dcp.save(whole, checkpoint_id=folder / f"{kind}-{step}")
                situations[step] = situation(optimizer)

        results[kind] = go_on(rank, size, model, optimizer, 1, STEPS, part_of_batch, after=save)
        results[kind]["situations"] = situations
    return results


def resume(kind, step, rank, size, folder, way="in place"):
    model, optimizer = build(kind, rank, size)
    weights, state = get_state_dict(model, optimizer)
    whole = {"model": weights, "optimizer": state}
    dcp.load(whole, checkpoint_id=folder / f"{kind}-{step}")
    set_state_dict(model, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"])
    accelerator = aadl.accelerator_of(optimizer)
    if way == "in place":
        dcp.load({"aadl": accelerator}, checkpoint_id=folder / f"{kind}-{step}")
    elif way == "cut":
        fresh = accelerator.state_dict()
        rows = {name: torch.empty(row.shape, dtype=row.dtype) for name, row in fresh["rows"].items()}
        state = {"aadl": fresh | {"rows": rows}}
        dcp.load(state, checkpoint_id=folder / f"{kind}-{step}")
        accelerator.load_state_dict(state["aadl"])
    return go_on(rank, size, model, optimizer, step + 1, STEPS, part_of_batch)


def resume_all(rank, size, folder):
    kinds = [kind for kind in KINDS if size > 1 or "shared" not in kind]
    results = {(kind, step): resume(kind, step, rank, size, folder) for kind in kinds for step in RESUMED_AT[size]}
    results |= {(kind, "cut"): resume(kind, 38, rank, size, folder, "cut") for kind in kinds if kind != "adam"}
    if size == 2:
        results |= {(kind, "forgotten"): resume(kind, 33, rank, size, folder, "forgotten") for kind in kinds}
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of the checkpoints, outcomes of the uninterrupted runs by rank)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, gloo.spawn_ranks(Path(folder) / "ranks", save_all, 2, folder)


def test_the_runs_were_interrupted_in_all_situations(saved):
    _, outcomes = saved
    for kind in KINDS:
        assert agree([outcome[kind] for outcome in outcomes])
        situations = outcomes[0][kind]["situations"].values()
        for name in ("mid macro-step", "pending", "no pair"):
            assert any(s[name] for s in situations), (kind, name)
        last = outcomes[0][kind]["statistics"]["accepted"]
        assert any(0 < s["accepted"] < last for s in situations), kind


@pytest.mark.parametrize("size", [2, 4, 1])
def test_a_run_goes_on_at_another_number_of_ranks(saved, spawn_ranks, size):
    folder, expected = saved
    outcomes = spawn_ranks(resume_all, size, folder)
    for (kind, step), ours in outcomes[0].items():
        assert agree([outcome[kind, step] for outcome in outcomes]), (kind, step)
        whole = expected[0][kind]
        if step == "forgotten":
            assert distance(ours, whole) > 1e-3, kind
        elif size == 2:
            assert torch.equal(ours["weights"], whole["weights"]), (kind, step)
            assert identical(ours["statistics"], whole["statistics"]), (kind, step)
        else:
            assert distance(ours, whole) < 1e-6, (kind, step)
            assert ours["statistics"]["accepted"] == whole["statistics"]["accepted"], (kind, step)


# ---- get_state_dict and set_state_dict -----------------------------------------------------------------------------


def both_again(model, optimizer, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


def optimizer_again(model, optimizer):
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))


def copies_again(model, optimizer):
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))


def flat_again(model, optimizer):
    both_again(model, optimizer, StateDictOptions(flatten_optimizer_state_dict=True))


@pytest.mark.parametrize("make", [gentle_momentum, gentle_adam])
@pytest.mark.parametrize("again", [both_again, optimizer_again, copies_again, flat_again])
def test_a_live_optimizer_goes_on_undisturbed(again, make):
    """Between two macro-steps; its counters and its history stay."""
    ends = []
    for used in (False, True):
        model = network()
        optimizer = aadl.accelerate(make(model.parameters()), **SETTINGS)

        def after(step, model, optimizer, used=used):
            if used and step % 2 == 0:
                again(model, optimizer)

        ends.append(go_on(0, 1, model, optimizer, 1, 40, after=after))
    assert torch.equal(ends[0]["weights"], ends[1]["weights"])
    assert identical(ends[0]["statistics"], ends[1]["statistics"]) and ends[0]["statistics"]["accepted"] > 0


@pytest.mark.parametrize("again", [both_again, optimizer_again, copies_again])
def test_within_a_macro_step_a_live_optimizer_loses_the_running_pair_at_most(again):
    model = network()
    optimizer = aadl.accelerate(gentle_adam(model.parameters()), **SETTINGS)
    accelerator = aadl.accelerator_of(optimizer)
    go_on(0, 1, model, optimizer, 1, 21)
    columns, counts = list(accelerator.history.columns), dict(accelerator.statistics)
    again(model, optimizer)
    assert identical(accelerator.statistics, counts)
    go_on(0, 1, model, optimizer, 22, 24)
    assert accelerator.statistics["moved"] <= 1 and accelerator.statistics["resets"] == {}
    assert columns[-1] in accelerator.history.columns and len(accelerator.history.columns) == len(columns)


def saved_by_torch():
    model = network()
    optimizer = aadl.accelerate(gentle_adam(model.parameters()), **SETTINGS)
    go_on(0, 1, model, optimizer, 1, 21)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    return model, optimizer, weights, state


def test_a_resume_without_the_history_says_so_once():
    *_, weights, state = saved_by_torch()
    model = network()
    optimizer = aadl.accelerate(gentle_adam(model.parameters()), **SETTINGS)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    with pytest.warns(UserWarning, match=r"carries no history of aadl: .* save aadl\.accelerator_of") as heard:
        go_on(0, 1, model, optimizer, 22, 40)
    assert len(heard) == 1


@pytest.mark.parametrize("first", [False, True], ids=["history last", "history first"])
def test_a_resume_with_the_history_beside_it_says_nothing_and_repeats_the_run(first):
    model, optimizer, weights, state = saved_by_torch()
    history = copy.deepcopy(aadl.accelerator_of(optimizer).state_dict())
    whole = go_on(0, 1, model, optimizer, 22, 50)
    model = network()
    optimizer = aadl.accelerate(gentle_adam(model.parameters()), **SETTINGS)
    if first:
        aadl.accelerator_of(optimizer).load_state_dict(history)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    if not first:
        aadl.accelerator_of(optimizer).load_state_dict(history)
    resumed = go_on(0, 1, model, optimizer, 22, 50)
    assert torch.equal(resumed["weights"], whole["weights"])
    assert identical(resumed["statistics"], whole["statistics"]) and whole["statistics"]["accepted"] > 0


def whole_tensors_of_other_sizes(rank, size):
    """What is said of whole tensors that are no part of anything here, and whether the state stayed as it was."""
    _, optimizer = build("shared history", rank, size)
    accelerator = aadl.accelerator_of(optimizer)
    state = accelerator.state_dict()
    whole = {name: torch.ones(row.shape, dtype=row.dtype) for name, row in state["rows"].items()}
    name, row = next(iter(state["rows"].items()))
    said = []
    for wrong in (row.to_local().clone(), torch.ones(*row.shape[:-1], row.shape[-1] + 1)):
        with pytest.raises(ValueError, match=f"other shapes: {name} has shape") as error:
            accelerator.load_state_dict(state | {"rows": whole | {name: wrong}})
        said.append(str(error.value).partition("has shape ")[2])
    return said, any(bool(row.to_local().any()) for row in accelerator.state_dict()["rows"].values())


def test_whole_tensors_of_other_sizes_are_refused(spawn_ranks):
    outcomes = spawn_ranks(whole_tensors_of_other_sizes, 2)
    assert outcomes[0] == (["(4, 42), not (4, 83)", "(4, 84), not (4, 83)"], False)
    assert outcomes[1] == (["(4, 41), not (4, 83)", "(4, 84), not (4, 83)"], False)


# ---- of the suite ----------------------------------------------------------------------------------------------------

SHARED_HISTORY = {
    "shard_history": True,
    "store_each_nth": 1,
    "frequency": 2,
    "wait_iterations": 1,
    "history_depth": 3,
    "safeguard": False,
    "average": False,
    "reg_acc": 1e-5,
}


def with_shared_history():
    config = run_config("sgd_aadl", epochs=6)
    return replace(config, variant=config.variant.model_copy(update={"acceleration": SHARED_HISTORY}))


def stop_and_resume(rank, size, results):
    """A run without a stop, one that was stopped and goes on, and one that goes on without the saved vectors."""
    ranks, config = Ranks(rank, size, rank), with_shared_history()
    whole = run_to_the_end(config, ranks, results / "whole")
    run_to_the_end(config, ranks, results / "resumed", stop=9)
    dist.barrier()
    if rank == 0:
        for name in ("alone", "forgotten"):
            shutil.copytree(results / "resumed", results / name)
    dist.barrier()
    resumed = run_to_the_end(config, ranks, results / "resumed")
    with mock.patch("aadl.state.load_rows"):
        forgotten = run_to_the_end(config, ranks, results / "forgotten")
    return whole, resumed, forgotten


def test_a_run_of_the_suite_goes_on_with_a_shared_history(spawn_ranks, tmp_path):
    outcomes = spawn_ranks(stop_and_resume, 2, tmp_path)
    for whole, resumed, forgotten in outcomes:
        assert torch.equal(whole.weights, resumed.weights) and torch.equal(whole.weights, outcomes[0][0].weights)
        assert identical(whole.statistics, resumed.statistics) and whole.statistics["accepted"] > 8
        assert (whole.weights - forgotten.weights).abs().max() > 1e-2
    alone, (on_two, *_) = run_to_the_end(with_shared_history(), Ranks(), tmp_path / "alone"), outcomes[0]
    torch.testing.assert_close(alone.weights, on_two.weights, rtol=0, atol=1e-5)
    assert alone.statistics["accepted"] == on_two.statistics["accepted"]
