import json
import os
from dataclasses import replace
from datetime import datetime, timezone

import h5py
import numpy as np
import pytest
from suite_cases import problem, result, run_config

from experiments.distributed.ranks import Ranks
from experiments.records import provenance, series
from experiments.records.hdf5 import IncompleteRecord
from experiments.records.provenance import git_state
from experiments.records.reading import read_run, read_runs
from experiments.records.status import run_path, state_of
from experiments.records.writing import note_place, write_run

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def write(results, config=None, outcome=None, source="csv", digest="abc"):
    config = config or run_config()
    path = run_path(results, config)
    outcome = outcome or result([3.0, 2.0, 1.0], acceleration__rejected_loss=[0, 1, 2], acceleration__odd=[1, 2, 3])
    write_run(path, config, problem(source, digest), outcome, Ranks(), START, START)
    return path


def test_a_run_is_read_as_it_was_written(tmp_path):
    path = write(tmp_path)
    assert path == tmp_path / "graduate_admissions" / "test" / "sgd" / "seed-0.h5"
    run = read_run(path)
    assert run.series["metrics/train/loss"].tolist() == [3, 2, 1]
    assert run.series["metrics/validation/loss"].tolist() == [6, 4, 2]
    assert run.config == json.loads(run_config().as_json())
    assert run.diverged_epoch is None and not run.diverged
    assert run.places.tolist() == [0, 1, 2]
    attributes = run.attributes
    assert attributes["data_source"] == "csv" and attributes["seed"] == 0 and attributes["world_size"] == 1
    assert attributes["start_utc"] == "2026-01-02T03:04:05+00:00"
    for name in ("git_commit", "git_dirty", "torch_version", "aadl_version", "hosts", "devices", "launcher", "label",
                 "scheduler", "job_id", "restart_count", "schema_version", "num_threads"):  # fmt: skip
        assert name in attributes
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays


def test_where_the_ranks_ran_is_recorded_and_is_no_series(tmp_path):
    config, places = run_config(), [{"rank": rank, "host": f"n{rank}"} for rank in range(2)]
    path = run_path(tmp_path, config)
    write_run(path, config, problem(), result([3.0, 2.0]), Ranks(0, 2), START, START, places=places)
    run = read_run(path)
    assert run.series.keys() == result([3.0, 2.0]).series.keys() and run.attributes["hosts"] == "n0, n1"
    with h5py.File(path) as file:
        assert json.loads(file["launch/binding"][()]) == places


def test_every_series_says_what_it_is(tmp_path):
    with h5py.File(write(tmp_path)) as file:
        assert next(reversed(list(file.attrs))) in file.attrs and file.attrs["complete"]
        assert {"metrics", "timing", "acceleration"} == set(file)
        names = []
        file.visit(names.append)
        for name in names:
            if isinstance(file[name], h5py.Dataset):
                assert file[name].attrs["units"] and file[name].attrs["long_name"], name
                if not name.endswith("epoch"):
                    assert file[name].dims[0][0] == file[name].parent["epoch"], name
        assert series.DESCRIPTIONS["acceleration/condition_number"][1].endswith("residual differences DF")
        assert "GradScaler" in series.DESCRIPTIONS["acceleration/skipped_steps"][1]
        assert "loss" in file["acceleration/rejected_loss"].attrs["long_name"]


def test_complete_is_written_last(tmp_path, monkeypatch):
    order = []
    original = h5py.AttributeManager.create
    monkeypatch.setattr(
        h5py.AttributeManager,
        "create",
        lambda self, name, *args, **kwargs: order.append(name) or original(self, name, *args, **kwargs),
    )
    write(tmp_path)
    assert order[-1] == "complete" and order.count("complete") == 1


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write(tmp_path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, outcome=result([9.0, 9.0]))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_diverged_run_is_recorded(tmp_path):
    run = read_run(write(tmp_path, outcome=result([1.0, np.inf, np.nan], diverged_epoch=1)))
    assert run.diverged_epoch == 1 and run.diverged and run.diverged_iteration is None
    assert np.isnan(run.series["metrics/train/loss"][2])


def test_what_must_be_run_again(tmp_path):
    config = run_config()
    path = run_path(tmp_path, config)
    assert state_of(path, config, "abc", 1) == "missing"
    write(tmp_path)
    assert state_of(path, config, "abc", 1) == "finished"
    assert state_of(path, config, "abc", 2) == "changed"
    assert state_of(path, config, "other data", 1) == "changed"
    assert state_of(path, run_config(epochs=11), "abc", 1) == "changed"
    with h5py.File(path, "r+") as file:
        del file.attrs["complete"]
    assert state_of(path, config, "abc", 1) == "damaged"
    with pytest.raises(IncompleteRecord, match=r"seed-0\.h5 is incomplete"):
        read_run(path)
    path.write_bytes(b"cut short")
    assert state_of(path, config, "abc", 1) == "damaged"
    with pytest.raises(OSError, match=r"none of the records in .*seed-0\.h5 is damaged .file signature not found."):
        read_runs(path.parent.parent)


def test_another_label_is_no_other_run_and_is_brought_up_to_date(tmp_path):
    config = run_config()
    path = write(tmp_path)
    renamed = replace(config, variant=config.variant.model_copy(update={"label": "SGD, plain"}))
    assert state_of(path, renamed, "abc", 1) == "finished"
    assert config.identity() == renamed.identity() != run_config(epochs=11).identity()
    before = path.stat().st_mtime_ns
    note_place(path, config)
    assert path.stat().st_mtime_ns == before  # nothing to do
    note_place(path, renamed)
    run = read_run(path)
    assert run.attributes["label"] == run.config["variant"]["label"] == "SGD, plain"
    assert run.config == json.loads(renamed.as_json())
    assert state_of(path, config, "abc", 1) == state_of(path, renamed, "abc", 1) == "finished"


def test_the_environment_is_recorded_by_an_allow_list(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET_TOKEN", "not-for-the-record")
    path = write(tmp_path)
    assert json.loads(read_run(path).attributes["environment"])["OMP_NUM_THREADS"] == "1"
    assert b"SECRET_TOKEN" not in path.read_bytes() and b"not-for-the-record" not in path.read_bytes()


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", missing)
    git_state.cache_clear()
    try:
        assert git_state() == ("unknown", False)
    finally:
        git_state.cache_clear()


def test_the_commit_of_a_checkout_of_another_account_is_known(monkeypatch):
    git_state.cache_clear()
    before = git_state()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    git_state.cache_clear()
    assert git_state() == before
