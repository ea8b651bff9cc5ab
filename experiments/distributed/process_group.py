"""How the ranks meet and start a process group.

`ranks` says who is who, `devices` which device is whose, `rendezvous` lets the ranks meet, `mpi` asks MPI, and
`departure` says how they leave.
"""

from __future__ import annotations

import os
import resource
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from experiments.distributed import devices, interfaces, rendezvous
from experiments.distributed.departure import Joined, control_group, join, joined, watch
from experiments.distributed.mpi import broadcast, mpi_for_rendezvous
from experiments.distributed.polling import Deadline
from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import Announcement, host_of
from experiments.settings.launch_settings import LaunchSettings

OTHER_FILES = 512  # beside connections: libraries, data, workers


def start_process_group(ranks: Ranks, settings: LaunchSettings | None = None, folder: Path | None = None) -> None:
    """Joins the ranks, by nccl on GPUs and by gloo on CPUs; a single rank needs no group and no network.

    Args:
        ranks: this process.
        settings: deadlines, interfaces and so on.
        folder: seen by all ranks, where rank 0 announces its address if the launcher has no channel of its own; the
            current one if None.

    Raises:
        ValueError: the ranks contradict each other or their devices.
        OSError: rank 0 cannot announce its address, or its port is taken.
        RuntimeError: ranks are missing, which are named, or cannot work together.
    """
    if ranks.world_size == 1:
        return
    settings = settings or LaunchSettings()
    allow_many_files(ranks.world_size)
    met = joined() or _meet(ranks, settings, folder or Path(), Deadline(settings.start_seconds))
    backend, device, _ = devices.choose(ranks, settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    met.groups += 1
    watch(met)  # before the group, whose start hangs without a rank that has failed meanwhile
    dist.init_process_group(
        backend,
        store=PrefixStore(f"group {met.groups}", met.store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=settings.collective_seconds),
        device_id=device if backend == "nccl" else None,
    )
    control_group(ranks)


def _meet(ranks: Ranks, settings: LaunchSettings, folder: Path, deadline: Deadline) -> Joined:
    """Meets the other ranks, once for all process groups of this process."""
    store, announced = _open_store(ranks, settings, folder, deadline)
    facts = devices.facts_of(ranks, settings)
    facts["problem"] = facts["problem"] or few_files(ranks)
    try:
        several = rendezvous.roll_call(store, ranks, facts, lambda found: devices.judge(found, settings), deadline)
        _export_interface(ranks, settings, store, several)
    finally:
        if announced is not None:
            announced.unlink(missing_ok=True)
    store.set_timeout(timedelta(seconds=settings.collective_seconds))
    return join(ranks, store, settings.checkpoint_seconds)


# --- the store


def _open_store(ranks: Ranks, settings: LaunchSettings, folder: Path, deadline: Deadline) -> tuple[Store, Path | None]:
    """Returns the store of all ranks, and the file in which rank 0 announces it, if it does.

    Under torchrun, the store at the given address is that of its agent, which keeps the keys of earlier attempts and
    counts restarts for each node alone. It serves as a notice board for a store that is new in each attempt.
    """
    board = None
    if ranks.master_address and ranks.master_port:
        if ranks.rank == 0 and not ranks.agent_store:
            return rendezvous.host_store(rendezvous.listen(ranks.master_port), "", deadline.remaining()), None
        given = Announcement((ranks.master_address,), ranks.master_port)
        what = "the agent of torchrun" if ranks.agent_store else "rank 0"
        store = rendezvous.connect(lambda: given, ranks, deadline, "MASTER_ADDR", what)
        if not ranks.agent_store:
            return store, None
        board = store
    mpi = None if board is not None else mpi_for_rendezvous(ranks, settings)
    path = None if board is not None or mpi is not None else rendezvous.announcement_path(folder, ranks)
    if ranks.rank > 0:
        if board is not None:
            find, where = (lambda: rendezvous.read_board(board)), "the store of torchrun's agent"
        elif path is not None:
            find, where = (lambda: rendezvous.read_announcement(path)), str(path)
        else:
            received = broadcast(mpi, None, ranks, deadline)
            find, where = (lambda: received), "MPI's broadcast"
        return rendezvous.connect(find, ranks, deadline, where), None
    announcement, store = _host(ranks, settings, "" if board is not None else ranks.master_address)
    if board is not None:
        rendezvous.write_board(board, announcement)
    elif path is not None:
        rendezvous.write_announcement(path, announcement)
    else:
        broadcast(mpi, announcement, ranks, deadline)
    return store, path


def _host(ranks: Ranks, settings: LaunchSettings, wanted: str) -> tuple[Announcement, Store]:
    """Starts the store of rank 0 on a free port, or on the one that was asked for."""
    names = () if settings.interface in (None, "auto") else tuple(str(settings.interface).split(","))
    if names:
        interfaces.check_interfaces(names)
    addresses = interfaces.own_addresses(names, one_host=ranks.local_size == ranks.world_size)
    if wanted:
        addresses = (wanted, *addresses)
    port = 0 if ranks.agent_store else ranks.master_port
    listening = rendezvous.listen(port, loopback=addresses == (interfaces.LOOPBACK,))
    token = secrets.token_hex(16)
    announcement = Announcement(addresses, listening.getsockname()[1], token)
    return announcement, rendezvous.host_store(listening, token, settings.start_seconds)


# --- variables and limits that the libraries read


def _export_interface(ranks: Ranks, settings: LaunchSettings, store: Store, several_hosts: bool) -> None:
    """Names the interface for gloo and NCCL, unless the user did: their guess may lead to no other node."""
    names = settings.interface
    if names is None:
        return
    if names != "auto":
        interfaces.check_interfaces(names.split(","))
    elif several_hosts:
        names = _interface_between_hosts(ranks, store)
    else:
        present = interfaces.interface_addresses().items()
        names = next((name for name, entries in present if interfaces.LOOPBACK in entries), "")
    if names:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, names)


def _interface_between_hosts(ranks: Ranks, store: Store) -> str:
    """Returns the interface that leads to rank 0 and, on its host, to the others; never the loopback."""
    own = interfaces.own_addresses((), one_host=False)[0]
    towards: Any = own if ranks.rank == 0 else getattr(store, "host", own)
    for address in (towards, own):
        found = interfaces.interface_towards(address)
        if found is not None and not found.startswith("lo"):
            return found
    return ""


def allow_many_files(world_size: int) -> None:
    """Raises the limit of open files, usually 1024, to what this rank may need.

    Each group of gloo, the world's and the control group, takes one connection per rank. Rank 0 holds one more for each
    client of its store, and for a moment two.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5 * world_size + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def few_files(ranks: Ranks) -> str:
    """Returns what is wrong with the limit of open files, which the roll call hands to all ranks."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * ranks.world_size + 64
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ""
    return (
        f"a process on {host_of(ranks)} may open {soft} files, and one of {ranks.world_size} ranks needs {needed} for "
        "its connections: raise the hard limit (ulimit -Hn, LimitNOFILE of the scheduler's daemon)"
    )
