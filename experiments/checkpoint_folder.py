"""One checkpoint on disk: its files, their checksums, the manifest that ends it, and the folders around it.

    <folder>/step-0000001234/shared.pt          what is the same on every rank, written by rank 0
                             rank-00000.pt ...  what is of one rank
                             sharded/           DTensors, written by torch.distributed.checkpoint
                             manifest.json      written last: sizes and checksums of the files above

A folder whose name does not begin with `step-` is no checkpoint: names beginning with `.tmp-` are being written, those
with `.old-` are being removed, and both may be left behind by a process that was killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import checkpoint_files as files
from experiments.state import decode, shards_in

FORMAT = 1
MANIFEST = "manifest.json"

_NAME = re.compile(r"step-(\d{10,})(?:\.(\d+))?")
_LEFTOVER = re.compile(r"\.(tmp|old)-step-.*")
_FILE = re.compile(r"shared\.pt|rank-\d{5,}\.pt|sharded/\.metadata|sharded/__\d+_\d+\.distcp")


class Finding(NamedTuple):
    """What an audit says of a folder; `problem` is "" for a good checkpoint."""

    name: str
    step: int | None
    problem: str


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def step_of(name: str) -> int:
    """The step of a checkpoint's folder."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def names_of_checkpoints(folder: Path) -> list[str]:
    """Newest first; a step that was saved again has a folder with a higher number after the point.

    Raises:
        OSError: the folder cannot be read; a missing one has no checkpoints.
    """
    try:
        matches = [_NAME.fullmatch(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    found = [(int(match[1]), int(match[2] or 0), match[0]) for match in matches if match is not None]
    return [name for _, _, name in sorted(found, reverse=True)]


def leftovers_in(folder: Path) -> list[str]:
    """Names of what dead processes left behind."""
    return sorted(name for name in os.listdir(folder) if _LEFTOVER.fullmatch(name))


# Writing


def make_temporary(folder: Path, step: int, with_shards: bool) -> Path:
    """Makes a new folder for a checkpoint of a step and removes what dead processes left behind."""
    files.kill_point("before temporary")
    folder.mkdir(parents=True, exist_ok=True)
    for name in leftovers_in(folder):
        shutil.rmtree(folder / name, ignore_errors=True)
    temporary = folder / f".tmp-step-{step:010d}-{secrets.token_hex(4)}"
    temporary.mkdir()
    if with_shards:
        (temporary / files.SHARDED).mkdir()
    files.kill_point("temporary made")
    return temporary


def publish(temporary: Path, manifest: Mapping[str, Any]) -> Path:
    """Ends a checkpoint with its manifest and gives it its name.

    Args:
        temporary: its folder; all files are written and synced.
        manifest: see `new_manifest`.

    Raises:
        OSError: the manifest cannot be written or the folder not be renamed.
    """
    files.kill_point("before manifest")
    with open(temporary / MANIFEST, "xb") as file:
        file.write(json.dumps({**manifest, "checksum": checksum_of(manifest)}, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    for folder in (temporary / files.SHARDED, temporary):
        if folder.exists():
            _sync_folder(folder)
    files.kill_point("manifest synced")
    parent = temporary.parent
    names = names_of_checkpoints(parent)
    name = first = f"step-{manifest['step']:010d}"
    number = 0
    while name in names:  # the step is saved again: the old folder stays until this one is in its place
        number += 1
        name = f"{first}.{number}"
    os.rename(temporary, parent / name)
    files.kill_point("renamed")
    _sync_folder(parent)
    files.kill_point("published")
    return parent / name


def new_manifest(
    step: int, world_size: int, identity: str, architecture: str, best: bool, entries: Mapping[str, files.FileEntry]
) -> dict[str, Any]:
    """What the manifest says; `architecture` is a hash of the names, shapes and dtypes of all shared tensors."""
    return {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "identity": identity,
        "architecture": architecture,
        "best": best,
        "torch_version": str(torch.__version__),
        "written_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "files": {name: entry._asdict() for name, entry in sorted(entries.items())},
    }


KEYS = frozenset(new_manifest(0, 1, "", "", False, {}))


def checksum_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(handle)


def prune(folder: Path, step: int, keep: int, unusable: Collection[str] = ()) -> None:
    """Removes old checkpoints up to a step: those older than the newest `keep`, and not the newest one marked best.

    Later ones were not taken when the run was continued, so they count for nothing, and somebody may want to know why.

    Args:
        folder: of the checkpoints.
        step: that of the present one.
        keep: number that stay.
        unusable: names of checkpoints known to be damaged, which do not count among those.

    Raises:
        OSError: a folder cannot be removed.
    """
    names = [name for name in names_of_checkpoints(folder) if step_of(name) <= step]
    kept = [name for name in names if name not in unusable][:keep]
    old = names[names.index(kept[-1]) + 1 :] if len(kept) == keep else []
    best = next((name for name in names if _is_best(folder / name)), None)
    for name in old:
        if name == best:
            continue
        doomed = folder / f".old-{name}-{secrets.token_hex(4)}"
        os.rename(folder / name, doomed)  # half a checkpoint never has the name of one
        files.kill_point("pruning")
        shutil.rmtree(doomed)
    files.kill_point("pruned")


def _is_best(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder)["best"])
    except (OSError, ValueError):
        return False


# Reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged or of another format; the message is the reason.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        checksum = manifest.pop("checksum")
        version = manifest["format"]
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if checksum != checksum_of(manifest):
        raise ValueError(f"{MANIFEST} is damaged: its checksum is wrong")
    if version != FORMAT:
        raise ValueError(f"it has format {version}, and this program reads format {FORMAT}")
    if set(manifest) != KEYS or not isinstance(manifest["files"], dict):
        raise ValueError(f"{MANIFEST} lacks what one of format {FORMAT} says")
    for name, entry in manifest["files"].items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"{MANIFEST} names the file {name!r}, which no checkpoint has")
        if set(entry) != set(files.FileEntry._fields):
            raise ValueError(f"{MANIFEST} has a wrong entry for {name}")
    return dict(manifest)


def verify_files(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compares files with the manifest.

    Raises:
        ValueError: a file is missing or differs; the message names the first one.
    """
    for name in names:
        with _comparing(folder, manifest, name) as compare:
            compare(files.entry_of(folder / name))


def read_verified(folder: Path, manifest: Mapping[str, Any], name: str) -> files.Content:
    """Reads a file of `write_state`, once: what is compared with the manifest is what is used.

    It takes the memory of the file while the tensors are made, twice their size in all.

    Raises:
        ValueError: the file is missing, differs, or is refused; the message names it.
    """
    with _comparing(folder, manifest, name) as compare:
        data = (folder / name).read_bytes()
        compare(files.FileEntry(len(data), zlib.crc32(data)))
    return files.read_state(data, name)


@contextmanager
def _comparing(folder: Path, manifest: Mapping[str, Any], name: str) -> Iterator[Callable[[files.FileEntry], None]]:
    """What to tell the entry that was found; a size that differs is found without reading."""
    if name not in manifest["files"]:
        raise ValueError(f"{name} is not in {MANIFEST}")
    expected = files.FileEntry(**manifest["files"][name])

    def compare(found: files.FileEntry) -> None:
        if found != expected:
            raise ValueError(f"{name} is damaged: its checksum is {found.crc32:08x} instead of {expected.crc32:08x}")

    try:
        num_bytes = os.stat(folder / name).st_size
        if num_bytes != expected.num_bytes:
            raise ValueError(f"{name} has {num_bytes} bytes instead of {expected.num_bytes}")
        yield compare
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from None


# Auditing


def verify_folder(folder: Path) -> list[Finding]:
    """Audits all checkpoints of a folder, newest first: checksums, contents, strange and left-over files.

    Raises:
        OSError: the folder cannot be read.
    """
    folder = Path(folder)
    findings = []
    for name in names_of_checkpoints(folder):
        try:
            problem = _problem_of(folder / name)
        except (OSError, ValueError) as error:
            problem = str(error)
        findings.append(Finding(name, step_of(name), problem))
    if folder.exists():
        left = [Finding(name, None, "left behind by a process that was killed") for name in leftovers_in(folder)]
        findings += left
    return findings


def _problem_of(folder: Path) -> str:
    manifest = read_manifest(folder)
    states = [name for name in manifest["files"] if name.endswith(".pt")]
    verify_files(folder, manifest, [name for name in manifest["files"] if name not in states])
    for name in states:
        content = read_verified(folder, manifest, name)
        decode(content.tree, content.tensors, {shard.name: torch.empty(0) for shard in shards_in(content.tree)})
    if files.METADATA in manifest["files"]:
        files.read_metadata(folder, manifest["files"])
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    strange = found - set(manifest["files"]) - {MANIFEST}
    return f"{min(strange)} is not in {MANIFEST}" if strange else ""


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
