"""Settings of how the ranks of a job start, meet and wait: the section `launch` of a configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveFloat

from experiments.settings.kinds import Text
from experiments.settings.schema import Settings


class LaunchSettings(Settings):
    """How ranks start, wait and report; what the user exported wins over `interface`.

    Attributes:
        device: auto takes a GPU where there is one and stops if the job asked for GPUs and sees none; cpu takes the
            CPU whatever there is; cuda stops where there is no GPU.
        start_seconds: how long it may take until all ranks have met.
        collective_seconds: how long a collective may take.
        checkpoint_seconds: how long the ranks wait for one that reads or writes its part of a checkpoint.
        backend: of the process group; auto means nccl on GPUs and gloo on CPUs.
        rendezvous: mpi broadcasts the address of rank 0 through MPI, file writes it to the folder of results; auto
            means mpi where mpiexec spawned the ranks and mpi4py can be imported, otherwise file.
        interface: network interfaces by name, with commas; auto for the one that leads to rank 0; null for the
            libraries' own choice.
        share_devices: True lets several ranks use one GPU.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    start_seconds: PositiveFloat = 300.0
    collective_seconds: PositiveFloat = 600.0
    checkpoint_seconds: PositiveFloat = 1800.0
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    rendezvous: Literal["auto", "mpi", "file"] = "auto"
    interface: Text | None = "auto"
    share_devices: bool = False

    removed_keys: ClassVar = {
        "nccl": "export its variables (NCCL_...) before the start",
        "debug": "leave it out",
        "flight_recorder": "leave it out",
    }
