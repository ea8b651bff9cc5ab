"""How a process becomes one of the ranks: its device, its process group, and how it leaves.

`experiments.distributed.ranks` says who is who, `experiments.distributed.rendezvous` lets the ranks meet. mpi4py is
imported here only, where mpiexec spawned this process or where a configuration asks for it, and MPI is left again once
the ranks have met.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore, set_debug_level_from_env  # type: ignore[attr-defined]

from experiments.distributed import rendezvous
from experiments.distributed.departure import (
    Joined,
    control_group,
    end_on_failure,
    join,
    joined,
    leave,
    stop_process_group,
    watch,
)
from experiments.distributed.ranks import MPI_LAUNCHERS, Ranks, read_ranks
from experiments.distributed.rendezvous import Announcement, Deadline, host_of
from experiments.settings.checks import BOOLEAN, TEXT, Kind, choice, integer, number, optional, setting

__all__ = [
    "LaunchSettings",
    "Ranks",
    "binding",
    "device_of",
    "end_on_failure",
    "leave",
    "ranks_from_environment",
    "safe_start_method",
    "start_process_group",
    "stop_process_group",
]


def _variables(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError
    for name, entry in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"(TORCH_)?(NCCL|RCCL)_[A-Z0-9_]+|TORCH_FR_[A-Z0-9_]+", name):
            raise ValueError
        if not isinstance(entry, (str, int, float)):
            raise ValueError
    return {name: str(int(entry) if isinstance(entry, bool) else entry) for name, entry in value.items()}


VARIABLES = Kind("a mapping from variables NCCL_*, RCCL_*, TORCH_NCCL_* or TORCH_FR_* to values", _variables)


@dataclass(frozen=True)
class LaunchSettings:
    """How ranks start, wait and report; what the user exported wins over `nccl` and `interface`.

    Attributes:
        start_seconds: until all ranks have met.
        collective_seconds: that a collective may take.
        checkpoint_seconds: that the ranks wait for one that reads or writes its part of a checkpoint.
        backend: of the process group; auto means nccl on GPUs and gloo on CPUs.
        rendezvous: mpi broadcasts the address of rank 0 through MPI, file writes it to the folder of results; auto
            means mpi where mpiexec spawned the ranks and mpi4py can be imported, else file.
        interface: network interfaces by name, with commas; auto for the one that leads to rank 0; null for the
            libraries' own choice.
        nccl: variables for NCCL and its watchdog.
        flight_recorder: last collectives that are kept for the dump after a timeout; 0 for none.
        share_devices: lets several ranks use one GPU.
        debug: torch checks that all ranks call the same collective, which is slow; with NCCL only.
    """

    start_seconds: float = setting(number(0), 300.0)
    collective_seconds: float = setting(number(0), 600.0)
    checkpoint_seconds: float = setting(number(0), 1800.0)
    backend: str = setting(choice("auto", "nccl", "gloo"), "auto")
    rendezvous: str = setting(choice("auto", "mpi", "file"), "auto")
    interface: str | None = setting(optional(TEXT), "auto")
    nccl: dict[str, str] = setting(VARIABLES, {})  # noqa: RUF009
    flight_recorder: int = setting(integer(0), 2000)
    share_devices: bool = setting(BOOLEAN, False)
    debug: bool = setting(BOOLEAN, False)


OTHER_FILES = 512  # beside connections: libraries, data, workers

_mpi_was_used = False


def ranks_from_environment(env: Mapping[str, str]) -> Ranks:
    """Reads the ranks from the variables that the launcher set; `experiments.distributed.ranks` has the rules.

    Raises:
        ValueError: a variable is missing, is no integer, or contradicts another one; or this is the batch shell of a
            job with several tasks, and the message has the line to type.
    """
    return read_ranks(env, command=sys.orig_argv, mpi=_mpi_numbers)


def _mpi() -> Any:
    """mpi4py's MPI, initialized.

    Raises:
        ImportError, RuntimeError: mpi4py, or the MPI library it needs, is missing.
    """
    global _mpi_was_used
    from mpi4py import MPI

    _mpi_was_used = True
    return MPI


def _mpi_numbers() -> tuple[int, int, int, int]:
    try:
        mpi = _mpi()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"the number of ranks is known to MPI alone, and mpi4py cannot be used: {str(error).splitlines()[0]}; set "
            "AADL_LAUNCHER=single for one process"
        ) from None
    world = mpi.COMM_WORLD
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    return world.rank, world.size, node.rank, node.size


def device_of(ranks: Ranks) -> torch.device:
    """The device of this process: the only GPU that it sees, or the GPU of its local rank, or the CPU.

    Raises:
        ValueError: there are fewer GPUs than ranks on this node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    if ranks.local_rank < count:
        return torch.device("cuda", ranks.local_rank)
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    visible = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    raise ValueError(
        f"local rank {ranks.local_rank} on {host_of(ranks)} has no GPU: this process sees {count} "
        f"({visible or 'no *_VISIBLE_DEVICES is set'}); start at most {count} ranks a node (srun --gpus-per-node, "
        "jsrun -g, torchrun --nproc-per-node)"
    )


def safe_start_method(wish: str = "auto") -> str:
    """How data loader workers are to start: a forked copy of a process that uses MPI or a GPU may hang or crash.

    Args:
        wish: "spawn" and "forkserver" are granted, "fork" only where neither is in use, and "auto" is Python's own
            choice there; elsewhere both become "forkserver".
    """
    usual = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    method = usual if wish == "auto" else wish
    in_use = _mpi_was_used or "mpi4py.MPI" in sys.modules or torch.cuda.is_available()
    return "forkserver" if in_use and method == "fork" else method


def start_process_group(ranks: Ranks, settings: LaunchSettings | None = None, folder: Path | None = None) -> None:
    """Joins the ranks, by nccl on GPUs and by gloo on CPUs; nothing to do, and no network, for a single rank.

    Every group of gloo, the one for control among them, connects each rank with each other one.

    Args:
        ranks: this process.
        settings: deadlines, interfaces and so on; the defaults if None.
        folder: seen by all ranks, for the announcement of rank 0 where the launcher has no channel of its own; the
            current one if None.

    Raises:
        ValueError: the ranks contradict each other or their devices.
        OSError: rank 0 cannot announce its address, or its port is taken.
        RuntimeError: ranks are missing, which are named, or cannot work together.
    """
    if ranks.world_size == 1:
        return
    settings = settings or LaunchSettings()
    _export_settings(settings, folder)
    _allow_many_files(ranks.world_size)
    met = joined() or _meet(ranks, settings, folder or Path(), Deadline(settings.start_seconds))
    backend, device, _ = _device(ranks, settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    met.groups += 1
    dist.init_process_group(
        backend,
        store=PrefixStore(f"group {met.groups}", met.store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=settings.collective_seconds),
        device_id=device if backend == "nccl" else None,
    )
    watch(met)
    control_group(ranks)


def _meet(ranks: Ranks, settings: LaunchSettings, folder: Path, deadline: Deadline) -> Joined:
    """Meets the other ranks, once for all process groups of this process."""
    base, announced = _open_store(ranks, settings, folder, deadline)
    backend, device, problem = _device(ranks, settings)
    facts = {
        "host": host_of(ranks),
        "machine": _machine(),
        "backend": backend,
        "device": _device_name(device),
        "problem": problem or _few_files(ranks),
    }
    try:
        name, several_hosts = rendezvous.roll_call(base, ranks, facts, lambda found: _judge(found, settings), deadline)
    finally:
        if announced is not None:
            announced.unlink(missing_ok=True)
    base.set_timeout(timedelta(seconds=settings.collective_seconds))
    _export_interface(ranks, settings, base, several_hosts)
    return join(ranks, base, PrefixStore(f"attempt {name}", base), settings.checkpoint_seconds)


def _device(ranks: Ranks, settings: LaunchSettings) -> tuple[str, torch.device, str]:
    """Backend, device, and what is wrong with them, which the roll call tells to all ranks at once."""
    try:
        device, problem = device_of(ranks), ""
    except ValueError as error:
        device, problem = torch.device("cpu"), str(error)
    backend = settings.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        problem = problem or f"launch.backend is nccl, but {host_of(ranks)} has no GPU that this process sees"
    if settings.debug and backend == "gloo":  # torch 2.13: a segmentation fault in the first pass of a model
        problem = problem or "launch.debug needs launch.backend nccl: with gloo torch's checks of collectives crash"
    return backend, device, problem


def _device_name(device: torch.device) -> str:
    """What tells this device from all others of its machine, or "" for the CPU."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", "") or f"{device} of {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}")


def _machine() -> str:
    """Host name and boot: containers of one machine may share the one, and cloned machines the other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (" " + boot.read_text().strip() if boot.exists() else "")


def _judge(facts: Sequence[Mapping[str, Any]], settings: LaunchSettings) -> str:
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


def _export_settings(settings: LaunchSettings, folder: Path | None) -> None:
    """Sets what torch and NCCL read when the group starts, unless the user did."""
    wanted = {
        **settings.nccl,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": settings.nccl.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3"),
    }
    if settings.flight_recorder:
        wanted |= {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": str(settings.flight_recorder)}
        if folder is not None:
            wanted["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / "flight_recorder_rank_")
    if settings.debug:
        wanted |= {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TORCH_NCCL_DESYNC_DEBUG": "1"}
    for name, value in {**wanted, **settings.nccl}.items():
        os.environ.setdefault(name, value)
    if settings.debug:
        set_debug_level_from_env()


def _export_interface(ranks: Ranks, settings: LaunchSettings, base: Store, several_hosts: bool) -> None:
    """Names the interface for gloo and NCCL, unless the user did: their guess may lead to no other node."""
    if settings.interface is None:
        return
    names = settings.interface
    if names == "auto":
        if not several_hosts:
            names = next((name for name, at in rendezvous.interface_addresses().items() if at == "127.0.0.1"), "")
        else:
            names = _interface_between_hosts(ranks, base)
    else:
        rendezvous.check_interfaces(names.split(","))
    if names:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, names)


def _interface_between_hosts(ranks: Ranks, base: Store) -> str:
    """The interface that leads to rank 0 and, there, to the others; never the loopback."""
    own = rendezvous.own_addresses((), one_host=False)[0]
    holds_store = ranks.rank == 0 and not ranks.agent_store
    towards = own if holds_store or not isinstance(base, TCPStore) else base.host
    for address in (towards, own):
        with contextlib.suppress(OSError):
            found = rendezvous.interface_towards(socket.gethostbyname(address))
            if found is not None and not found.startswith("lo"):
                return found
    return ""


def _open_store(ranks: Ranks, settings: LaunchSettings, folder: Path, deadline: Deadline) -> tuple[Store, Path | None]:
    """The store of all ranks, and the file that rank 0 announces it in and deletes, if it does."""
    if ranks.master_address and ranks.master_port:
        return rendezvous.connect_given(ranks, deadline), None
    mpi = _mpi_for_rendezvous(ranks, settings)
    path = None if mpi is not None else rendezvous.announcement_path(folder, ranks)
    if ranks.rank != 0:
        if path is None:
            received = _broadcast(mpi, None, ranks, deadline)
            return rendezvous.connect(lambda: received, ranks, deadline, "MPI's broadcast"), None
        return rendezvous.connect(lambda: rendezvous.read_announcement(path), ranks, deadline, str(path)), None
    names = () if settings.interface in (None, "auto") else tuple(str(settings.interface).split(","))
    if names:
        rendezvous.check_interfaces(names)
    one_host = ranks.local_size == ranks.world_size
    addresses = rendezvous.own_addresses(names, one_host=one_host)
    if ranks.master_address:
        addresses = (ranks.master_address, *addresses)
    listening = rendezvous.listen(ranks.master_port, loopback=addresses == ("127.0.0.1",))
    announcement = Announcement(addresses, listening.getsockname()[1], secrets.token_hex(16))
    store = rendezvous.host_store(listening, announcement.token, settings.start_seconds)
    if path is None:
        _broadcast(mpi, announcement, ranks, deadline)
    else:
        rendezvous.write_announcement(path, announcement)
    return store, path


def _allow_many_files(world_size: int) -> None:
    """Raises the limit of open files, usually 1024, to what this rank may need.

    Each group of gloo takes one connection per rank: the world, where it is gloo's, and control. Rank 0 holds one more
    for each client of its store, and for a moment two.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5 * world_size + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _few_files(ranks: Ranks) -> str:
    """What is wrong with the limit of open files, which the roll call tells to all ranks."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * ranks.world_size + 64
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ""
    return (
        f"a process on {host_of(ranks)} may open {soft} files, and one of {ranks.world_size} ranks needs {needed} for "
        "its connections: raise the hard limit (ulimit -Hn, LimitNOFILE of the scheduler's daemon)"
    )


def _mpi_for_rendezvous(ranks: Ranks, settings: LaunchSettings) -> Any:
    """MPI if it is to broadcast the address of rank 0, else None.

    Raises:
        ValueError: MPI is wanted and cannot be used, or it counts other ranks than the launcher.
    """
    if settings.rendezvous == "file" or (settings.rendezvous == "auto" and ranks.launcher not in MPI_LAUNCHERS):
        return None
    try:
        mpi = _mpi()
    except (ImportError, RuntimeError) as error:
        if settings.rendezvous == "mpi":
            raise ValueError(
                f"launch.rendezvous is mpi, but mpi4py cannot be used: {str(error).splitlines()[0]}"
            ) from None
        return None
    world = mpi.COMM_WORLD
    if (world.rank, world.size) != (ranks.rank, ranks.world_size):
        library = mpi.Get_library_version().split(",")[0].strip()[:40]
        raise ValueError(
            f"{ranks.launcher} started rank {ranks.rank} of {ranks.world_size}, but MPI.COMM_WORLD has rank "
            f"{world.rank} of {world.size}: mpi4py uses another MPI library ({library}) than the launcher; set "
            "launch.rendezvous: file to do without"
        )
    return mpi


def _broadcast(mpi: Any, announcement: Announcement | None, ranks: Ranks, deadline: Deadline) -> Announcement:
    """Sends the announcement of rank 0 to all, then leaves MPI, whose threads and signals nothing else needs.

    Raises:
        RuntimeError: the broadcast did not end in time.
    """
    buffer = bytearray(4096)
    if announcement is not None:
        text = json.dumps(asdict(announcement)).encode()
        buffer[: len(text)] = text
    request = mpi.COMM_WORLD.Ibcast([buffer, mpi.BYTE], root=0)
    while not request.Test():
        if not deadline.pause():
            raise RuntimeError(
                f"rank {ranks.rank} on {host_of(ranks)}: MPI's broadcast of the address of rank 0 did not end within "
                f"{deadline.seconds:g} s"
            )
    mpi.Finalize()
    raw = json.loads(buffer.rstrip(b"\0"))
    return Announcement(tuple(raw["addresses"]), raw["port"], raw["token"])


def binding(ranks: Ranks) -> list[dict[str, Any]]:
    """Where each rank runs: host, process, cores that it may use, device; by rank, the same list on all ranks."""
    device = device_of(ranks)
    own = {
        "rank": ranks.rank,
        "local_rank": ranks.local_rank,
        "host": host_of(ranks),
        "pid": os.getpid(),
        "cores": rendezvous.spans(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "",
        "threads": torch.get_num_threads(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device_id": _device_name(device),
        "interface": os.environ.get("NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME", ""),
    }
    if ranks.world_size == 1:
        return [own]
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, own)
    return found
