"""Records that cannot be opened, are damaged, or belong to somebody else."""

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from paths import ROOT
from suite_cases import run_config
from test_record import write

from experiments.records import hdf5
from experiments.records.hdf5 import DamagedRecord, ForeignRecord, RecordError, UnreadableRecord
from experiments.records.reading import read_run, read_runs
from experiments.records.status import is_finished, run_path, state_of
from experiments.records.writing import probe_folder

LOCKED = "Unable to synchronously open file (unable to lock file, errno = {}, error message = 'x')"
IN_USE = "Unable to synchronously open file (file is already open for write (may use <h5clear file> to clear flags))"
DISK = "Can't synchronously read data (file read failed: time = now, errno = 5, error message = 'x')"
OPENED = "Unable to synchronously open file (unable to open file: name = 'x', errno = 13, error message = 'x')"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (BlockingIOError(11, LOCKED.format(11)), UnreadableRecord, "is locked by another program, .*LOCKING=FALSE"),
        (OSError(37, LOCKED.format(37)), UnreadableRecord, "cannot be locked .No locks available.*LOCKING=FALSE"),
        (OSError(524, LOCKED.format(524)), UnreadableRecord, "cannot be locked .*LOCKING=FALSE"),
        (OSError(5, LOCKED.format(5)), UnreadableRecord, "cannot be locked .Input/output error.*LOCKING=FALSE"),
        (OSError(IN_USE), UnreadableRecord, "is open for writing in another program"),
        (PermissionError(13, OPENED), UnreadableRecord, "is closed to this account .Permission denied."),
        (OSError(DISK), UnreadableRecord, "cannot be read .Input/output error.; it may be whole"),
        (OSError(errno.ESTALE, "errno = 116"), UnreadableRecord, "cannot be read .Stale file handle"),
        (OSError("Unable to open file (truncated file: eof = 96)"), DamagedRecord, "is damaged .truncated file"),
        (RuntimeError("Unable to get link info (bad object header version number)"), DamagedRecord, "is damaged .bad"),
        (KeyError("Unable to open object (wrong B-tree signature)"), DamagedRecord, "is damaged .wrong B-tree"),
    ],
)
def test_each_cause_is_a_sentence_and_a_good_record_is_not_made_again(tmp_path, monkeypatch, error, kind, text):
    path = write(tmp_path)
    original = h5py.File

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(hdf5.h5py, "File", fail)
    with pytest.raises(kind, match=rf"seed-0\.h5 {text}"):
        read_run(path)
    if kind is DamagedRecord:
        assert state_of(path, run_config(), "abc", 1) == "damaged"
        assert not is_finished(path, run_config(), "abc", 1)
    else:
        with pytest.raises(kind, match=text):
            state_of(path, run_config(), "abc", 1)
        assert is_finished(path, run_config(), "abc", 1)  # nothing replaces it on the way
    monkeypatch.setattr(hdf5.h5py, "File", original)
    assert state_of(path, run_config(), "abc", 1) == "finished"


def test_whatever_bits_are_lost_nothing_but_a_record_error_is_raised(tmp_path):
    path = write(tmp_path)
    whole, series = path.read_bytes(), read_run(path).series
    chance, noticed = random.Random(1), 0
    for _ in range(150):
        data = bytearray(whole)
        start = chance.randrange(len(data))
        data[start : start + 64] = chance.randbytes(len(data[start : start + 64]))
        path.write_bytes(data if chance.random() < 0.7 else data[: start + 1])
        try:
            read_run(path)
        except RecordError as error:
            noticed += 1
            assert str(path) in str(error)
    assert noticed > 20
    path.write_bytes(whole)
    assert all(np.array_equal(values, series[name]) for name, values in read_run(path).series.items())


def foreign(path, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["x"] = 1
        file.attrs.update(attributes)
    return path


def test_what_somebody_else_wrote_is_named_and_not_replaced(tmp_path):
    path = foreign(run_path(tmp_path, run_config()))
    with pytest.raises(ForeignRecord, match=r"seed-0\.h5 is an HDF5 file, but no record of this suite"):
        state_of(path, run_config(), "abc", 1)
    for version in (0, 9):
        foreign(path, config="{}", schema_version=version, complete=True)
        with pytest.raises(ForeignRecord, match=f"has schema version {version}, not 1"):
            state_of(path, run_config(), "abc", 1)


def cut(path, attribute=None, part=None):
    """Takes an attribute, or a part of its configuration, from a record."""
    with h5py.File(path, "r+") as file:
        if part is None:
            del file.attrs[attribute]
        else:
            config = json.loads(file.attrs["config"])
            del config[part]
            file.attrs["config"] = json.dumps(config)
    return path


@pytest.mark.parametrize("lost", [{"attribute": "git_commit"}, {"attribute": "diverged_epoch"}, {"part": "training"}])
def test_a_record_that_lacks_something_is_named_and_neither_replaced_nor_hides_another(tmp_path, lost):
    good = write(tmp_path)
    stray = cut(shutil.copy(good, good.parent / "seed-1.h5"), **lost)
    message = f"{stray} is no record of this suite: it has no {lost.get('attribute') or 'config.training'}"
    notes = []
    assert [run.path for run in read_runs(good.parent.parent, notes.append)] == [good]
    assert notes == [f"left out: {message}"]
    for call in (state_of, is_finished):  # an error, where "changed" and False let a run replace it
        with pytest.raises(ForeignRecord, match=message):
            call(stray, run_config(), "abc", 1)


def test_a_link_whose_file_is_elsewhere_is_named_and_not_replaced(tmp_path):
    """git-annex and DVC keep links into a store that need not have all files."""
    path = write(tmp_path)
    store = tmp_path / "store.h5"
    path.rename(store)
    path.symlink_to(store)
    assert state_of(path, run_config(), "abc", 1) == "finished"
    store.unlink()
    with pytest.raises(UnreadableRecord, match=r"seed-0\.h5 is a link to .*store\.h5, which is not here: fetch it"):
        state_of(path, run_config(), "abc", 1)


def test_errors_of_the_disk_while_a_record_is_written_have_their_number(tmp_path):
    """HDF5 hands on a full disk as a RuntimeError when the file is closed; the run may go on without that version."""
    for error in (
        RuntimeError("Can't decrement id ref count (errno = 28, error message = 'x')"),
        OSError("errno = 122"),
    ):
        with pytest.raises(OSError, match=r"a\.h5") as caught, hdf5.opened(tmp_path / "a.h5", "w"):
            raise error
        assert caught.value.errno == int(str(error).partition("errno = ")[2].partition(",")[0])


def test_a_record_that_cannot_be_read_hides_no_other_one(tmp_path, capsys):
    good = write(tmp_path)
    folder = good.parent.parent
    for number, content in enumerate((b"", b"cut short")):
        (good.parent / f"seed-{number + 1}.h5").write_bytes(content)
    foreign(good.parent / "seed-3.h5")
    with h5py.File(shutil.copy(good, good.parent / "seed-4.h5"), "r+") as file:
        del file.attrs["complete"]
    notes = []
    assert [run.path for run in read_runs(folder, notes.append)] == [good]
    assert len(notes) == 3 and all(f"seed-{number + 1}.h5 is" in note for number, note in enumerate(notes))
    assert capsys.readouterr().err == "left out, because they are not finished: sgd/seed-4\n"


def test_a_record_of_another_experiment_is_named_and_left_out(tmp_path):
    good = write(tmp_path)
    stray = shutil.copy(good, good.parent / "seed-1.h5")
    with h5py.File(stray, "r+") as file:
        file.attrs["config"] = file.attrs["config"].replace("graduate_admissions", "burgers_2d")
    notes = []
    assert [run.path for run in read_runs(good.parent.parent, notes.append)] == [good]
    assert notes == [f"left out: {stray} is of another experiment than {good}"]


def test_a_folder_is_probed_with_a_file(tmp_path, monkeypatch):
    probe_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the results folder .*file cannot be written: "):
        probe_folder(tmp_path / "file")
    monkeypatch.setattr(hdf5.h5py, "File", lambda *_, **__: (_ for _ in ()).throw(OSError(37, LOCKED.format(37))))
    with pytest.raises(OSError, match=r"new cannot be written: .*No locks available.*HDF5_USE_FILE_LOCKING=FALSE"):
        probe_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


WITHOUT_LOCKS = """
    #include <errno.h>
    #include <stdlib.h>
    int flock(int handle, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""
SCRIPT = """
    import sys
    from pathlib import Path
    from experiments.records.hdf5 import UnreadableRecord
    from experiments.records.reading import read_run
    from experiments.records.writing import probe_folder
    results, path = map(Path, sys.argv[1:])
    for what in (lambda: probe_folder(results), lambda: read_run(path)):
        try:
            what()
            print("works")
        except OSError as error:
            print(error)
"""


@pytest.mark.slow
def test_locks_are_not_needed(tmp_path):
    """A real HDF5 file on a file system without locks, and one that another program has locked."""
    path = write(tmp_path)
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for a file system without locks")
    (tmp_path / "flock.c").write_text(textwrap.dedent(WITHOUT_LOCKS))
    library = tmp_path / "flock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "flock.c")], check=True)

    def printed(**variables):
        environment = {name: value for name, value in os.environ.items() if name != "HDF5_USE_FILE_LOCKING"}
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "probed"), str(path)]
        return subprocess.run(
            command, env=environment | variables, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    for number in ("37", "524"):
        preload = {"LD_PRELOAD": str(library), "FLOCK_ERRNO": number}
        assert printed(**preload) == ["works", "works"]
    lines = printed(**preload, HDF5_USE_FILE_LOCKING="BEST_EFFORT")
    assert len(lines) == 2 and all("export HDF5_USE_FILE_LOCKING=FALSE" in line for line in lines)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert printed() == ["works", "works"]
        assert "seed-0.h5 is locked by another program" in printed(HDF5_USE_FILE_LOCKING="TRUE")[1]
