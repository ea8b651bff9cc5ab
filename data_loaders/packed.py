"""Packed sets (see data_loaders.shards): read, check every byte, sum up, copy to the storage of a node."""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_loaders.images import ImageError
from data_loaders.shards import (
    SHARD_VERSION,
    SPLITS,
    PackedNames,
    Shard,
    check_same_set,
    digest_of,
    find_shards,
    read_header,
    read_names,
    write_packed,
)

__all__ = ["SHARD_VERSION", "PackedImages", "info", "packed_splits", "stage", "verify", "write_packed"]

COPIERS = 4  # shards copied at a time
BLOCK_BYTES = 1 << 22


# ---- reading ---------------------------------------------------------------------------------------------------------


class PackedImages:
    """A split of a packed set (see data_loaders.imagenet.Images).

    May be pickled, and used by several processes: each opens the shards for itself, on first use.

    Attributes:
        labels: (n,).
        class_names: in the order of the labels.
        digest: of checksums, labels and class names.
        source: what the set was made from.
        left_out: names of images that were unreadable when the set was packed.
        num_bytes: of all encoded images.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no shard of the split.
        ValueError: shards are missing, mixed, damaged or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str) -> None:
        self.folder, self.split = Path(folder), split
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        paths = find_shards(self.folder, split)
        if not paths:
            raise FileNotFoundError(f"{folder} holds no shard {split}-00000-of-*.h5")
        shards = [read_header(path) for path in paths]
        check_same_set(shards, split)
        self.paths = tuple(paths)
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in shards])
        self.class_names = shards[0].class_names
        self.source = shards[0].source
        self.left_out = tuple(name for shard in shards for name in shard.left_out)
        self._first = np.cumsum([0] + [len(shard.labels) for shard in shards])
        # Where every image begins in its shard's file, and how many bytes it has: all that a worker needs.
        self._start = np.concatenate([shard.start + shard.offsets[:-1] for shard in shards])
        self._size = np.concatenate([np.diff(shard.offsets) for shard in shards])
        self._crc32 = np.concatenate([shard.crc32 for shard in shards])
        self.num_bytes = int(self._size.sum())
        self.digest = digest_of(self._crc32, self.labels, self.class_names)
        self._open: dict[int, int] = {}
        self._pid = os.getpid()
        self._names: dict[int, PackedNames] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, index: int) -> tuple[int, int]:
        """Shard of an image, and its number there."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            ImageError: it is not what was packed.
            OSError: the shard cannot be read.
        """
        shard = int(self._first.searchsorted(index, side="right")) - 1
        if self._pid != os.getpid():  # forked: what the parent opened stays the parent's
            self._open, self._pid = {}, os.getpid()
        descriptor = self._open.get(shard)
        if descriptor is None:
            descriptor = self._open[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        size = int(self._size[index])
        data = os.pread(descriptor, size, int(self._start[index]))
        if len(data) != size:
            raise ImageError(f"{self.paths[shard].name} ends after {len(data):,} of its {size:,} bytes")
        if zlib.crc32(data) != self._crc32[index]:
            raise ImageError(f"its checksum in {self.paths[shard].name} is wrong")
        return data

    def name(self, index: int) -> str:
        """Name of an image, as "n01440764/n01440764_10026.JPEG"."""
        shard, number = self.place(index)
        if shard not in self._names:
            try:
                self._names[shard] = read_names(read_header(self.paths[shard]))
            except ValueError:  # a message about the image needs one
                return f"number {number} of {self.paths[shard].name}"
        return self._names[shard][number]

    def at(self, root: Path) -> PackedImages:
        """The same set in a copy of its folder."""
        moved = copy.copy(self)  # with no shard open, see __getstate__
        moved.folder, moved.paths = root, tuple(root / path.name for path in self.paths)
        return moved

    def close(self) -> None:
        """Closes the shards; reading opens them again."""
        if self._pid == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_names": {}}

    def __del__(self) -> None:
        with suppress(Exception):  # at exit, or where opening failed
            self.close()


# ---- verify and info -------------------------------------------------------------------------------------------------


def verify(folder: str | os.PathLike[str], progress: bool = False) -> list[str]:
    """Every damage of a packed set, one sentence each with shard, index and name; none for a sound set.

    Raises:
        FileNotFoundError: the folder holds no packed set.
    """
    damages: list[str] = []
    for split in packed_splits(folder):
        try:
            paths = find_shards(Path(folder), split)
        except ValueError as error:
            damages.append(str(error))
            paths = sorted(Path(folder).glob(f"{split}-*-of-*.h5"))
        headers: list[Shard] = []
        first: int | None = 0 if not damages else None  # of the shard's images in the set
        for path in tqdm(paths, f"{split} shards", disable=not progress, dynamic_ncols=True):
            try:
                headers.append(read_header(path))
            except ValueError as error:
                damages.append(str(error))
                first = None
                continue
            damages += damaged_images(headers[-1], first)
            first = None if first is None else first + len(headers[-1].labels)
        if first is not None:
            try:
                check_same_set(headers, split)
            except ValueError as error:
                damages.append(str(error))
    return damages


def damaged_images(shard: Shard, first: int | None = None) -> list[str]:
    """Images of a shard whose bytes are not those that were packed, and names that are not.

    Args:
        shard: its header.
        first: index of its first image in the set, None where that is unknown.
    """
    damages = []
    try:
        names = read_names(shard)
    except ValueError as error:
        damages.append(str(error))
        names = None
    with shard.path.open("rb") as file:
        file.seek(shard.start)
        for number, size in enumerate((shard.offsets[1:] - shard.offsets[:-1]).tolist()):
            data = file.read(size)
            if len(data) == size and zlib.crc32(data) == shard.crc32[number]:
                continue
            index = "" if first is None else f", index {first + number}"
            name = "" if names is None else f" ({names[number]}{index})"
            damages.append(f"{shard.path.name}: image {number}{name} is damaged")
    return damages


def info(folder: str | os.PathLike[str]) -> str:
    """What a packed set holds, as text.

    Raises:
        FileNotFoundError: the folder holds no packed set.
        ValueError: it is damaged, or of another version.
    """
    lines = [f"{folder}: packed images, shard version {SHARD_VERSION}"]
    for split in packed_splits(folder):
        images = PackedImages(folder, split)
        num_bytes = images.num_bytes
        lines.append(
            f"{split}: {len(images):,} images of {len(images.class_names):,} classes in {len(images.paths)} shards, "
            f"{num_bytes / 1e9:,.3f} GB, {num_bytes / max(1, len(images)) / 1e3:,.1f} KB an image; source: "
            f"{images.source}; digest {images.digest}; {len(images.left_out)} unreadable images left out"
        )
        lines += [f"  left out: {name}" for name in images.left_out]
    return "\n".join(lines)


def packed_splits(folder: str | os.PathLike[str]) -> list[str]:
    """The splits of which a folder holds shards; raises FileNotFoundError where there is none."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    found = [split for split in SPLITS if any(Path(folder).glob(f"{split}-*-of-*.h5"))]
    if not found:
        raise FileNotFoundError(f"{folder} holds no packed images (train-00000-of-*.h5)")
    return found


# ---- staging ---------------------------------------------------------------------------------------------------------


def stage(source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Copies a packed set to node-local storage, once a node, and returns the folder of the copy.

    Every process of a node may call it: one copies, under a lock of the target folder, the others wait. A shard whose
    size and tables are those of the source stays as it is. Each copy is checked against the checksums of its images
    before it gets its name.

    Args:
        source: folder of a packed set.
        target: folder on a local disk; made where it is missing.
        progress: whether the process that copies shows a bar.

    Raises:
        FileNotFoundError: the source holds no packed set.
        ValueError: the source is damaged, or the target holds another set.
        OSError: copying failed; the message says where, and how much room is missing on a full disk.
    """
    folder = Path(target)
    paths = [path for split in packed_splits(source) for path in find_shards(Path(source), split)]
    folder.mkdir(parents=True, exist_ok=True)
    if folder.samefile(source):
        return folder
    with _one_at_a_time(folder):
        strange = {path.name for path in folder.glob("*-of-*.h5")} - {path.name for path in paths}
        if strange:
            raise ValueError(f"{folder} holds another packed set ({min(strange)}): choose another folder or empty it")
        missing = [path for path in paths if not _is_copy(folder / path.name, path)]
        _check_room(folder, missing)
        for leftover in folder.glob(".staging-*.tmp"):  # of a killed process: this one holds the lock
            leftover.unlink()
        with ThreadPoolExecutor(COPIERS) as pool:
            copies = pool.map(_copy, missing, [folder] * len(missing))
            for _ in tqdm(copies, "staging shards", len(missing), disable=not (progress and missing)):
                pass
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits for the lock of a folder; the system releases it however its holder ends."""
    with (folder / ".staging.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(error.errno, f"{folder} cannot be locked ({error.strerror}): stage to a local disk") from None
        yield


def _is_copy(copy: Path, path: Path) -> bool:
    if not copy.exists() or copy.stat().st_size != path.stat().st_size:
        return False
    try:
        mine, theirs = read_header(copy), read_header(path)
    except ValueError:
        return False
    same = (mine.pack_digest, mine.names_crc32, mine.start) == (theirs.pack_digest, theirs.names_crc32, theirs.start)
    return same and bool((mine.crc32 == theirs.crc32).all() and (mine.labels == theirs.labels).all())


def _check_room(folder: Path, paths: Sequence[Path]) -> None:
    needed = sum(path.stat().st_size for path in paths)  # what is replaced stays until its copy is whole
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:,.2f} GB free where the packed set needs {needed / 1e9:,.2f} GB more",
        )


def _copy(path: Path, folder: Path) -> None:
    handle, name = tempfile.mkstemp(dir=folder, prefix=".staging-", suffix=".tmp")
    temporary = Path(name)
    try:
        with path.open("rb") as source, os.fdopen(handle, "wb") as copy:
            shutil.copyfileobj(source, copy, BLOCK_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
        damages = damaged_images(read_header(temporary))
        if damages:
            problem = damages[0].replace(temporary.name, path.name)
            raise ValueError(f"{path} or its copy in {folder} is damaged: {problem}")
        temporary.chmod(0o644)
        temporary.replace(folder / path.name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
