"""Results: one HDF5 file a run, readable at any moment."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import aadl
from experiments.config import RunConfig
from experiments.launch import Ranks, device_of
from experiments.train import Problem, Result

SCHEMA_VERSION = 1

# The only environment variables that a record carries: they change the numbers and name no user and no folder.
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")

# Units and long names; a cause of rejection gets its own series, so those come by prefix.
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "metrics/train/loss": ("1", "mean squared error on the training set"),
    "metrics/train/minibatch_loss": ("1", "mean over the epoch of the loss that the optimizer saw"),
    "metrics/validation/loss": ("1", "mean squared error on the validation set"),
    "timing/training_seconds": ("s", "time spent in training since the start, without evaluation"),
    "timing/training_cpu_seconds": ("s", "CPU time of the process in training since the start, without evaluation"),
    "updates/relative_standard_deviation": ("1", "relative standard deviation of consecutive updates over the epoch"),
    "acceleration/steps": ("1", "optimizer steps since the start"),
    "acceleration/macro_steps": ("1", "macro-steps since the start"),
    "acceleration/attempts": ("1", "accelerations tried since the start"),
    "acceleration/accepted": ("1", "accelerations accepted since the start"),
    "acceleration/reverted": ("1", "accepted accelerations that were taken back since the start"),
    "acceleration/skipped_steps": ("1", "steps that a fused GradScaler skipped, since the start"),
    "acceleration/suspensions": ("1", "suspensions by the trust ratio since the start"),
    "acceleration/suspended": ("1", "accelerations left out during suspensions since the start"),
    "acceleration/closure_evaluations": ("1", "evaluations of the loss by the safeguard since the start"),
    "acceleration/averaging": ("1", "whether the moving average is on"),
    "acceleration/relative_standard_deviation": ("1", "relative standard deviation between updates in the window"),
    "acceleration/trust_ratio": ("1", "next residual norm over the predicted one"),
    "acceleration/gain": ("1", "norm of the mixed residual over the plain one"),
    "acceleration/condition_number": ("1", "condition number of the column-equilibrated residual differences DF"),
    "acceleration/numerical_rank": ("1", "numerical rank of the Gram matrix"),
    "acceleration/coefficient_norm": ("1", "norm of the mixing coefficients gamma for unit columns"),
}


@dataclass(frozen=True)
class Run:
    """One recorded run: its root attributes, its configuration, its series by name ("metrics/train/loss")."""

    path: Path
    attributes: dict[str, Any]
    config: dict[str, Any]
    series: dict[str, np.ndarray]

    @property
    def diverged_epoch(self) -> int | None:
        """First epoch with a loss that is not finite, None for a run that ended well."""
        epoch = int(self.attributes["diverged_epoch"])
        return epoch if epoch >= 0 else None


def run_path(results: Path, config: RunConfig) -> Path:
    """`results/<experiment>/<scale>/<name>/seed-<s>.h5`."""
    return results / config.experiment / config.scale / config.name / f"seed-{config.seed}.h5"


def write_run(
    path: Path, config: RunConfig, problem: Problem, result: Result, ranks: Ranks, start: datetime, end: datetime
) -> None:
    """Writes one run to a temporary file in the same folder, then moves it into place.

    A reader sees the old file or the new one, whole; `complete` is the last attribute written, for whoever opens the
    temporary file of a killed run.

    Args:
        path: target file; its folder is made.
        config: the run's configuration.
        problem: for the data's source and digest.
        result: series by epoch.
        ranks: for the world size.
        start: start of the run, UTC.
        end: end of the run, UTC.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    os.close(handle)
    try:
        with h5py.File(temporary, "w") as file:
            for name, values in result.series.items():
                _write_series(file, name, values)
            file.attrs.update(_attributes(config, problem, result, ranks, start, end))
            file.attrs["complete"] = True
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes the file private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_series(file: h5py.File, name: str, values: np.ndarray) -> None:
    group_name, _, short = name.rpartition("/")
    group = file.require_group(group_name)
    if "epoch" not in group:  # every group has its own scale: readers such as xarray open one group at a time
        scale = group.create_dataset("epoch", data=np.arange(len(values), dtype=np.int64))
        scale.make_scale("epoch")
        scale.attrs["units"] = "epoch"
        scale.attrs["long_name"] = "completed passes over the training set"
    dataset = group.create_dataset(short, data=values)
    dataset.dims[0].attach_scale(group["epoch"])
    cause = short.removeprefix("rejected_").replace("_", " ")
    default = f"accelerations rejected since the start: {cause}" if "/rejected_" in name else short.replace("_", " ")
    units, long_name = DESCRIPTIONS.get(name, ("1", default))
    dataset.attrs["units"] = units
    dataset.attrs["long_name"] = long_name


def _attributes(
    config: RunConfig, problem: Problem, result: Result, ranks: Ranks, start: datetime, end: datetime
) -> dict[str, Any]:
    commit, dirty = git_state()
    device = device_of(ranks)
    return {
        "schema_version": SCHEMA_VERSION,
        "config": config.as_json(),
        "experiment": config.experiment,
        "scale": config.scale,
        "variant": config.name,
        "label": config.variant.label,
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
        "hosts": socket.gethostname(),
        "devices": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "num_threads": torch.get_num_threads(),
        "scheduler": "none",
        "job_id": "",
        "restart_count": 0,
        "environment": json.dumps({name: os.environ[name] for name in ENVIRONMENT if name in os.environ}),
        "start_utc": start.isoformat(timespec="seconds"),
        "end_utc": end.isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def git_state() -> tuple[str, bool]:
    """Commit of the checkout and whether it has changes; ("unknown", False) where git or the history is missing."""
    folder = Path(__file__).parent
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            answers.append(subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False))
        except OSError:
            return "unknown", False
    commit, status = answers
    if commit.returncode != 0 or status.returncode != 0:
        return "unknown", False
    return commit.stdout.strip(), bool(status.stdout.strip())


def read_run(path: Path) -> Run:
    """Reads one run.

    Raises:
        OSError: the file is missing, is no HDF5 file, is incomplete, or has another schema.
    """
    with h5py.File(path, "r") as file:
        attributes = {name: _plain(value) for name, value in file.attrs.items()}
        if not attributes.get("complete"):
            raise OSError(f"{path} is incomplete")
        if attributes.get("schema_version") != SCHEMA_VERSION:
            raise OSError(f"{path} has schema version {attributes.get('schema_version')}, not {SCHEMA_VERSION}")
        series: dict[str, np.ndarray] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and not name.endswith("epoch"):
                series[name] = np.asarray(item)

        file.visititems(visit)
    return Run(path, attributes, json.loads(attributes["config"]), series)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def read_runs(folder: Path) -> list[Run]:
    """All runs below a folder, ordered by variant and seed.

    Raises:
        OSError: one of the files is unreadable or incomplete; the message names it.
    """
    runs = []
    for path in folder.glob("*/seed-*.h5"):
        try:
            runs.append(read_run(path))
        except OSError as error:
            raise OSError(f"{path} cannot be read ({error}): delete it or run its experiment again") from None
    return sorted(runs, key=lambda run: (run.attributes["variant"], run.attributes["seed"]))


def state_of(path: Path, config: RunConfig, data_digest: str, world_size: int) -> str:
    """Whether the run must be done: "finished", "missing", "changed" or "unreadable".

    "changed" means other settings, other data or another number of ranks: each changes the numbers.
    """
    if not path.exists():
        return "missing"
    try:
        run = read_run(path)
    except (OSError, KeyError, ValueError):
        return "unreadable"
    same: Mapping[str, Any] = run.attributes
    identity = (same.get("config"), same.get("data_digest"), same.get("world_size"))
    return "finished" if identity == (config.as_json(), data_digest, world_size) else "changed"
