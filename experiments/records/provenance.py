"""Where a record comes from: configuration, code, versions, machine and job."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import aadl
from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.records.series import SCHEMA_VERSION
from experiments.settings.run_config import RunConfig
from experiments.training.problem import Problem
from experiments.training.result import Result

ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")
"""The only environment variables that a record carries: they change the numbers and name no user and no folder."""


def attributes_of(
    config: RunConfig,
    problem: Problem,
    result: Result,
    ranks: Ranks,
    start: datetime,
    end: datetime,
    places: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The root attributes of a record; the arguments are those of `write_run`."""
    commit, dirty = git_state()
    device = device_of(ranks)
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    hosts = dict.fromkeys(str(place["host"]) for place in places) or [ranks.host or socket.gethostname()]
    of_iterations: dict[str, Any] = {}
    if result.iterations is not None:
        of_iterations = {
            "diverged_iteration": -1 if result.diverged_iteration is None else result.diverged_iteration,
            "stop_reason": result.stop_reason,
        }
    return {
        **problem.attributes,
        **result.attributes,
        **of_iterations,
        "schema_version": SCHEMA_VERSION,
        "config": config.as_json(),
        "experiment": config.experiment,
        "scale": config.scale,
        "variant": config.name,
        "label": config.variant.label,
        **place_of(config),
        "study": config.study,
        "seed": config.seed,
        "data_source": problem.data_source,
        "data_digest": problem.data_digest,
        "diverged_epoch": -1 if result.diverged_epoch is None else result.diverged_epoch,
        "num_steps": result.num_steps,
        "git_commit": commit,
        "git_dirty": dirty,
        "python_version": platform.python_version(),
        "torch_version": str(torch.__version__),
        "numpy_version": np.__version__,
        "h5py_version": h5py.__version__,
        "aadl_version": aadl.__version__,
        "world_size": ranks.world_size,
        "launcher": ranks.launcher,
        "hosts": ", ".join(hosts),
        "devices": own,
        "num_threads": torch.get_num_threads(),
        "scheduler": ranks.scheduler,
        "job_id": ranks.job_id,
        "environment": json.dumps({name: os.environ[name] for name in ENVIRONMENT if name in os.environ}),
        "start_utc": start.isoformat(timespec="seconds"),
        "end_utc": end.isoformat(timespec="seconds"),
    }


def place_of(config: RunConfig) -> dict[str, Any]:
    """What a record says of its place among the variants."""
    return {"variant_index": config.variant.index, "baseline": config.variant.baseline}


@lru_cache(maxsize=1)
def git_state() -> tuple[str, bool]:
    """Commit of the checkout and whether it has changes; ("unknown", False) where git or the history is missing."""
    folder = Path(__file__).parent
    # git refuses the checkout of a colleague for what its configuration may start; the code of this one runs already.
    git = ["git", "-c", f"safe.directory={folder.resolve().parents[1]}"]
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            answers.append(subprocess.run([*git, *arguments], cwd=folder, capture_output=True, text=True, check=False))
        except OSError:
            return "unknown", False
    commit, status = answers
    if commit.returncode != 0 or status.returncode != 0:
        return "unknown", False
    return commit.stdout.strip(), bool(status.stdout.strip())
