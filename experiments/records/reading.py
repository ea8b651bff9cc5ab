"""Reads the HDF5 records of runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from experiments.records.hdf5 import ForeignRecord, IncompleteRecord, RecordError, opened
from experiments.records.series import ATTEMPTS, SCALES, SCHEMA_VERSION

if TYPE_CHECKING:
    import torch

OF_ALL = ("variant", "seed", "study", "data_source", "data_digest", "git_commit", "git_dirty", "diverged_epoch")
PARTS = ("experiment", "variant", "problem", "training")
"""Attributes and parts of the configuration that every record has."""


@dataclass(frozen=True)
class Run:
    """One recorded run.

    Attributes:
        attributes: of the root of the file at `path`.
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
    def diverged_iteration(self) -> int | None:
        """First iteration with a loss that is not finite, None for a run that ended well or has epochs."""
        iteration = int(self.attributes.get("diverged_iteration", -1))
        return iteration if iteration >= 0 else None

    @property
    def diverged(self) -> bool:
        return self.diverged_epoch is not None or self.diverged_iteration is not None

    @property
    def diverged_epoch(self) -> int | None:
        """First epoch with a loss that is not finite, None for a run that ended well."""
        epoch = int(self.attributes["diverged_epoch"])
        return epoch if epoch >= 0 else None


def read_run(path: Path) -> Run:
    """Reads one run.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableRecord: it cannot be opened here or now; it may be whole.
        DamagedRecord: its bytes are damaged.
        ForeignRecord: it is no record, or one of another schema.
        IncompleteRecord: the run is not finished.
    """
    series: dict[str, np.ndarray] = {}
    places: list[np.ndarray] = []

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or name.startswith(("fields/", "launch/", "weights/", f"{ATTEMPTS}/")):
            return
        if name.rpartition("/")[2] in SCALES:
            places.append(np.asarray(item))
        else:
            series[name] = np.asarray(item)

    with opened(path) as file:
        attributes = {name: _plain(value) for name, value in file.attrs.items()}
        config = _checked_config(path, attributes)
        file.visititems(visit)
    return Run(path, attributes, config, series, places[0] if places else np.empty(0))


def _checked_config(path: Path, attributes: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a record; refuses files that are no finished record of this schema."""
    if "schema_version" not in attributes or "config" not in attributes:
        raise ForeignRecord(f"{path} is an HDF5 file, but no record of this suite")
    if attributes["schema_version"] != SCHEMA_VERSION:
        raise ForeignRecord(f"{path} has schema version {attributes['schema_version']}, not {SCHEMA_VERSION}")
    if not attributes.get("complete"):
        raise IncompleteRecord(f"{path} is incomplete")
    config: dict[str, Any] = json.loads(attributes["config"])
    missing = [name for name in OF_ALL if name not in attributes]
    missing += [f"config.{name}" for name in PARTS if not isinstance(config, dict) or name not in config]
    if missing:
        raise ForeignRecord(f"{path} is no record of this suite: it has no {', '.join(missing)}")
    return config


def read_fields(path: Path) -> dict[str, np.ndarray]:
    """The fields of a run by name, coordinates included; {} where there are none."""
    with opened(path) as file:
        return {name: np.asarray(item) for name, item in file.get("fields", {}).items()}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a run, a state_dict; {} where it has none (`save.weights`)."""
    import torch  # here, because `list` reads records too, and is to answer before torch could be imported

    with opened(path) as file:
        _refuse_incomplete(file, path)
        return {name: torch.from_numpy(np.asarray(item)) for name, item in file.get("weights", {}).items()}


def read_attempts(path: Path) -> dict[str, np.ndarray]:
    """Every attempt of the acceleration by column, as "step" and "outcome"; {} where it has none (`save.attempts`)."""
    with opened(path) as file:
        _refuse_incomplete(file, path)
        columns = file.get(ATTEMPTS, {}).items()
        return {name: item.asstr()[:] if name == "outcome" else np.asarray(item) for name, item in columns}


def _refuse_incomplete(file: h5py.File, path: Path) -> None:
    if not file.attrs.get("complete"):
        raise IncompleteRecord(f"{path} is incomplete")


def has_groups(path: Path, names: Collection[str]) -> bool:
    """Whether a record has all these groups, as "weights"."""
    with opened(path) as file:
        return all(name in file for name in names)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_runs(folder: Path, note: Callable[[str], None] = say) -> list[Run]:
    """Reads all finished runs below `results/<experiment>/<scale>`, ordered by variant and seed.

    A record that cannot be read hides no other one: `note` gets a line about it. Those of unfinished runs are named on
    stderr, because they are no fault. RecordError where no run is left.
    """
    runs: list[Run] = []
    unfinished: list[str] = []
    faults: list[str] = []
    for path in sorted(folder.glob("*/seed-*.h5")):
        try:
            run = read_run(path)
            if runs and run.config["experiment"] != runs[0].config["experiment"]:
                raise ForeignRecord(f"{path} is of another experiment than {runs[0].path}")
            runs.append(run)
        except IncompleteRecord:
            unfinished.append(f"{path.parent.name}/{path.stem}")
        except OSError as error:
            faults.append(str(error))
    if not runs:
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise RecordError(f"none of the records in {folder} can be read: {faults[0]}{more}")
        raise RecordError(f"none of the runs in {folder} is finished: {', '.join(unfinished)}")
    for fault in faults:
        note(f"left out: {fault}")
    if unfinished:
        say(f"left out, because they are not finished: {', '.join(unfinished)}")
    return sorted(runs, key=lambda run: (run.attributes["variant"], run.attributes["seed"]))


def first_run_of(folder: Path) -> Run | None:
    """The first run of a folder that can be read, which says what kind all of them are; None where there is none."""
    for path in sorted(folder.glob("*/seed-*.h5")):
        with suppress(OSError):
            return read_run(path)
    return None
