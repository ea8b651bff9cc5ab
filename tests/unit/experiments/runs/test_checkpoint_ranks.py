"""Checkpoints of several ranks: one file for all, the same one on all, and errors on all."""

import errno
import os

import pytest
import torch
from digests import digest
from saved_states import assert_loads, names, own_at, save, saved, state_at
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from experiments.distributed.ranks import Ranks
from experiments.runs import checkpoint
from experiments.runs.checkpoint import CheckpointError, Checkpoints


def two_ranks(rank, world_size, folder):
    checkpoints = Checkpoints(folder, Ranks(rank, world_size))
    found = {"none": checkpoints.load() is None}
    for step in (1, 2):
        save(checkpoints, step, rank)
    found["loaded"] = outcome(checkpoints, rank)

    read = checkpoint.read
    if rank == 1:
        checkpoint.read = lambda path: unreadable(path) if "2" in path.name else read(path)
    found["one cannot read"] = outcome(checkpoints, rank)
    checkpoint.read = read

    original = checkpoint.write
    checkpoint.write = no_space if rank == 0 else unexpected  # a full disk
    found["the first fails"] = error_of(lambda: save(checkpoints, 3, rank))
    checkpoint.write = original
    found["after a failure"] = names(folder)
    found["identity"] = error_of(lambda: checkpoints.load(identity="other"))
    listed = checkpoint.names_of_checkpoints
    checkpoint.names_of_checkpoints = no_space if rank == 0 else unexpected  # which stands for any error
    found["no names"] = error_of(checkpoints.load)
    checkpoint.names_of_checkpoints = listed
    save(checkpoints, 4, rank)
    found["later"] = outcome(checkpoints, rank)
    return found


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unexpected(*_):
    raise AssertionError("rank 0 alone writes")


def unreadable(path):
    raise ValueError(f"{path.name} cannot be read (Input/output error)")


def outcome(checkpoints, rank):
    loaded = checkpoints.load(identity="run")
    assert digest(loaded.shared) == digest(state_at(loaded.step))
    assert digest(loaded.own) == digest(own_at(loaded.step, rank))
    return loaded.step, loaded.world_size_saved, loaded.rejected


def error_of(action):
    try:
        action()
    except (CheckpointError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.smoke
def test_ranks_save_load_and_fail_together(spawn_ranks, tmp_path):
    first, second = spawn_ranks(two_ranks, 2, tmp_path / "run")
    assert first == second
    assert first["none"] and first["loaded"] == (2, 2, []) and first["later"] == (4, 2, [])
    reason = "step-0000000002.pt cannot be read (Input/output error) (rank 1)"
    assert first["one cannot read"] == (1, 2, [("step-0000000002.pt", reason)])
    kind, text = first["the first fails"]
    assert kind == "CheckpointError" and "No space left on device; it needs" in text
    size = (tmp_path / "run" / "step-0000000004.pt").stat().st_size
    assert 0.8 * size < int(text.split("it needs ")[1].split()[0]) < size
    assert first["after a failure"] == ["step-0000000001.pt", "step-0000000002.pt"]
    assert first["identity"][0] == "ValueError"
    assert first["no names"] == ("CheckpointError", "[Errno 28] No space left on device")
    alone = Checkpoints(tmp_path / "run", Ranks())  # fewer ranks
    assert assert_loads(alone, 4).world_size_saved == 2


FULL = torch.arange(70, dtype=torch.float32).reshape(7, 10)


def sharded_ranks(rank, world_size, folder):
    mesh = init_device_mesh("cpu", (world_size,))
    checkpoints = Checkpoints(folder, Ranks(rank, world_size))
    found = {"own": checkpoints.load(identity="run").own}  # of fewer ranks
    state = {
        "weight": distribute_tensor(FULL, mesh, [Shard(0)]),
        "copy": distribute_tensor(FULL + 1, mesh, [Replicate()]),
        "plain": torch.ones(3),
    }
    checkpoints.save(1, state, own_at(1, rank))
    state["weight"].to_local().mul_(-1)
    checkpoints.save(2, state, own_at(2, rank))
    state["weight"].to_local().zero_()
    loaded = checkpoints.load().shared
    found["equal"] = [torch.equal(loaded["weight"], -FULL), torch.equal(loaded["copy"], FULL + 1)]
    found["own of a DTensor"] = error_of(lambda: checkpoints.save(3, {}, state))
    return found


def test_sharded_tensors_are_saved_whole(spawn_ranks, tmp_path):
    saved(tmp_path / "run", 0)
    first, second = spawn_ranks(sharded_ranks, 2, tmp_path / "run")
    assert first.pop("own")["rank"] == 0 and second.pop("own") is None
    text = "own['weight'] is a DTensor, which belongs into the shared state"
    assert first == second == {"equal": [True, True], "own of a DTensor": ("TypeError", text)}
    alone = Checkpoints(tmp_path / "run", Ranks()).load()  # without any process group
    assert alone.step == 2 and torch.equal(alone.shared["weight"], -FULL)
