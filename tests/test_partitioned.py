"""ZeroRedundancyOptimizer: every rank steps, and keeps the history of, some of the parameters; all decide together."""

import warnings

import pytest
import torch
from parallel_runs import (
    CALM,
    LOSS,
    RESIDUAL,
    UNSAFE,
    agree,
    counts_of,
    distance,
    gamma_distance,
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


def partitioned(parameters):
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.SGD, lr=0.05, momentum=0.9)


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
    names = [name for name in VARIANTS if name != "three tensors, another rate"]
    results = {name: train(rank, size, name) for name in names if size == 2 or "three" in name or name == "residual"}
    results["plain"] = run(rank, size, wrap=replica, make=partitioned, loss=part_of_batch)
    results["saved"] = refusals(rank, size)
    return results


def change_rate(rank, size):
    return train(rank, size, "three tensors, another rate")


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
        assert agree(ours), name
        assert all(identical(ours[0]["statistics"], other["statistics"]) for other in ours), name
        assert counts_of(ours[0]) == counts_of(expected), name
        assert ours[0]["statistics"]["accepted"] > 0, name
        assert gamma_distance(ours[0], expected) < 1e-8, name
        assert distance(ours[0], expected) < 1e-10, name
        assert sum(one["bytes"] for one in ours) == expected["bytes"], name
        assert min(one["bytes"] for one in ours) < expected["bytes"] / size, name
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


def test_a_rank_without_parameters_follows_the_learning_rate(spawn_ranks):
    name = "three tensors, another rate"
    expected = reference(name)
    assert expected["statistics"]["resets"] == {"learning_rate": 1}
    ours = spawn_ranks(change_rate, 4)
    assert agree(ours)
    assert all(identical(ours[0]["statistics"], other["statistics"]) for other in ours)
    assert counts_of(ours[0]) == counts_of(expected)
    assert distance(ours[0], expected) < 1e-9


def test_the_loss_alone_does_not_judge_partitions():
    """On one process nothing is partitioned, and the same settings are fine."""
    aadl.accelerate(momentum(network().parameters()), **LOSS)
