"""What befalls some ranks and not others, or all of them at once, must neither part them nor leave one waiting.

Models are plain modules whose gradients are averaged by hand.
"""

import copy
import itertools
import warnings
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_runs import outcome
from small_runs import EAGER, identical, missing_for_compilation, train
from torch import nn

import aadl
from aadl import compilation
from aadl.history import History

with warnings.catch_warnings():  # torch.jit, which the package compiles with, is deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

CANDIDATES = EAGER | {"average": False, "safeguard": False}
"""One at every second step, taken."""


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def data(*shape, seed=7):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def averaged_step(model, optimizer, x, y):
    """As DistributedDataParallel."""
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    optimizer.step()


def training(model, optimizer, steps, after=lambda step: None):
    rank, first = dist.get_rank(), next(model.parameters())
    dtype = first.dtype
    x, y = data(32, first.shape[1]).to(dtype), data(32, len(list(model.parameters())[-1]), seed=8).to(dtype)
    for step in range(1, steps + 1):
        averaged_step(model, optimizer, x[rank::2], y[rank::2])
        after(step)
    return outcome(model, optimizer)


def partitioned(change):
    """change(model, step) is called after every step, on all ranks."""
    model = three_layers()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.02)
    aadl.accelerate(optimizer, **CANDIDATES | {"store_each_nth": 2, "frequency": 4})
    return training(model, optimizer, 20, lambda step: change(model, step))


def freeze_for_a_while(model, step):
    model[0].bias.requires_grad_(not 5 <= step < 9)


def apart(rank, written_on, with_closure, store_each_nth):
    """The weights of some ranks are changed whenever a candidate waits for its judgment, and stay different.

    Returns what must be equal on all ranks. They wait for each other for a minute only.
    """
    model = three_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    group = dist.new_group(timeout=timedelta(seconds=60))
    settings = EAGER | {"average": False, "store_each_nth": store_each_nth, "frequency": 3 * store_each_nth}
    aadl.accelerate(optimizer, **settings, process_group=group)
    decisions = aadl.accelerator_of(optimizer).decisions
    x, y = data(32, 8)[rank::2].float(), data(32, 4, seed=8)[rank::2].float()

    def write(step):
        if decisions.accepted is not None and rank in written_on:
            with torch.no_grad():
                model[0].weight.mul_(1.01)

    def loss(model):
        return (model(x) - y).square().mean()

    train(model, optimizer, 90, with_closure=with_closure, loss=loss, after=write)
    names = ("steps", "macro_steps", "attempts", "accepted", "reverted", "rejected", "suspended", "closure_evaluations")
    return {name: decisions.statistics[name] for name in names} | {"reach": decisions.reach}


class Scaled(nn.Module):
    """A scalar in float32 beside parameters in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(4, 1).double(), nn.Parameter(torch.tensor([1.0]))

    def forward(self, x):
        return self.linear(x) * self.scale.double()


def one_element():
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    aadl.accelerate(optimizer, **CANDIDATES | {"shard_history": True})
    rank = dist.get_rank()
    x = data(16, 4)[rank::2]
    for _ in range(12):
        averaged_step(model, optimizer, x, x.sum(1, keepdim=True))
    return outcome(model, optimizer) | {"bytes": aadl.accelerator_of(optimizer).history_bytes}


def without_compiler_on(missing, rank, *, unaware=False):
    """Ranks in `missing` cannot compile; `unaware`: nobody tells the others."""
    compilation.failures[:] = ["no compiler on this host"] if rank in missing else []
    patch = mock.patch.object(History, "fused", True) if unaware else nullcontext()
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **CANDIDATES, fused=True)
    with patch:
        result = training(model, optimizer, 30)
    compiled = aadl.accelerator_of(optimizer).uses_compiled_kernels
    compilation.failures.clear()
    return result | {"compiled": compiled}


def saved_and_loaded(rank, size, folder):
    """A history in two windows is saved; rank 0 goes on alone with it, and without it."""
    x, y = data(16, 8), data(16, 4, seed=8)

    def make(group=None):
        model = three_layers().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
        aadl.accelerate(
            optimizer, **CANDIDATES | {"reg_acc": 1e-5}, shard_history=True, process_group=group, state_coupling="full"
        )
        return model, optimizer

    model, optimizer = make()
    for _ in range(7):
        averaged_step(model, optimizer, x, y)
    dcp.save({"aadl": aadl.accelerator_of(optimizer)}, checkpoint_id=folder)
    there, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(7):
        averaged_step(model, optimizer, x, y)
    results = [outcome(model, optimizer)]
    groups = [dist.new_group([number]) for number in range(size)]
    for load in (True, False) if rank == 0 else ():
        model, optimizer = make(groups[0])
        model.load_state_dict(there)
        optimizer.load_state_dict({name: value for name, value in state.items() if name != "aadl"})
        if load:
            dcp.load({"aadl": aadl.accelerator_of(optimizer)}, checkpoint_id=folder, process_group=groups[0])
        for _ in range(7):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        results.append(outcome(model, optimizer))
    dist.barrier()
    return results


def on_two_ranks(rank, size, folder):
    return {
        "nothing": partitioned(lambda model, step: None),
        "unfreeze": partitioned(freeze_for_a_while),
        "one element": one_element(),
        "compiler on rank 0": without_compiler_on([1], rank),
        "compiler on none": without_compiler_on([0, 1], rank),
        "unaware": without_compiler_on([1], rank, unaware=True),
        "checkpoint": saved_and_loaded(rank, size, folder),
        "apart": {
            (written_on, *case): apart(rank, written_on, *case)
            for written_on in ((), (0,), (0, 1))
            for case in itertools.product((False, True), (1, 2))
        },
    }


def test_two_ranks_stay_together(spawn_ranks, tmp_path):
    first, second = spawn_ranks(on_two_ranks, 2, tmp_path / "checkpoint")
    whole, loaded, unloaded = first.pop("checkpoint")
    assert identical(whole, second.pop("checkpoint")[0])
    of_first, of_second = first.pop("apart"), second.pop("apart")
    for case, counts in of_first.items():
        assert counts == of_second[case], case
        assert counts["accepted"] > 2, case
    unaware = first.pop("unaware"), second.pop("unaware")
    for name, outcome_there in first.items():
        assert torch.equal(outcome_there["weights"], second[name]["weights"]), name
        counts = outcome_there["statistics"]
        assert counts["accepted"] == second[name]["statistics"]["accepted"] > 2, name
        assert counts["macro_steps"] == second[name]["statistics"]["macro_steps"], name

    for outcomes in (first, second):
        assert outcomes["unfreeze"]["statistics"]["resets"] == {"parameters_changed": 2}
        assert outcomes["nothing"]["statistics"]["resets"] == {}

    assert not first["compiler on none"]["compiled"] and not second["compiler on rank 0"]["compiled"]
    if not missing_for_compilation():
        assert first["compiler on rank 0"]["compiled"]
        assert not torch.equal(unaware[0]["weights"], unaware[1]["weights"])

    assert torch.allclose(loaded["weights"], whole["weights"], rtol=1e-9)
    assert loaded["statistics"]["accepted"] == whole["statistics"]["accepted"] == 6
    assert not torch.allclose(unloaded["weights"], whole["weights"], rtol=1e-3)
