"""ImageNet as it is distributed: a folder a class for training, a flat folder or a folder a class for validation."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_loaders.imagenet.labels import SUFFIXES, by_class
from data_loaders.imagenet.shards import PackedNames, check_split

FOLDERS = {"train": ("train",), "validation": ("val", "validation")}


class Images(Protocol):
    """Encoded images with labels; may be pickled, and read by several processes.

    Attributes:
        labels: (n,), numbers of classes.
        class_names: in the order of the labels.
        digest: short hash that tells whether two sets are the same.
        source, folder: where the images come from, for records, and where they are.
    """

    folder: Path
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    digest: str
    source: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image; raises ImageError where it is not what it was, OSError where it cannot be read."""

    def name(self, index: int) -> str:
        """Its name, for messages."""

    def at(self, root: Path) -> Images:
        """The same set, read from a copy of its root; nothing is looked up there."""


class FolderImages:
    """A split in one file an image (see `Images`), in the order of class names and file names.

    Training: `<root>/train/<class>/<image>`. Validation: `<root>/val` or `<root>/validation`, with a folder a class, or
    flat with a list of labels (see `data_loaders.imagenet.labels`). Files of other suffixes and hidden ones do not
    count. The digest is one of class names, names and labels, because each size would be a call to the file system.

    Raises:
        FileNotFoundError: the folder or the list of a flat one is missing.
        ValueError: there is no image, or the list does not fit.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        self.source = "folder"
        self.folder = split_folder(Path(root), split)
        names = _class_folders(self.folder)
        found = {name: [f"{name}/{image}" for image in _images_in(self.folder / name)] for name in names}
        if split == "validation" and not any(found.values()):
            flat = _images_in(self.folder)
            if flat:
                train = Path(root) / "train"
                found = by_class(Path(root), self.folder, flat, _class_folders(train) if train.is_dir() else [])
        elif not found:
            raise ValueError(f"{self.folder} has no folder of a class")
        if not any(found.values()):
            raise ValueError(f"{self.folder} holds no image ({', '.join(SUFFIXES)}){_deeper(self.folder)}")
        self.class_names = tuple(sorted(found))
        counts = [len(found[name]) for name in self.class_names]
        self.labels: NDArray[np.int64] = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self._names = PackedNames.of(each for name in self.class_names for each in sorted(found[name]))
        state = hashlib.sha256(json.dumps(self.class_names).encode())
        for part in (self._names.data, self._names.offsets, self.labels):
            state.update(part.tobytes())
        self.digest = state.hexdigest()[:16]
        self._folder = os.fspath(self.folder) + os.sep

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        descriptor = os.open(self._folder + self._names[index], os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read_all(descriptor)
        finally:
            os.close(descriptor)

    def name(self, index: int) -> str:
        return self._names[index]

    def at(self, root: Path) -> FolderImages:
        moved = copy.copy(self)
        moved.folder = root / self.folder.name
        moved._folder = os.fspath(moved.folder) + os.sep
        return moved


def split_folder(root: Path, split: str) -> Path:
    """`<root>/train`, `<root>/val` or `<root>/validation`; raises FileNotFoundError, or ValueError where both exist."""
    check_split(split)
    found = [root / name for name in FOLDERS[split] if (root / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"{root} has no folder {' or '.join(FOLDERS[split])}")
    if len(found) > 1:
        raise ValueError(f"{root} has both a folder val and a folder validation: keep one of them")
    return found[0]


def _read_all(descriptor: int) -> bytes:
    """One read for a file that stays as it is; more where the file system hands out less."""
    size = os.fstat(descriptor).st_size
    data = os.read(descriptor, size + 1)
    if len(data) == size:
        return data
    parts = [data]
    while parts[-1]:
        parts.append(os.read(descriptor, 1 << 20))
    return b"".join(parts)


def _deeper(folder: Path) -> str:
    """Where images lie that are looked for in the folders of classes; nothing if there are none."""
    for name in _class_folders(folder):
        for below in _class_folders(folder / name):
            if _images_in(folder / name / below):
                place = f"{folder.name}/{name}/{below}"
                return f": the images in {place} lie one folder too deep, they belong into {folder.name}/{name}"
    return ""


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


def _images_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and not entry.is_dir()
        ]
