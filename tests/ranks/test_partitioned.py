"""ZeroRedundancyOptimizer: every rank steps, and keeps the history of, some of the parameters; all decide together."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from parallel_runs import (
    CALM,
    RESIDUAL,
    UNSAFE,
    check_same_run,
    distance,
    go_on,
    momentum,
    network,
    part_of_batch,
    replica,
    reverting,
    run,
)
from small_runs import identical
from torch import nn

import aadl

with warnings.catch_warnings():  # torch.jit, which the package compiles with, is deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer


def three_tensors():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()


def partitioned(parameters, lr=0.05, momentum=0.9):
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.SGD, lr=lr, momentum=momentum)


def lower_rate(step, model, optimizer):
    """Residuals at a fifth of the rate do not compare with the others: the history starts again."""
    if step == 20:
        for group in optimizer.param_groups:
            group["lr"] /= 5


VARIANTS = {  # settings, further arguments of run
    "residual": (RESIDUAL, {}),
    "unsafe": (UNSAFE, {"steps": 40}),
    "closure": (RESIDUAL | {"safeguard": True}, {"closure": True}),
    "coefficients only": (RESIDUAL | {"state_coupling": "combine"}, {}),
    "reverts": (RESIDUAL, {"context": reverting}),
    "three tensors": (RESIDUAL, {"build": three_tensors}),
    "three tensors, another rate": (RESIDUAL, {"build": three_tensors, "after": lower_rate}),
}


def train(rank, size, name):
    settings, more = VARIANTS[name]
    return run(rank, size, CALM | settings, wrap=replica, make=partitioned, loss=part_of_batch, **more)


def refusals(rank, size):
    model = replica(network(), rank, size)
    for number, wrong in enumerate(({"safeguard": "loss"}, {"shard_history": True}, {"local_sgd": True})):
        name = ("safeguard", "shard_history", "local_sgd")[number]
        with pytest.raises(ValueError, match=f"{name} must be .* for a ZeroRedundancyOptimizer"):
            aadl.accelerate(partitioned(model.parameters()), **wrong)
    overlapping = ZeroRedundancyOptimizer(
        network().parameters(), optimizer_class=torch.optim.SGD, overlap_with_ddp=True, lr=0.1
    )
    with pytest.raises(ValueError, match="overlap_with_ddp"):
        aadl.accelerate(overlapping)
    optimizer = aadl.accelerate(partitioned(model.parameters()), **RESIDUAL)
    with pytest.raises(ValueError, match="accelerated already"):
        aadl.accelerate(optimizer)
    assert aadl.accelerator_of(optimizer) is aadl.accelerator_of(optimizer.optim)
    part_of_batch(model, rank, size).backward()
    for _ in range(6):
        optimizer.step()
    optimizer.consolidate_state_dict()
    saved = optimizer.state_dict() if rank == 0 else None
    aadl.reset_history(optimizer)
    aadl.remove_acceleration(optimizer)
    with pytest.raises(ValueError, match="not accelerated"):
        aadl.accelerator_of(optimizer)
    return saved


def train_partitioned(rank, size):
    names = [name for name in VARIANTS if size == 2 or "three" in name or name == "residual"]
    results = {name: train(rank, size, name) for name in names}
    results["plain"] = run(rank, size, wrap=replica, make=partitioned, loss=part_of_batch)
    results["saved"] = refusals(rank, size)
    return results


def reference(name):
    """One optimizer of everything; partitions are judged by the residual whether there is a closure or not."""
    settings, more = VARIANTS[name]
    judged = {"safeguard": settings["safeguard"] and "residual"}
    return run(0, 1, CALM | settings | judged, make=momentum, **more)


@pytest.mark.parametrize("size", [2, 4])
def test_partitions_decide_and_move_like_one_optimizer(spawn_ranks, size):
    outcomes = spawn_ranks(train_partitioned, size)
    assert ("unsafe" in outcomes[0]) == (size == 2)
    for name in VARIANTS.keys() & outcomes[0].keys():
        ours, expected = [outcome[name] for outcome in outcomes], reference(name)
        check_same_run(ours, expected, name, weights=1e-9)
        assert ours[0]["statistics"]["accepted"] > 0, name
        assert sum(one["bytes"] for one in ours) == expected["bytes"], name
        assert min(one["bytes"] for one in ours) < expected["bytes"] / size, name
    assert outcomes[0]["three tensors, another rate"]["statistics"]["resets"] == {"learning_rate": 1}
    assert sum(outcomes[0]["residual"]["statistics"]["rejected"].values()) > 0
    assert size == 2 or outcomes[3]["three tensors"]["bytes"] == 0  # a rank without a parameter
    assert distance(outcomes[0]["residual"], outcomes[0]["plain"]) > 1e-3  # not equal by default
    assert distance(outcomes[0]["plain"], run(0, 1, make=momentum)) < 1e-12

    saved = outcomes[0]["saved"]
    assert {*saved} == {"state", "param_groups"}
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(saved)
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())


def resumed(rank, size, folder):
    """A run, its continuations of a save within a macro-step (with the history and without), and what was said."""
    settings = CALM | RESIDUAL | {"store_each_nth": 2, "frequency": 4}

    def build():
        model = replica(network(), rank, size)
        return model, aadl.accelerate(partitioned(model.parameters(), 0.02, 0.5), **settings)

    model, optimizer = build()
    go_on(rank, size, model, optimizer, 1, 25, part_of_batch)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        optimizer.consolidate_state_dict()
        optimizer.consolidate_state_dict()
    path = folder / f"history-{rank}"
    torch.save(aadl.accelerator_of(optimizer).state_dict(), path)
    states = [{"model": model.state_dict(), "optimizer": optimizer.state_dict()} if rank == 0 else None]
    dist.broadcast_object_list(states)
    saved = copy.deepcopy(states[0])
    whole = go_on(rank, size, model, optimizer, 26, 60, part_of_batch)
    ends = {}
    for with_history in (True, False):
        model, optimizer = build()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        if with_history:
            aadl.accelerator_of(optimizer).load_state_dict(torch.load(path, weights_only=True))
        ends[with_history] = go_on(rank, size, model, optimizer, 26, 60, part_of_batch)
    return whole, ends, [str(warning.message) for warning in heard]


def test_a_resumed_run_needs_the_histories_of_all_ranks_and_says_so(spawn_ranks, tmp_path):
    for whole, ends, heard in spawn_ranks(resumed, 2, tmp_path):
        assert all("carries no history of aadl: save aadl.accelerator_of(optimizer)" in text for text in heard)
        assert heard and whole["statistics"]["accepted"] > 0
        assert torch.equal(ends[True]["weights"], whole["weights"])
        assert identical(ends[True]["statistics"], whole["statistics"])
        assert distance(ends[False], whole) > 1e-6
