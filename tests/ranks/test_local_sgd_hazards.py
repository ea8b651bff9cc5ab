"""Local SGD on three ranks: a rank that need not move when weights are averaged, and a resume right after that."""

import copy
import json

import torch
import torch.distributed as dist
from parallel_runs import outcome
from small_runs import EAGER, identical
from torch import nn

import aadl

CANDIDATES = EAGER | {"average": False, "local_sgd": True}


def one_equals_the_average(rank, size):
    """Local SGD; the weights of rank 1 are the average of 1, 2, 3 already."""
    p = nn.Parameter(torch.full((4,), rank + 1.0))
    settings = {"store_each_nth": 4, "frequency": 4, "wait_iterations": 12, "safeguard": True}
    optimizer = aadl.accelerate(torch.optim.SGD([p], lr=0.5), **CANDIDATES | settings)
    resets = []
    for number in range(1, 41):
        p.grad = p.detach().clone()
        optimizer.step()
        if number in (10, 15, 20, 25):
            average = p.detach().clone()
            dist.all_reduce(average)
            p.data.copy_(average / size)  # which leaves no mark
        resets.append(aadl.accelerator_of(optimizer).statistics["resets"].get("averaged", 0))
    return resets, aadl.accelerator_of(optimizer).statistics["macro_steps"], p.detach().clone()


def averaged_weights(rank, size, *, forget=False):
    """Local SGD averaged after every 10 steps: uninterrupted from 20 to 40, and again from the state after 20."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)

    def make():
        torch.manual_seed(0)
        model = nn.Linear(8, 1).double()
        settings = {"store_each_nth": 3, "frequency": 6, "safeguard": "residual"}
        return model, aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.05), **CANDIDATES | settings)

    def steps(model, optimizer, numbers):
        for number in numbers:
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            if number % 10 == 0:
                with torch.no_grad():
                    for p in model.parameters():
                        dist.all_reduce(p)
                        p.div_(size)

    model, optimizer = make()
    steps(model, optimizer, range(1, 21))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, range(21, 41))
    if forget:
        values = json.loads(saved[1]["aadl"]["values"])
        saved[1]["aadl"]["values"] = json.dumps(values | {"averaged": not values["averaged"]})
    again, other = make()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(again, other, range(21, 41))
    return outcome(model, optimizer), outcome(again, other)


def on_three_ranks(rank, size):
    return {
        "one equals": one_equals_the_average(rank, size),
        "averaged": averaged_weights(rank, size),
        "forgotten": averaged_weights(rank, size, forget=True),
    }


def test_three_ranks_keep_in_step(spawn_ranks):
    ranks = spawn_ranks(on_three_ranks, 3)
    assert [rank["one equals"][0][10] for rank in ranks] == [1, 0, 1]  # it alone notices nothing
    for rank in ranks:
        _, macro_steps, weights = rank["one equals"]
        assert macro_steps == 10 and weights.isfinite().all()
        uninterrupted, resumed = rank["averaged"]
        assert identical(uninterrupted, resumed)
        assert resumed["statistics"]["resets"] == {"averaged": 3} and resumed["statistics"]["accepted"] > 1
        _, without = rank["forgotten"]
        assert without["statistics"]["resets"] == {"averaged": 2}
        assert not torch.equal(without["weights"], resumed["weights"])
