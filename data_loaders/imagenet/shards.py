"""Packed images for parallel file systems: many encoded images in few HDF5 files, read by offset.

A set is `<folder>/<split>-00000-of-000NN.h5` and so on. Each shard holds, as contiguous datasets, the encoded bytes of
its images one after the other (`data`), where each begins (`offsets`, one more than images), `labels`, a CRC-32 an
image (`crc32`) and the names (`names`, `name_offsets`). Attributes: format, version, split, shard, num_shards,
class_names, source, pack_digest (the same for all shards of a set, no other), left_out (names of unreadable images),
table_crc32 and names_crc32 (checksums of the small datasets), text_crc32 (of the attributes) and, last, complete. HDF5
is needed to open a set, not to read its images: that takes one pread, which is safe in any process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from data_loaders.files import replacing

SHARD_VERSION = 1
FORMAT = "packed images"
IMAGES_PER_SHARD = 10_000  # about 1 GB of ImageNet
SPLITS = ("train", "validation")
CHECKED = ("split", "shard", "num_shards", "class_names", "source", "pack_digest", "left_out")
"""Attributes with a checksum."""

Item = tuple[str, int, bytes]
"""Name, label, encoded image."""


class PackedNames:
    """Many strings as one array of bytes and offsets: workers that fork share it, and a pickle is small."""

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def of(cls, names: Iterable[str]) -> PackedNames:
        """Packs strings; names of files that are no UTF-8 survive."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(each) for each in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes().decode("utf-8", "surrogateescape")


# ---- headers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shard:
    """What is known of a shard without its images.

    Attributes:
        shard, num_shards: its number, and how many there are.
        class_names: of the whole set.
        source: what the set was made from.
        pack_digest: common to the shards of a set.
        left_out: names of images that were unreadable.
        names_crc32: checksum of the names.
        start: place of the first image in the file, in bytes.
        offsets: of each image from there, and of the end, (n + 1,).
        labels, crc32: (n,).
    """

    path: Path
    split: str
    shard: int
    num_shards: int
    class_names: tuple[str, ...]
    source: str
    pack_digest: str
    left_out: tuple[str, ...]
    names_crc32: int
    start: int
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    crc32: NDArray[np.uint32]


def shard_path(folder: Path, split: str, shard: int, num_shards: int) -> Path:
    """`<folder>/<split>-<shard>-of-<num_shards>.h5`."""
    return folder / f"{split}-{shard:05d}-of-{num_shards:05d}.h5"


def check_split(split: str) -> None:
    """Raises ValueError for a word that is no split: files of such a name would never be looked for."""
    if split not in SPLITS:
        raise ValueError(f"split must be {' or '.join(SPLITS)}, got {split!r}")


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in order; none where it is not packed here, ValueError where some are missing or mixed."""
    check_split(split)
    pattern = re.compile(rf"{split}-(\d{{5,}})-of-(\d{{5,}})\.h5")
    found: dict[tuple[int, int], Path] = {}  # by (number of shards, number of the shard)
    for path in folder.iterdir():
        if match := pattern.fullmatch(path.name):
            found[int(match[2]), int(match[1])] = path
    if not found:
        return []
    totals = sorted({total for total, _ in found})
    if len(totals) > 1:
        counts = " and ".join(map(str, totals))
        raise ValueError(f"{folder} mixes {split} shards of sets with {counts} shards: keep one set in a folder")
    missing = sorted(set(range(totals[0])) - {shard for _, shard in found})
    if missing:
        names = ", ".join(shard_path(folder, split, shard, totals[0]).name for shard in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{folder} lacks {len(missing)} of {totals[0]} {split} shards: {names}{more}")
    return [found[place] for place in sorted(found)]


def read_header(path: Path) -> Shard:
    """Everything but the images, checked; ValueError names a file that is damaged, incomplete or of another version."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = dict(file.attrs)
            if attributes.get("format") != FORMAT:
                raise ValueError(f"{path} is not a shard of packed images")
            version = int(attributes["version"])
            if version != SHARD_VERSION:
                raise ValueError(
                    f"{path} has shard version {version} where this code reads {SHARD_VERSION}: pack the images again"
                )
            if not attributes.get("complete"):
                raise ValueError(f"{path} is incomplete: pack the images again")
            if _crc32_of_text(attributes) != int(attributes["text_crc32"]):
                raise ValueError(f"{path} is damaged: its attributes have the wrong checksum")
            shard = Shard(
                path,
                str(attributes["split"]),
                int(attributes["shard"]),
                int(attributes["num_shards"]),
                tuple(json.loads(attributes["class_names"])),
                str(attributes["source"]),
                str(attributes["pack_digest"]),
                tuple(json.loads(attributes["left_out"])),
                int(attributes["names_crc32"]),
                file["data"].id.get_offset() or 0,
                file["offsets"][:],
                file["labels"][:],
                file["crc32"][:],
            )
            table_crc32 = int(attributes["table_crc32"])
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip("'\"").partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a shard of packed images ({reason})") from None
    if _crc32_of(shard.offsets, shard.labels, shard.crc32) != table_crc32:
        raise ValueError(f"{path} is damaged: its table of images has the wrong checksum")
    size, end = path.stat().st_size, shard.start + int(shard.offsets[-1])
    if size < end:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes where its images end at byte {end:,}")
    return shard


def read_names(shard: Shard) -> PackedNames:
    """Names of the images of a shard; raises ValueError where they are damaged."""
    try:
        with h5py.File(shard.path, "r", locking=False) as file:
            names = PackedNames(file["names"][:], file["name_offsets"][:])
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"the names in {shard.path} cannot be read ({error})") from None
    if len(names) != len(shard.labels) or _crc32_of(names.data, names.offsets) != shard.names_crc32:
        raise ValueError(f"the names in {shard.path} have the wrong checksum")
    return names


def _crc32_of(*arrays: NDArray[Any]) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, checksum)
    return checksum


def _crc32_of_text(attributes: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps([str(attributes[name]) for name in CHECKED]).encode())


def check_same_set(shards: Sequence[Shard], split: str) -> None:
    """Raises ValueError where a shard is not where it belongs, or belongs to another set."""
    for number, shard in enumerate(shards):
        if shard.split != split:
            raise ValueError(f"{shard.path} is a {shard.split} shard by its contents")
        if (shard.shard, shard.num_shards) != (number, len(shards)):
            raise ValueError(f"{shard.path} is shard {shard.shard} of {shard.num_shards} by its contents")
        if shard.pack_digest != shards[0].pack_digest or shard.class_names != shards[0].class_names:
            raise ValueError(f"{shard.path} belongs to another set than {shards[0].path.name}: pack the images again")


def digest_of(*parts: Any) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part).encode())
    return state.hexdigest()[:16]


# ---- writing ---------------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """What the shards of a set have in common, see `Shard`."""

    split: str
    class_names: tuple[str, ...]
    source: str
    pack_digest: str


def write_shard(
    path: Path, header: Header, shard: int, num_shards: int, items: Iterable[Item], left_out: Sequence[str] = ()
) -> None:
    """Writes one shard to a temporary file and moves it into place.

    The size of a contiguous dataset must be known when it is made, so the images are spooled first: memory stays small,
    and a full disk shows in an ordinary write. HDF5 itself brings the interpreter down when it runs out of space.
    `left_out` may grow while items are taken.

    Raises:
        ValueError: a label outside the classes.
        OSError: writing failed; the error names the file.
    """
    names: list[str] = []
    rows: list[tuple[int, int, int]] = []  # label, size, checksum
    try:
        with replacing(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as spool:
            for name, label, data in items:
                if not 0 <= label < len(header.class_names):
                    raise ValueError(f"{name} has label {label}, outside the {len(header.class_names)} classes")
                names.append(name)
                rows.append((label, len(data), zlib.crc32(data)))
                spool.write(data)
            labels, sizes, crc32 = np.array(rows, np.int64).reshape(-1, 3).T
            num_bytes = int(sizes.sum())
            if shutil.disk_usage(path.parent).free < num_bytes + 100 * len(names) + (1 << 20):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            table = (np.concatenate([[0], np.cumsum(sizes)]), labels, crc32.astype(np.uint32))
            with h5py.File(temporary, "w", locking=False) as file:
                start = _write_tables(file, header, table, PackedNames.of(names), left_out, num_bytes)
                file.attrs["shard"], file.attrs["num_shards"] = shard, num_shards
                file.attrs["text_crc32"] = _crc32_of_text(file.attrs)
                file.attrs["complete"] = True
            if start is not None:  # None where no image has a byte
                spool.seek(0)
                with temporary.open("rb+") as packed:
                    packed.seek(start)
                    shutil.copyfileobj(spool, packed, 1 << 22)
    except OSError as error:
        if error.errno and not error.filename:  # of a write, which knows no name
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise


def _write_tables(
    file: h5py.File,
    header: Header,
    table: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    names: PackedNames,
    left_out: Sequence[str],
    num_bytes: int,
) -> int | None:
    """Writes all but the images; returns where in the file their bytes begin."""
    file["offsets"], file["labels"], file["crc32"] = table
    file["names"], file["name_offsets"] = names.data, names.offsets
    file.attrs["format"], file.attrs["version"] = FORMAT, SHARD_VERSION
    for name in ("split", "source", "pack_digest"):
        file.attrs[name] = getattr(header, name)
    file.attrs["table_crc32"], file.attrs["names_crc32"] = _crc32_of(*table), _crc32_of(names.data, names.offsets)
    for name, texts in (("class_names", header.class_names), ("left_out", left_out)):
        # Beyond 64 KB, an attribute takes text of variable length only.
        file.attrs.create(name, json.dumps(list(texts)), dtype=h5py.string_dtype())
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((num_bytes,))
    start: int | None = h5py.h5d.create(file.id, b"data", h5py.h5t.STD_U8LE, space, layout).get_offset()
    return start
