"""Runs a function on several processes joined by gloo; a module of its own so that the processes can import it.

The processes are forked from a server that has imported torch once: an import takes each of them seconds otherwise.
"""

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PRELOADED = ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "aadl", "experiments.runs.execute"]


def spawn_ranks(folder: Path, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls function(rank, world_size, *args) on each rank and returns what they return (pickled), by rank.

    An exception on a rank is raised here; a collective that waits for more than five minutes is one. `function` must be
    defined at the top of its module, and `folder` be empty.
    """
    folder.mkdir()
    multiprocessing.set_forkserver_preload(PRELOADED)
    # The server's environment is that of the test that started it.
    arguments = (world_size, folder, dict(os.environ), function, args)
    torch.multiprocessing.start_processes(_run_rank, arguments, nprocs=world_size, start_method="forkserver")
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    folder: Path,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    result = function(rank, world_size, *args)
    (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    # Wrappers of models own threads. Where one outlives its process group, torch aborts at exit now and then
    # ("terminate called without an active exception"), so the interpreter is left without its farewell.
    gc.collect()
    dist.destroy_process_group()
    os._exit(0)
