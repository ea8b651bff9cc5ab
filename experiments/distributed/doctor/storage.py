"""The folder of results: all ranks see it, HDF5 files can be written, and there is room."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import h5py
import torch.distributed as dist

from experiments.distributed.doctor.facts import Finding, who
from experiments.distributed.polling import Deadline
from experiments.distributed.ranks import Ranks
from experiments.distributed.together import gather

TOKEN_SECONDS = 10.0
LITTLE_SPACE_BYTES = 2**30
WITHOUT_LOCKS = "export HDF5_USE_FILE_LOCKING=FALSE in the job script, before Python starts"


def probe_folder(results: Path) -> None:
    """Makes the folder of results and writes to it; raises OSError with one sentence if that fails."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise OSError(f"the results folder {results} cannot be written: {error.strerror or error}") from None


def shared_folder(ranks: Ranks, results: Path) -> list[Finding]:
    """Writes a token on rank 0 that all others must read, because a folder of one node alone shows only in this way."""
    if ranks.world_size == 1:
        return []
    token = secrets.token_hex(8)
    path = results / f".doctor-{ranks.job_id or os.getpid()}"
    box: list[Any] = [token, str(path)]
    if ranks.rank == 0:
        with contextlib.suppress(OSError):
            path.write_text(token)
    dist.broadcast_object_list(box, src=0)
    seen, end = False, Deadline(TOKEN_SECONDS)
    while not seen and end.pause():
        with contextlib.suppress(OSError):
            seen = Path(box[1]).read_text() == box[0]
    blind = [rank for rank, found in enumerate(gather(ranks, seen)) if not found]
    if ranks.rank == 0:
        path.unlink(missing_ok=True)
    if not blind:
        return [Finding("shared folder", f"all ranks read in {results}")]
    cure = "use a folder that all nodes see, with --results"
    return [Finding("shared folder", f"{who(blind, ranks.world_size)} cannot read in {results}", cure, bad=True)]


def storage(results: Path) -> list[Finding]:
    """Reports whether HDF5 files can be written where the results go, and the free space there."""
    folder = results if results.exists() else Path()
    free = shutil.disk_usage(folder).free
    cure = "make room, or choose another folder with --results" if free < LITTLE_SPACE_BYTES else ""
    space = Finding("free space", f"{free / 2**30:.1f} GiB in {folder.resolve()}", cure, bad=bool(cure))
    return [_hdf5(folder), space]


def _hdf5(folder: Path) -> Finding:
    """Tries a file without locks, as the suite opens its records, and then one as other programs open them."""
    try:
        _probe_hdf5(folder, locking=False)
    except OSError as error:
        cure = WITHOUT_LOCKS if "lock file" in str(error) else "choose another folder with --results"
        return Finding("HDF5 files", f"{folder}: {_reason(error)}", cure, bad=True)
    try:
        return Finding("HDF5 files", f"files can be written; {_probe_hdf5(folder, locking=None)}")
    except OSError as error:
        found = f"files can be written without locks, but not with them: {_reason(error)}"
        return Finding("HDF5 files", found, f"{WITHOUT_LOCKS}, if other programs open records there")


def _reason(error: OSError) -> str:
    """Returns the system's words, whose number HDF5 may give in its text alone."""
    number = error.errno or int((re.search(r"errno = (\d+)", str(error)) or ["", "0"])[1])
    return os.strerror(number) if number else str(error)


def _probe_hdf5(folder: Path, locking: bool | None) -> str:
    """Writes a file, with HDF5's default of a lock where `locking` is None; says if a second writer is refused."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as inside:
        path = Path(inside) / "probe.h5"
        with h5py.File(path, "w", locking=locking) as file:
            file["x"] = 1
            file.flush()
            with path.open("rb") as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return "a second writer is refused"
    return "no lock is taken, so nothing refuses a second writer"
