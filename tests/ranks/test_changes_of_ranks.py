"""Somebody else changes the parameters of some ranks, or of all: the ranks agree about it."""

import copy
import warnings

import parallel_runs
import torch
from small_runs import identical

import aadl

RANKS = {"wait_iterations": 1, "history_depth": 4, "store_each_nth": 5, "frequency": 10, "safeguard": "residual"}


def zero_redundancy(parameters):
    with warnings.catch_warnings():  # torch.jit, which the package compiles with, is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.SGD, lr=0.02, momentum=0.5)


LAYOUTS = {
    "replicas": (parallel_runs.replica, parallel_runs.gentle_momentum, {}),
    "shared history": (parallel_runs.replica, parallel_runs.gentle_momentum, {"shard_history": True}),
    "partitioned": (parallel_runs.replica, zero_redundancy, {}),
    "sharded": (parallel_runs.sharded, parallel_runs.gentle_momentum, {}),
}


def swap_on_rank_0(rank):
    """Evaluates other weights, and puts those of the training back."""

    def change(step, model, optimizer):
        if rank == 0 and step in (12, 23, 34):
            own = copy.deepcopy(model.state_dict())
            model.load_state_dict({name: 0 * value for name, value in own.items()})
            model.load_state_dict(own)

    return change


def load_while_pending(rank):
    """Once, two steps after a candidate was accepted.

    Notes how far the weights are from there three steps later, and the columns after the next acceleration.
    """

    def change(step, model, optimizer):
        accelerator = aadl.accelerator_of(optimizer)
        if change.at == 0 and accelerator.decisions.accepted and accelerator.steps_in_macro_step == 2:
            model.load_state_dict({name: 20 * value for name, value in model.state_dict().items()})
            change.at, change.there = step, parallel_runs.values_of(model)
        if change.at and step == change.at + 3:
            gap = parallel_runs.values_of(model) - change.there
            change.distance = float(gap.norm() / change.there.norm())
        if change.at and change.columns is None and step % RANKS["frequency"] == 0:
            change.columns = len(accelerator.history.columns)

    change.at, change.distance, change.columns = 0, float("nan"), None
    return change


def clamp_everywhere(rank):
    def change(step, model, optimizer):
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.6, 0.6)

    return change


RANK_CHANGES = {"swap": swap_on_rank_0, "load": load_while_pending, "clamp": clamp_everywhere}


def change_on_ranks(rank, size):
    results = {}
    for name, (wrap, make, more) in LAYOUTS.items():
        for kind, what in RANK_CHANGES.items():
            change = what(rank)
            settings = RANKS | parallel_runs.CALM | {"average": False} | more
            result = parallel_runs.run(
                rank, size, settings, wrap=wrap, make=make, loss=parallel_runs.part_of_batch, steps=100, after=change
            )
            noted = {key: getattr(change, key, None) for key in ("distance", "columns")}
            results[name, kind] = result | noted
    return results


def test_ranks_agree_about_what_some_of_them_saw(spawn_ranks):
    outcomes = spawn_ranks(change_on_ranks, 2)
    for (name, kind), ours in outcomes[0].items():
        both = [outcome[name, kind] for outcome in outcomes]
        assert parallel_runs.agree(both), (name, kind)
        assert identical(both[0]["statistics"], both[1]["statistics"]), (name, kind)
        counts = ours["statistics"]
        assert counts["macro_steps"] == 20 and counts["accepted"] > 0 and counts["resets"] == {}, (name, kind)
        assert counts["moved"] >= 1 - (kind == "swap") and counts["reverted"] == 0, (name, kind)
        whole = name in ("replicas", "shared history")  # what one rank alone saw was put back
        assert kind != "swap" or counts["moved"] == (0 if whole else 3), name
        assert kind != "load" or ours["distance"] < 0.5, name  # taken back, it would be 0.95
        assert kind != "load" or ours["columns"] == 0, name  # it leads far away


def far_change_and_touch(rank, size):
    """A loss of bounded slopes, whose updates do not show a far change; the weights are touched once more after it."""
    torch.manual_seed(0)
    slopes, far = torch.linspace(0.2, 3, 20), 200 * torch.randn(20)
    weights = torch.nn.Parameter(2 * torch.randn(20))
    optimizer = torch.optim.SGD([weights], lr=0.02)
    aadl.accelerate(optimizer, **RANKS | {"average": False})
    for step in range(40):
        with torch.no_grad():
            if step == 25:
                weights.add_(far)
            if step == 28:
                weights.mul_(0.9999)
        optimizer.zero_grad()
        (1 + (slopes * weights) ** 2).sqrt().sum().backward()
        optimizer.step()
    return [column.macro_step for column in aadl.accelerator_of(optimizer).history.columns]


def test_a_second_change_does_not_hide_a_far_one(spawn_ranks):
    first, second = spawn_ranks(far_change_and_touch, 2)
    assert first == second and min(first) > 6
