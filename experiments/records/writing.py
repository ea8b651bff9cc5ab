"""Writes the HDF5 records of runs: one file a run, whole at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_loaders.files import replacing
from experiments.distributed.ranks import Ranks
from experiments.records.hdf5 import RecordError, opened
from experiments.records.provenance import attributes_of, place_of
from experiments.records.reading import read_run
from experiments.records.series import ATTEMPTS, SCALES, description_of, description_of_attempt
from experiments.settings.run_config import RunConfig
from experiments.training.problem import Field, Problem
from experiments.training.result import Result


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
    temporary file of a killed run. OSError where the folder or the file cannot be written.

    Args:
        path: target file; its folder is made.
        config: the run's configuration.
        problem: for the data's source and digest.
        result: series by epoch.
        ranks: for the world size.
        start, end: of the run, UTC.
        complete: whether the run is finished.
        restart_count: how often it was taken up again.
        places: of the ranks, see `experiments.distributed.devices.binding`.
    """

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, opened(temporary, "w") as file:
        for name, values in result.series.items():
            _write_series(file, name, values, result.iterations)
        _write_fields(file, result.fields)
        if result.weights:
            weights = file.create_group("weights", track_order=True)  # that of the state_dict
            for name, value in result.weights.items():
                weights.create_dataset(name, data=value.numpy())
        _write_attempts(file, result.attempts)
        if places:  # a dataset, because attributes have no room for a thousand ranks
            file.create_dataset("launch/binding", data=json.dumps([*places]))
        file.attrs.update(attributes_of(config, problem, result, ranks, start, end, places))
        file.attrs["restart_count"] = restart_count
        file.attrs["complete"] = complete


def note_place(path: Path, config: RunConfig) -> None:
    """Brings what a finished record says of its label and its place among the variants up to date."""
    attributes = read_run(path).attributes
    wanted = {"label": config.variant.label, "config": config.as_json(), **place_of(config)}
    if all(attributes.get(name) == value for name, value in wanted.items()):
        return

    with replacing(path) as temporary:
        shutil.copyfile(path, temporary)
        with opened(temporary, "r+") as file:
            file.attrs.update(wanted)


def probe_folder(folder: Path) -> None:
    """Makes a folder of records and tries a small HDF5 file there, before any training; OSError where that fails."""
    path = folder / f".probe-{os.getpid()}.h5"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as temporary, opened(temporary, "w") as file:
                file["x"] = np.arange(3)
            with opened(path) as file:
                file["x"][:]
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        cause = str(error) if isinstance(error, RecordError) else error.strerror or str(error)
        raise OSError(f"the results folder {folder} cannot be written: {cause}") from error


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
    dataset.attrs["units"], dataset.attrs["long_name"] = description_of(name, iterations is not None)


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


def _write_attempts(file: h5py.File, attempts: Mapping[str, np.ndarray] | None) -> None:
    if attempts is None:
        return
    group = file.create_group(ATTEMPTS)
    for name, column in attempts.items():
        dataset = group.create_dataset(name, data=column, dtype=h5py.string_dtype() if name == "outcome" else None)
        dataset.attrs["units"], dataset.attrs["long_name"] = description_of_attempt(name)
    group["step"].make_scale("step")
    for name in attempts.keys() - {"step"}:
        group[name].dims[0].attach_scale(group["step"])
