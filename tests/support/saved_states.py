"""States of steps, and the checkpoints that hold them."""

import os

import torch
from digests import digest

from experiments.distributed.ranks import Ranks
from experiments.runs.checkpoint import Checkpoints


def state_at(step, size=3000):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(size, generator=generator), "steps": torch.tensor(step)},
        "optimizer": {"state": {0: {"momentum": torch.randn(size, generator=generator)}}, "lr": 0.1 / (step + 1)},
        "history": {"rows": torch.randn(3, size, generator=generator), "count": step},
    }


def own_at(step, rank=0):
    return {"rng": torch.full((500,), 10 * step + rank), "rank": rank}


def save(checkpoints, step, rank=0, **options):
    checkpoints.save(step, state_at(step), own_at(step, rank), identity="run", **options)


def saved(folder, *steps, **options):
    """The checkpoints of a single process with these steps."""
    checkpoints = Checkpoints(folder, Ranks(), **options)
    for step in steps:
        save(checkpoints, step)
    return checkpoints


def assert_loads(checkpoints, step, identity="run", rank=0):
    loaded = checkpoints.load(identity=identity)
    assert loaded is not None and loaded.step == step
    assert digest(loaded.shared) == digest(state_at(step))
    assert digest(loaded.own) == digest(own_at(step, rank))
    return loaded


def names(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []
