"""Settings of how the ranks of a job start, meet and wait: the section `launch` of a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.settings.checks import BOOLEAN, TEXT, Kind, choice, integer, number, optional, setting


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
        nccl: variables for NCCL and its watchdog.
        flight_recorder: how many of the last collectives are kept for the dump after a timeout; 0 for none.
        share_devices: True lets several ranks use one GPU.
        debug: True lets torch check that all ranks call the same collective, which is slow; with NCCL only.
    """

    device: str = setting(choice("auto", "cpu", "cuda"), "auto")
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
