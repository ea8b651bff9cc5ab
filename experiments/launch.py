"""Who this process is among its ranks: a single process, or one of those that torchrun starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

# What torchrun sets in every process. A lone RANK or WORLD_SIZE is a half-made environment, which is an error.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_address: str = "localhost"
    master_port: int = 0
    launcher: str = "single process"


def ranks_from_environment(env: Mapping[str, str]) -> Ranks:
    """Reads the ranks from the variables that the launcher set.

    Args:
        env: environment variables.

    Raises:
        ValueError: a variable is missing, is no integer, or contradicts another one.
    """
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return Ranks()
    missing = [name for name in TORCHRUN_VARIABLES if name not in env]
    if missing:
        raise ValueError(
            f"environment variable {', '.join(missing)} is missing although "
            f"{' and '.join(name for name in ('RANK', 'WORLD_SIZE') if name in env)} is set; torchrun sets all of "
            f"{', '.join(TORCHRUN_VARIABLES)}: start with torchrun, or unset them for a single process"
        )
    rank = _integer(env, "RANK", 0)
    world_size = _integer(env, "WORLD_SIZE", 1)
    local_rank = _integer(env, "LOCAL_RANK", 0)
    master_port = _integer(env, "MASTER_PORT", 1)
    if rank >= world_size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={world_size}")
    if local_rank > rank:
        raise ValueError(f"LOCAL_RANK={local_rank} must not exceed RANK={rank}")
    if master_port > 65535:
        raise ValueError(f"MASTER_PORT must be an integer in [1, 65535], got {master_port}")
    if not env["MASTER_ADDR"]:
        raise ValueError("MASTER_ADDR must name the host of rank 0, got an empty text")
    return Ranks(rank, world_size, local_rank, env["MASTER_ADDR"], master_port, "torchrun")


def _integer(env: Mapping[str, str], name: str, minimum: int) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {env[name]!r}")
    return value


def device_of(ranks: Ranks) -> torch.device:
    """The device of this process: the GPU of its local rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def start_process_group(ranks: Ranks) -> None:
    """Joins the ranks, by nccl on GPUs and by gloo on CPUs; nothing to do for a single rank."""
    if ranks.world_size == 1:
        return
    device = device_of(ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{ranks.master_address}:{ranks.master_port}" if ranks.launcher != "torchrun" else "env://",
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def stop_process_group(ranks: Ranks) -> None:
    """Leaves the process group, if there is one."""
    if ranks.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
