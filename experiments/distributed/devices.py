"""The device of each rank: which one it is, whether the job was promised another one, and who else uses it."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from experiments.distributed.host import machine, namespace
from experiments.distributed.mpi import mpi_is_in_use
from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import host_of, spans
from experiments.distributed.together import gather
from experiments.settings.launch_settings import LaunchSettings

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# What schedulers set in a job, or a step, that has GPUs: lists of their numbers, and counts such as "2" or "a100:4".
LISTS_OF_GPUS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", *VISIBLE_DEVICES)
COUNTS_OF_GPUS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
# LSF names no GPUs of its own, but what it reserved, as "select[...] rusage[ngpus_physical=2.00/host]".
RESERVED_BY_LSF = "LSB_EFFECTIVE_RSRCREQ"


def with_device(ranks: Ranks, settings: LaunchSettings, env: Mapping[str, str] = os.environ) -> Ranks:
    """Returns the ranks with the device of the configuration, and stops a job that has lost its GPUs.

    Raises:
        ValueError: the job or the configuration asks for GPUs and this process sees none, or device and backend
            contradict each other.
    """
    if settings.device == "cpu":
        if settings.backend == "nccl":
            raise ValueError("launch.backend nccl needs GPUs, but launch.device is cpu: set launch.backend: gloo")
        return replace(ranks, device="cpu")
    if torch.cuda.is_available():
        return replace(ranks, device=settings.device)
    why = ""
    if settings.device == "cuda" or settings.backend == "nccl":
        why = "launch.device is cuda" if settings.device == "cuda" else "launch.backend is nccl"
    elif ranks.scheduler != "none":
        names = [name for name in LISTS_OF_GPUS if env.get(name, "").strip() not in ("", "-1", "NoDevFiles", "void")]
        names += [name for name in COUNTS_OF_GPUS if re.fullmatch(r"(.*:)?0*[1-9]\d*", env.get(name, ""))]
        names += [RESERVED_BY_LSF] if re.search(r"ngpus_\w+=[\d.]*[1-9]", env.get(RESERVED_BY_LSF, "")) else []
        why = f"{names[0]}={env[names[0]]} gives the job GPUs" if names else ""
    if why:
        built = "GPUs" if torch.version.cuda or torch.version.hip else "CPUs alone"
        raise ValueError(
            f"{why}, but rank {ranks.rank} on {host_of(ranks)} sees no GPU (torch {torch.__version__} is built for "
            f"{built}): ask for GPUs on the line that "
            "starts the ranks, load a torch that is built for them, or set launch.device: cpu"
        )
    return replace(ranks, device=settings.device)


def device_of(ranks: Ranks) -> torch.device:
    """Returns the only GPU that this process sees, that of its local rank, or the CPU; ValueError for too few GPUs."""
    if ranks.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    if ranks.local_rank < count:
        return torch.device("cuda", ranks.local_rank)
    visible = ", ".join(f"{name}={os.environ[name]}" for name in VISIBLE_DEVICES if name in os.environ)
    raise ValueError(
        f"local rank {ranks.local_rank} on {host_of(ranks)} has no GPU: this process sees {count} "
        f"({visible or 'no *_VISIBLE_DEVICES is set'}); start at most {count} ranks a node (srun --gpus-per-node, "
        "jsrun -g, torchrun --nproc-per-node)"
    )


def describe_device(ranks: Ranks) -> str:
    """Returns one line for the log of every run: the device of this rank, and the number of ranks."""
    device = device_of(ranks)
    name = str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
    return f"device: {name}; world size: {ranks.world_size}"


def safe_start_method() -> str:
    """Returns how workers of data start: as Python chooses, but not by fork, which may hang beside MPI or a GPU."""
    usual = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return "forkserver" if usual == "fork" and (mpi_is_in_use() or torch.cuda.is_available()) else usual


# --- what the roll call compares


def choose(ranks: Ranks, settings: LaunchSettings) -> tuple[str, torch.device, str]:
    """Returns backend, device, and what is wrong with them, which the roll call hands to all ranks at once."""
    try:
        device, problem = device_of(ranks), ""
    except ValueError as error:
        device, problem = torch.device("cpu"), str(error)
    backend = settings.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        problem = problem or f"launch.backend is nccl, but {host_of(ranks)} has no GPU that this process sees"
    return backend, device, problem


def facts_of(ranks: Ranks, settings: LaunchSettings) -> dict[str, Any]:
    """Returns what rank 0 must know of this rank's device."""
    backend, device, problem = choose(ranks, settings)
    return {
        "host": host_of(ranks),
        "machine": machine(),
        "network": namespace("net"),
        "backend": backend,
        "device": _device_name(device),
        "problem": problem,
    }


def judge(facts: Sequence[Mapping[str, Any]], settings: LaunchSettings) -> str:
    """Returns why ranks with these facts cannot work together, or ""."""
    owners: dict[tuple[str, str], int] = {}
    for rank, fact in enumerate(facts):
        if fact["problem"]:
            return f"rank {rank}: {fact['problem']}"
        if fact["backend"] != facts[0]["backend"]:
            return (
                f"rank 0 on {facts[0]['host']} wants {facts[0]['backend']} and rank {rank} on {fact['host']} wants "
                f"{fact['backend']}: every rank or none must see a GPU, or set launch.backend"
            )
        owner = owners.setdefault((fact["machine"], fact["device"]), rank)
        if fact["device"] and owner != rank and (fact["backend"] == "nccl" or not settings.share_devices):
            return (
                f"ranks {owner} and {rank} on {fact['host']} use the same GPU {fact['device']}: give each rank its own "
                "(srun --gpus-per-task=1 or --gpus-per-node, jsrun -g), or set launch.share_devices and "
                "launch.backend: gloo"
            )
    return ""


def _device_name(device: torch.device) -> str:
    """Returns what tells this device from all others of its machine, or "" for the CPU."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", "") or f"{device} of {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}")


def binding(ranks: Ranks) -> list[dict[str, Any]]:
    """Returns where each rank runs: host, process, cores, device; by rank, and the same list on all ranks."""
    device = device_of(ranks)
    own = {
        "rank": ranks.rank,
        "local_rank": ranks.local_rank,
        "host": host_of(ranks),
        "pid": os.getpid(),
        "cores": spans(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "",
        "threads": torch.get_num_threads(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device_id": _device_name(device),
        "interface": os.environ.get("NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME", ""),
    }
    return gather(ranks, own)
