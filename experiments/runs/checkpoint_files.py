"""The files of checkpoints in a folder: their names, how they are written, checked and read, and which of them stay.

step-0000001234.pt             torch.save of plain values and tensors (`checkpoint_state`); nothing in it is executed
.step-0000001234.pt-....tmp    is being written, or was left behind by a process that was killed
"""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch

from data_loaders.files import replacing
from experiments.records.status import CHECKPOINT_NAME
from experiments.runs.checkpoint_state import State

FORMAT = 3
KEYS = {"format", "identity", "step", "shared", "own"}
BLOCK = 1 << 22  # bytes written at once


def name_of(step: int) -> str:
    """`step-0000001234.pt`; names are in the order of their steps."""
    return f"step-{step:010d}.pt"


def _step_of(name: str) -> int:
    return int(name[5:15])


def names_of_checkpoints(folder: Path) -> list[str]:
    """Newest first; OSError where the folder cannot be read, while a missing one has no checkpoints."""
    return sorted(filter(CHECKPOINT_NAME.fullmatch, _names_in(folder)), reverse=True)


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def remove_checkpoints(folder: Path) -> None:
    """Removes all checkpoints of a folder, those of former versions too, and what killed processes left."""
    for name in _names_in(folder):
        path = folder / name
        if not name.startswith("step-"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp"):
        path.unlink()


class _File(io.FileIO):
    """Keeps the OSError of a write, as that of a full disk, because torch hides it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write(path: Path, content: State) -> None:
    """Writes a file whole or not at all, synced; what killed processes left in the folder is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    with replacing(path) as temporary:
        raw = _File(temporary, "xb")
        try:
            with io.BufferedWriter(raw, BLOCK) as file:
                torch.save(content, file)
        except RuntimeError:
            if raw.error is None:
                raise
            raise raw.error from None


def read(path: Path) -> State:
    """Compares the checksums of a file and reads it, executing nothing; ValueError if it is not a valid checkpoint."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            file.seek(0)
            content = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror or error})") from None
    except MemoryError:  # the file may be good
        raise
    except Exception as error:  # zipfile and torch raise whatever the bytes lead to
        raise ValueError(f"{path.name} is damaged or refused ({_short(error)})") from None
    if damaged:
        raise ValueError(f"{path.name} is damaged: the checksum of {damaged} is wrong")
    version = content.get("format") if isinstance(content, dict) else None
    if version is not None and version != FORMAT:
        raise ValueError(f"{path.name} has format {version}, and this program reads format {FORMAT}")
    if not isinstance(content, dict) or set(content) != KEYS or not isinstance(content["own"], list):
        raise ValueError(f"{path.name} holds something else than a checkpoint")
    return cast(State, content)


def identity_of(path: Path) -> str:
    """The identity in a checkpoint, whose tensors are not read; ValueError where it cannot be read."""
    try:
        return str(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["identity"])
    except Exception as error:
        raise ValueError(f"{path.name} is damaged or refused ({_short(error)})") from None


def _short(error: BaseException) -> str:
    """What is wrong with the bytes, in one line; torch's own text begins with how to load them all the same."""
    text = str(error)
    if asked := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {asked[1]}"
    if inner := re.search(r"WeightsUnpickler error: (.+)", text):
        return inner[1][:200]
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def prune(folder: Path, present: str, keep: int, unusable: Collection[str] = ()) -> None:
    """Removes the checkpoints that are older than the newest `keep`, not counting those known to be `unusable`.

    The `present` one, which was just written, replaces one of its step that a former version marked as the best. Later
    ones were not taken when the run was continued: they do not count, and they stay, because they may show why.
    """
    names = [name for name in names_of_checkpoints(folder) if name != present]
    replaced = [name for name in names if _step_of(name) == _step_of(present)]
    older = [name for name in names if _step_of(name) < _step_of(present)]
    kept = [present, *(name for name in older if name not in unusable)][:keep]
    oldest = _step_of(kept[-1]) if len(kept) == keep else 0
    for name in (*replaced, *(name for name in older if _step_of(name) < oldest)):
        os.unlink(folder / name)
