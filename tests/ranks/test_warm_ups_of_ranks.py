"""A learning rate that rises on one rank first: all ranks leave the macro-step out, and none waits for another."""

import copy

import torch
from small_runs import network, squared_error, statistics
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import aadl


def risen_apart(rank, size):
    """Counters of replicas and of shards, where one rank raises its rate a macro-step before the other."""
    counts = {}
    for wrap in (DistributedDataParallel, fully_shard):
        torch.manual_seed(0)
        model = wrap(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        aadl.accelerate(optimizer, wait_iterations=0, safeguard="residual")
        for step in range(160):
            optimizer.param_groups[0]["lr"] = 0.01 if step < 60 - 10 * rank else 0.0106
            optimizer.zero_grad()
            squared_error(model).backward()
            optimizer.step()
        counts[wrap.__name__] = {name: copy.deepcopy(statistics(optimizer)[name]) for name in ("attempts", "accepted")}
    return counts


def test_ranks_leave_a_warm_up_of_any_of_them_out(spawn_ranks):
    first, second = spawn_ranks(risen_apart, 2)
    assert first == second and all(count["accepted"] > 0 for count in first.values())
