"""MPI, where it spawned this process: the number of ranks, and a broadcast of the address of rank 0.

mpi4py is imported here and nowhere else, inside functions, because importing it starts MPI, which fails on login nodes
and where there is no MPI library.
"""

from __future__ import annotations

import sys
from typing import Any

from experiments.distributed.polling import Deadline
from experiments.distributed.ranks import MPI_LAUNCHERS, Ranks
from experiments.distributed.rendezvous import Announcement, host_of
from experiments.settings.launch_settings import LaunchSettings


def mpi_is_in_use() -> bool:
    return "mpi4py.MPI" in sys.modules


def start_mpi() -> Any:
    """Returns mpi4py's MPI, initialized; ImportError or RuntimeError where it, or its MPI library, is missing."""
    from mpi4py import MPI

    return MPI


def numbers_of_mpi() -> tuple[int, int, int, int]:
    """Returns rank, world size, local rank and local size; ValueError where mpi4py cannot be used."""
    try:
        mpi = start_mpi()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"the number of ranks is known to MPI alone, and mpi4py cannot be used: {str(error).splitlines()[0]}; set "
            "AADL_LAUNCHER=single for one process"
        ) from None
    world = mpi.COMM_WORLD
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    return world.rank, world.size, node.rank, node.size


def mpi_for_rendezvous(ranks: Ranks, settings: LaunchSettings) -> Any:
    """Returns MPI if it is to broadcast the address of rank 0, otherwise None.

    Raises:
        ValueError: MPI is asked for and cannot be used, or it counts other ranks than the launcher.
    """
    if settings.rendezvous == "file" or (settings.rendezvous == "auto" and ranks.launcher not in MPI_LAUNCHERS):
        return None
    try:
        mpi = start_mpi()
    except (ImportError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        if settings.rendezvous == "mpi":
            raise ValueError(f"launch.rendezvous is mpi, but mpi4py cannot be used: {cause}") from None
        if ranks.rank == 0:
            print(f"mpi4py cannot be used ({cause}): the ranks meet by a file instead", file=sys.stderr, flush=True)
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


def broadcast(mpi: Any, announcement: Announcement | None, ranks: Ranks, deadline: Deadline) -> Announcement:
    """Sends the announcement of rank 0 to all, then leaves MPI; RuntimeError where that does not end in time."""
    buffer = bytearray(4096)
    if announcement is not None:
        text = announcement.as_json().encode()
        buffer[: len(text)] = text
    request = mpi.COMM_WORLD.Ibcast([buffer, mpi.BYTE], root=0)
    while not request.Test():
        if not deadline.pause():
            raise RuntimeError(
                f"rank {ranks.rank} on {host_of(ranks)}: MPI's broadcast of the address of rank 0 did not end within "
                f"{deadline.seconds:g} s"
            )
    mpi.Finalize()
    return Announcement.read(bytes(buffer).rstrip(b"\0"))
