"""What each rank knows of itself, and how a finding is printed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import torch
import torch.distributed as dist

from data_loaders.workers import num_cores
from experiments.distributed.devices import safe_start_method
from experiments.distributed.interfaces import interface_addresses
from experiments.distributed.ranks import Ranks


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def facts_of(ranks: Ranks, results: Path) -> dict[str, Any]:
    """Returns what one rank knows of itself, as plain values that travel to the other ranks."""
    mpi = sys.modules.get("mpi4py.MPI")
    names = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "TMPDIR", "LSB_JOBID", "NCCL_SOCKET_IFNAME",
             "GLOO_SOCKET_IFNAME", "TORCHELASTIC_RUN_ID", "HDF5_USE_FILE_LOCKING")  # fmt: skip
    gpu = torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpu and dist.is_nccl_available() else "none"
    ssh = Path.home() / ".ssh" / "config"
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "CUDA": torch.version.cuda or "none",
            "ROCm": torch.version.hip or "none",
            "NCCL": nccl,
            "mpi4py": _version("mpi4py"),
            "MPI library": mpi.Get_library_version().split(",")[0].splitlines()[0] if mpi else "not in use",
            "pydantic": _version("pydantic"),
            "h5py": h5py.__version__,
            "HDF5": h5py.version.hdf5_version,
        },
        "host": ranks.host or socket.gethostname(),
        "gpus": torch.cuda.device_count() if gpu else 0,
        "cores": num_cores(),
        "interfaces": {name: ", ".join(entries) for name, entries in interface_addresses().items()},
        "start method": safe_start_method(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
        "all_environment": sorted(os.environ),
        "open ssh": ssh.exists() and bool(ssh.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)),
        "local_size": ranks.local_size,
    }


# ---- findings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One row of the table. It has a cure if something should change, and fails the examination if it is `bad`."""

    what: str
    found: str
    cure: str = ""
    bad: bool = False


def who(ranks: Sequence[int], total: int) -> str:
    """Returns "all ranks" or "rank 1, 2"."""
    return "all ranks" if len(ranks) == total and total > 1 else f"rank {', '.join(map(str, ranks[:8]))}"


def groups(keys: Any) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for rank, key in enumerate(keys):
        groups.setdefault(key, []).append(rank)
    return groups


def print_report(findings: Sequence[Finding]) -> int:
    """Prints the table and what to change; returns 1 if something must change."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "!!" if finding.bad else " !" if finding.cure else "  "
        print(f"{mark} {finding.what:<{width}}  {finding.found}")
    cures = [finding for finding in findings if finding.cure]
    print()
    if not cures:
        print("nothing to change")
    for finding in cures:
        print(f"{'must' if finding.bad else 'may'} change: {finding.what}: {finding.cure}")
    sys.stdout.flush()
    return int(any(finding.bad for finding in findings))
