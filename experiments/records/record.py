"""Results: one HDF5 file a run, readable at any moment."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from experiments.settings.run_config import RunConfig
from experiments.training.problem import Field, Problem
from experiments.training.train import Result

SCHEMA_VERSION = 1

# The only environment variables that a record carries: they change the numbers and name no user and no folder.
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")

# Units and long names; a cause of rejection gets its own series, so those come by prefix.
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "metrics/train/loss": ("1", "mean squared error on the training set"),
    "metrics/train/minibatch_loss": ("1", "mean over the epoch of the loss that the optimizer saw"),
    "metrics/validation/loss": ("1", "loss on the validation set: mean squared error, or cross entropy of classes"),
    "timing/training_seconds": ("s", "time spent in training since the start, without evaluation"),
    "timing/training_cpu_seconds": ("s", "CPU time of the process in training since the start, without evaluation"),
    "timing/input_seconds": ("s", "part of the training in which rank 0 waited for images, since the start"),
    "timing/acceleration_seconds": ("s", "part of the training that the acceleration took, since the start"),
    "timing/evaluation_seconds": ("s", "time spent in evaluations since the start, statistics of BatchNorm included"),
    "timing/batchnorm_seconds": ("s", "part of the evaluations that computed statistics of BatchNorm, since the start"),
    "timing/images_per_second": ("s-1", "images per second of training, over all ranks, in the epoch"),
    "metrics/train/pde_loss": ("1", "mean squared residual of the equation on the present interior points"),
    "metrics/train/condition_loss": ("1", "mean squared error on the present points of the conditions, unweighted"),
    "metrics/skipped_steps": ("1", "steps that the GradScaler skipped for an overflow, since the start"),
    "metrics/evaluations": ("1", "evaluations of the loss since the start, trials included"),
    "metrics/learning_rate": ("1", "learning rate of the present optimizer"),
    "updates/relative_standard_deviation": ("1", "relative standard deviation of consecutive updates in the interval"),
    "acceleration/steps": ("1", "optimizer steps since the start"),
    "acceleration/macro_steps": ("1", "macro-steps since the start"),
    "acceleration/attempts": ("1", "accelerations tried since the start"),
    "acceleration/accepted": ("1", "accelerations accepted since the start"),
    "acceleration/reverted": ("1", "accepted accelerations that were taken back since the start"),
    "acceleration/skipped_steps": ("1", "steps that a fused GradScaler skipped, since the start"),
    "acceleration/suspensions": ("1", "suspensions by the trust ratio since the start"),
    "acceleration/suspended": ("1", "accelerations left out during suspensions since the start"),
    "acceleration/closure_evaluations": ("1", "evaluations of the loss by the safeguard since the start"),
    "acceleration/residual_evaluations": ("1", "evaluations of residuals by the acceleration since the start"),
    "acceleration/averaging": ("1", "whether the moving average is on"),
    "acceleration/relative_standard_deviation": ("1", "relative standard deviation between updates in the window"),
    "acceleration/trust_ratio": ("1", "next residual norm over the predicted one; of residuals: gained over promised"),
    "acceleration/damping": ("1", "damping of the mixing problem, relative to unit columns"),
    "acceleration/gain": ("1", "norm of the mixed residual over the plain one"),
    "acceleration/condition_number": ("1", "condition number of the column-equilibrated residual differences DF"),
    "acceleration/numerical_rank": ("1", "numerical rank of the Gram matrix"),
    "acceleration/coefficient_norm": ("1", "norm of the mixing coefficients gamma for unit columns"),
}

# The same for series of test sets, whose names end in that of the set.
ERRORS: dict[str, tuple[str, str]] = {
    "metrics/validation/relative_l2_": ("1", "L2 norm of the error over that of the exact solution on the test set"),
    "metrics/validation/mean_absolute_error_": ("1", "mean absolute error on the test set"),
    "metrics/validation/max_error_": ("1", "largest absolute error on the test set"),
}
# Those of image classification; "stale" are those with the statistics of BatchNorm that the training left.
CLASSIFICATION: dict[str, tuple[str, str]] = {
    "loss": ("1", "cross entropy on the validation set, without label smoothing"),
    "top1": ("1", "share of the validation images whose class came first"),
    "top5": ("1", "share of the validation images whose class came among the first five"),
    "num_correct_top1": ("1", "number of validation images whose class came first"),
    "num_correct_top5": ("1", "number of validation images whose class came among the first five"),
    "num_images": ("1", "number of validation images that were evaluated"),
}
# Those that mean something else where points are sampled.
SAMPLED: dict[str, tuple[str, str]] = {
    "metrics/train/loss": ("1", "training loss on the present points"),
    "metrics/validation/loss": ("1", "training loss on points that training never sees"),
}

SCALES: dict[str, tuple[str, str]] = {
    "epoch": ("epoch", "completed passes over the training set"),
    "iteration": ("1", "evaluations of the gradient, or of a Jacobian, without the trials of an acceleration"),
}


@dataclass(frozen=True)
class Run:
    """One recorded run.

    Attributes:
        path: its file.
        attributes: of the root.
        config: its configuration.
        series: by name ("metrics/train/loss").
        places: where the series were evaluated: epochs, or iterations of a physics-informed network.
    """

    path: Path
    attributes: dict[str, Any]
    config: dict[str, Any]
    series: dict[str, np.ndarray]
    places: np.ndarray

    @property
    def is_pinn(self) -> bool:
        """Whether it is a physics-informed network."""
        return "equation" in self.attributes

    @property
    def is_classification(self) -> bool:
        """Whether it is image classification."""
        return "classification" in self.attributes

    @property
    def diverged_iteration(self) -> int | None:
        """First iteration with a loss that is not finite, None for a run that ended well or has epochs."""
        iteration = int(self.attributes.get("diverged_iteration", -1))
        return iteration if iteration >= 0 else None

    @property
    def diverged(self) -> bool:
        """Whether the run ended with a loss that is not finite."""
        return self.diverged_epoch is not None or self.diverged_iteration is not None

    @property
    def diverged_epoch(self) -> int | None:
        """First epoch with a loss that is not finite, None for a run that ended well."""
        epoch = int(self.attributes["diverged_epoch"])
        return epoch if epoch >= 0 else None


def run_path(results: Path, config: RunConfig) -> Path:
    """`results/<experiment>/<scale>/<name>/seed-<s>.h5`."""
    return results / config.experiment / config.scale / config.name / f"seed-{config.seed}.h5"


def run_folder(path: Path) -> Path:
    """Where a run that is not finished keeps its checkpoints, beside its record."""
    return path.with_suffix(".run")


def write_run(
    path: Path,
    config: RunConfig,
    problem: Problem,
    result: Result,
    ranks: Ranks,
    start: datetime,
    end: datetime,
    *,
    complete: bool = True,
    restart_count: int = 0,
    places: Sequence[Mapping[str, Any]] = (),
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
        complete: whether the run is finished.
        restart_count: how often it was taken up again.
        places: of the ranks, see `experiments.distributed.launch.binding`.

    Raises:
        OSError: the folder or the file cannot be written.
    """

    def fill(temporary: str) -> None:
        with h5py.File(temporary, "w") as file:
            for name, values in result.series.items():
                _write_series(file, name, values, result.iterations)
            _write_fields(file, result.fields)
            _write_weights(file, result.weights)
            if places:  # a dataset, for attributes have no room for a thousand ranks
                file.create_dataset("launch/binding", data=json.dumps([*places]))
            file.attrs.update(_attributes(config, problem, result, ranks, start, end, places))
            file.attrs["restart_count"] = restart_count
            file.attrs["complete"] = complete

    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, fill)


def note_place(path: Path, config: RunConfig) -> None:
    """Brings what a finished record says of its label and its place among the variants up to date, without a new run.

    Raises:
        OSError: the file cannot be read or written.
    """
    attributes = read_run(path).attributes
    wanted = {"label": config.variant.label, "config": config.as_json()}
    if "equation" in attributes:
        wanted |= _place(config)
    if all(attributes.get(name) == value for name, value in wanted.items()):
        return

    def fill(temporary: str) -> None:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+") as file:
            file.attrs.update(wanted)

    _replace(path, fill)


def _place(config: RunConfig) -> dict[str, Any]:
    return {"variant_index": config.variant.index, "baseline": config.variant.baseline}


def _replace(path: Path, fill: Callable[[str], None]) -> None:
    """Puts the file that `fill` writes in the place of another one, at once and whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    os.close(handle)
    try:
        fill(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes the file private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_series(file: h5py.File, name: str, values: np.ndarray, iterations: np.ndarray | None) -> None:
    group_name, _, short = name.rpartition("/")
    group = file.require_group(group_name)
    axis = "epoch" if iterations is None else "iteration"
    if axis not in group:  # every group has its own scale: readers such as xarray open one group at a time
        places = np.arange(len(values), dtype=np.int64) if iterations is None else iterations
        scale = group.create_dataset(axis, data=places)
        scale.make_scale(axis)
        scale.attrs["units"], scale.attrs["long_name"] = SCALES[axis]
    dataset = group.create_dataset(short, data=values)
    dataset.dims[0].attach_scale(group[axis])
    dataset.attrs["units"], dataset.attrs["long_name"] = _description(name, iterations is not None)


def _description(name: str, is_sampled: bool) -> tuple[str, str]:
    """Unit and long name of a series."""
    if is_sampled and name in SAMPLED:
        return SAMPLED[name]
    group, _, short = name.rpartition("/")
    stale, short = short.startswith("stale_"), short.removeprefix("stale_")
    if group == "metrics/validation" and short in CLASSIFICATION and (stale or name not in DESCRIPTIONS):
        units, long_name = CLASSIFICATION[short]
        return units, long_name + (", with stale statistics of BatchNorm" if stale else "")
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    for prefix, (units, long_name) in ERRORS.items():
        if name.startswith(prefix):
            return units, f"{long_name} {name.removeprefix(prefix)}"
    short = name.rpartition("/")[2]
    cause = short.removeprefix("rejected_").replace("_", " ")
    return "1", f"accelerations rejected since the start: {cause}" if "/rejected_" in name else short.replace("_", " ")


def _write_fields(file: h5py.File, fields: Mapping[str, Field]) -> None:
    for name, entry in fields.items():
        dataset = file.require_group("fields").create_dataset(name, data=entry.values)
        dataset.attrs["units"], dataset.attrs["long_name"] = entry.units, entry.long_name
        if entry.dimensions == (name,):
            dataset.make_scale(name)
    for name, entry in fields.items():
        for axis, dimension in enumerate(entry.dimensions):
            if dimension != name:
                file["fields"][name].dims[axis].attach_scale(file["fields"][dimension])


def _write_weights(file: h5py.File, weights: Mapping[str, torch.Tensor]) -> None:
    if weights:
        group = file.create_group("weights", track_order=True)  # that of the state_dict
        for name, value in weights.items():
            group.create_dataset(name, data=value.numpy())


def _attributes(
    config: RunConfig,
    problem: Problem,
    result: Result,
    ranks: Ranks,
    start: datetime,
    end: datetime,
    places: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
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
        **_place(config),
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


class IncompleteRecord(OSError):
    """The record of a run that is not finished."""


def read_run(path: Path) -> Run:
    """Reads one run.

    Raises:
        OSError: the file is missing, is no HDF5 file, is incomplete, or has another schema.
    """
    with h5py.File(path, "r") as file:
        attributes = {name: _plain(value) for name, value in file.attrs.items()}
        if not attributes.get("complete"):
            raise IncompleteRecord(f"{path} is incomplete")
        if attributes.get("schema_version") != SCHEMA_VERSION:
            raise OSError(f"{path} has schema version {attributes.get('schema_version')}, not {SCHEMA_VERSION}")
        series: dict[str, np.ndarray] = {}

        def visit(name: str, item: Any) -> None:
            if not isinstance(item, h5py.Dataset) or name.startswith(("fields/", "launch/", "weights/")):
                return
            if name.rpartition("/")[2] in SCALES:
                places.append(np.asarray(item))
            else:
                series[name] = np.asarray(item)

        places: list[np.ndarray] = []
        file.visititems(visit)
    return Run(path, attributes, json.loads(attributes["config"]), series, places[0] if places else np.empty(0))


def read_fields(path: Path) -> dict[str, np.ndarray]:
    """The fields of a run by name, coordinates included; {} where there are none.

    Raises:
        OSError: the file is missing or is no HDF5 file.
    """
    with h5py.File(path, "r") as file:
        return {name: np.asarray(item) for name, item in file.get("fields", {}).items()}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a run, a state_dict; {} where it has none (`save.weights`).

    Raises:
        OSError: the file is missing, is no HDF5 file, or is incomplete.
    """
    with h5py.File(path, "r") as file:
        if not file.attrs.get("complete"):
            raise IncompleteRecord(f"{path} is incomplete")
        return {name: torch.from_numpy(np.asarray(item)) for name, item in file.get("weights", {}).items()}


def has_weights(path: Path) -> bool:
    """Whether a record holds the weights of its run."""
    with h5py.File(path, "r") as file:
        return "weights" in file


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def read_runs(folder: Path) -> list[Run]:
    """All finished runs below a folder, ordered by variant and seed; the others are named on stderr.

    Raises:
        OSError: one of the files is unreadable, or none is finished; the message names it.
    """
    runs, unfinished = [], []
    for path in sorted(folder.glob("*/seed-*.h5")):
        try:
            runs.append(read_run(path))
        except IncompleteRecord:
            unfinished.append(f"{path.parent.name}/{path.stem}")
        except OSError as error:
            raise OSError(f"{path} cannot be read ({error}): delete it or run its experiment again") from None
    if unfinished and not runs:
        raise OSError(f"none of the runs in {folder} is finished: {', '.join(unfinished)}")
    if unfinished:
        print(f"left out, for they are not finished: {', '.join(unfinished)}", file=sys.stderr)
    return sorted(runs, key=lambda run: (run.attributes["variant"], run.attributes["seed"]))


def state_of(path: Path, config: RunConfig, data_digest: str, world_size: int, *, weights: bool = False) -> str:
    """Whether the run must be done: "finished", "unfinished", "missing", "changed", "unreadable" or "without weights".

    "unfinished" means that the run has checkpoints from which it goes on. "changed" means other settings, other data or
    another number of ranks: each changes the numbers. A label does not, nor does an override that says what holds for
    all variants. "without weights" is a finished run whose record should have them, by `weights`, and has none.
    """
    if any(run_folder(path).glob("step-*")):
        return "unfinished"
    state = _state_of_record(path, config, data_digest, world_size)
    return "without weights" if state == "finished" and weights and not has_weights(path) else state


def is_finished(path: Path, config: RunConfig, data_digest: str, world_size: int) -> bool:
    """Whether there is a complete record of this very run, whatever checkpoints there are."""
    return _state_of_record(path, config, data_digest, world_size) == "finished"


def _state_of_record(path: Path, config: RunConfig, data_digest: str, world_size: int) -> str:
    if not path.exists():
        return "missing"
    try:
        run = read_run(path)
        recorded = config.identity_of(run.config)
    except (OSError, KeyError, ValueError):
        return "unreadable"
    identity = (recorded, run.attributes.get("data_digest"), run.attributes.get("world_size"))
    return "finished" if identity == (config.identity(), data_digest, world_size) else "changed"
