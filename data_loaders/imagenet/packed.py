"""Packed sets (see data_loaders.imagenet.shards): read, check every byte, sum up."""

from __future__ import annotations

import copy
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_loaders.imagenet.pictures import ImageError
from data_loaders.imagenet.shards import (
    SHARD_VERSION,
    SPLITS,
    PackedNames,
    Shard,
    check_same_set,
    digest_of,
    find_shards,
    read_header,
    read_names,
)

# ---- reading ---------------------------------------------------------------------------------------------------------


class PackedImages:
    """A split of a packed set (see data_loaders.imagenet.folder.Images).

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
        self._names: dict[int, PackedNames] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def _shard_of(self, index: int) -> int:
        return int(self._first.searchsorted(index, side="right")) - 1

    def read(self, index: int) -> bytes:
        """The encoded image; ImageError where it is not what was packed, OSError where the shard cannot be read."""
        shard = self._shard_of(index)
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
        shard = self._shard_of(index)
        number = index - int(self._first[shard])
        if shard not in self._names:
            try:
                self._names[shard] = read_names(read_header(self.paths[shard]))
            except ValueError:  # a message about the image needs one
                return f"number {number} of {self.paths[shard].name}"
        return self._names[shard][number]

    def at(self, root: Path) -> PackedImages:
        moved = copy.copy(self)  # with no shard open, see __getstate__
        moved.folder, moved.paths = root, tuple(root / path.name for path in self.paths)
        return moved

    def close(self) -> None:
        """Closes the shards; reading opens them again."""
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
    """Every damage of a packed set, one sentence each with shard, index and name; none for a sound set."""
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
    """Damages of a shard: images whose bytes differ from those that were packed, and names that do.

    `first` is the index of its first image in the set, None where that is unknown.
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
    """What a packed set holds, as text."""
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
