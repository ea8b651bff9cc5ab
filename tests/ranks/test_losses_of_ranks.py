"""Losses after a candidate that not every rank sees: all ranks take it back together, or none does."""

import copy
import math

import parallel_runs
import torch
from small_runs import identical, network, squared_error, statistics
from test_changes_of_ranks import LAYOUTS, RANKS
from torch.distributed.fsdp import fully_shard

import aadl

SETTINGS = RANKS | parallel_runs.CALM | {"average": False}
"""Macro-steps of five steps."""
AMOUNTS = {"nan on one": (0.0, math.nan), "fallen on the whole": (10.0, -30.0), "risen on the whole": (30.0, -10.0)}
"""What the losses of either rank gain in the macro-step after the first candidate; gradients stay as they are."""


class Seen:
    """Adds an amount to the loss in that macro-step, and notes what it ends with."""

    def __init__(self, amount):
        self.amount, self.since, self.plain, self.end = amount, None, None, {}

    def loss(self, model, rank, size):
        loss = parallel_runs.part_of_batch(model, rank, size)
        return loss if self.since is None else loss + self.amount

    def after(self, step, model, optimizer):
        accelerator = aadl.accelerator_of(optimizer)
        if self.since is None and accelerator.decisions.accepted:
            self.since, self.plain = step, accelerator.history.blocks[0].mapped.clone()
        elif self.since is not None and step == self.since + 5:
            self.end = {
                "statistics": copy.deepcopy(accelerator.statistics),
                "is plain": torch.equal(accelerator.history.blocks[0].start, self.plain),
                "weights": parallel_runs.values_of(model),
            }


def ends(rank, size, wrap, make, amounts, more):
    seen = Seen(amounts[rank])
    settings = SETTINGS | more
    parallel_runs.run(rank, size, settings, wrap=wrap, make=make, loss=seen.loss, after=seen.after, steps=80)
    return seen.end


def with_amounts(rank, size):
    return {
        (name, kind): ends(rank, size, wrap, make, amounts, more)
        for name, (wrap, make, more) in LAYOUTS.items()
        for kind, amounts in AMOUNTS.items()
    }


def test_ranks_agree_about_losses_that_some_of_them_see(spawn_ranks):
    first, second = spawn_ranks(with_amounts, 2)
    for (name, kind), ours in first.items():
        theirs, returns = second[name, kind], kind != "fallen on the whole"
        assert torch.equal(ours["weights"], theirs["weights"]), (name, kind)
        assert identical(ours["statistics"], theirs["statistics"]), (name, kind)
        counts = ours["statistics"]
        assert counts["accepted"] == 1 and counts["reverted"] == returns, (name, kind)
        assert counts["resets"] == ({"non_finite": 1} if kind == "nan on one" else {}), (name, kind)
        assert ours["is plain"] == theirs["is plain"] == returns, (name, kind)


def on_ranks_of_their_own(rank, size):
    amounts, more = (0.0, math.nan), {"local_sgd": True}
    return ends(rank, size, parallel_runs.alone, parallel_runs.gentle_momentum, amounts, more)


def test_with_local_sgd_each_rank_sees_its_own(spawn_ranks):
    first, second = spawn_ranks(on_ranks_of_their_own, 2)
    assert [end["statistics"]["reverted"] for end in (first, second)] == [0, 1]
    assert second["is plain"] and not first["is plain"]


def sharded_passes(rank, size):
    """How often a candidate was taken back, by how gradients are cleared, and which micro-batch is not finite."""
    reverted = {}
    for set_to_none, lost, count in ((True, 0, 1), (False, 0, 1), (True, 0, 2), (True, 1, 2)):
        torch.manual_seed(1)
        model = fully_shard(network())
        optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **SETTINGS)
        for _ in range(60):
            on_trial = aadl.accelerator_of(optimizer).decisions.accepted is not None
            optimizer.zero_grad(set_to_none=set_to_none)
            for part in range(count):
                (squared_error(model) / count + (math.nan if on_trial and part == lost else 0.0)).backward()
            optimizer.step()
            if statistics(optimizer)["reverted"]:
                break
        reverted[set_to_none, lost, count] = statistics(optimizer)["reverted"]
    return reverted


def test_losses_of_every_pass_of_sharded_parameters_count(spawn_ranks):
    """Their gradients are DTensors, whose local parts are written to."""
    for reverted in spawn_ranks(sharded_passes, 2):
        assert set(reverted.values()) == {1}
