"""ImageNet as it is distributed: a folder a class for training, a flat folder or a folder a class for validation."""

from __future__ import annotations

import copy
import csv
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_loaders.imagenet.shards import PackedNames

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")  # in any case
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}

# Where the classes of a flat validation folder may be written, in the order in which they are looked for: beside the
# folder of the images, in it, or in the unpacked development kit.
KAGGLE_LIST = "LOC_val_solution.csv"  # ImageId,PredictionString: ILSVRC2012_val_00000001,n01751748 111 108 230 366
TEXT_LISTS = ("val.txt", "validation.txt")  # a line an image: its name, then its wnid or its class number from 0
TRUTH_LIST = "ILSVRC2012_validation_ground_truth.txt"  # a line an image, in the order of names: the kit's class number
CLASS_LISTS = ("map_clsloc.txt", "meta.mat")  # what the kit's numbers mean; either is enough
LIST_FOLDERS = (".", "devkit/data", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t3/data")


class Images(Protocol):
    """Encoded images with labels; may be pickled, and read by several processes.

    Attributes:
        labels: (n,), numbers of classes.
        class_names: in the order of the labels.
        digest: short hash that tells whether two sets are the same.
        source: where the images come from, for records.
        folder: where they are.
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

    Training: `<root>/train/<class>/<image>`. Validation: `<root>/val` or `<root>/validation`, with a folder a class or
    flat with one of the lists named above. Files of other suffixes and hidden ones do not count.

    Attributes:
        labels, class_names: the classes are the names of the folders, sorted.
        digest: of class names, names and labels. Sizes are not looked up: that is a call to the file system each.

    Raises:
        FileNotFoundError: the folder or the list of a flat one is missing.
        ValueError: there is no image, or the list does not fit.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        self.source = "folder"
        self.folder = split_folder(Path(root), split)
        found = _scan(self.folder)
        if split == "validation" and not any(found.values()):
            flat = _images_in(self.folder)
            if flat:
                found = _by_class(Path(root), self.folder, flat)
        elif not found:
            raise ValueError(f"{self.folder} has no folder of a class")
        if not any(found.values()):
            raise ValueError(f"{self.folder} holds no image ({', '.join(SUFFIXES)})")
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
        """The encoded image; raises OSError."""
        descriptor = os.open(self._folder + self._names[index], os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read_all(descriptor)
        finally:
            os.close(descriptor)

    def name(self, index: int) -> str:
        """Path of an image below the folder of its split."""
        return self._names[index]

    def at(self, root: Path) -> FolderImages:
        """The same set in a copy of its root."""
        moved = copy.copy(self)
        moved.folder = root / self.folder.name
        moved._folder = os.fspath(moved.folder) + os.sep
        return moved


def split_folder(root: Path, split: str) -> Path:
    """`<root>/train`, `<root>/val` or `<root>/validation`; raises FileNotFoundError, or ValueError where both exist."""
    if split not in FOLDERS:
        raise ValueError(f"split must be train or validation, got {split!r}")
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


def _scan(folder: Path) -> dict[str, list[str]]:
    """Images below each folder of a class, as paths from `folder`."""
    with os.scandir(folder) as entries:
        classes = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return {name: [f"{name}/{image}" for image in _images_in(folder / name)] for name in classes}


def _images_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and not entry.is_dir()
        ]


# ---- lists of a flat validation folder -------------------------------------------------------------------------------


def _by_class(root: Path, folder: Path, images: list[str]) -> dict[str, list[str]]:
    """Images by class, from the first list found; classes without an image count."""
    path = _find(root, folder, (KAGGLE_LIST, *TEXT_LISTS, TRUTH_LIST))
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds images without folders of classes, and no list says what they show: put {KAGGLE_LIST}, "
            f"{TEXT_LISTS[0]} or the development kit's {TRUTH_LIST} and {CLASS_LISTS[1]} into {root}"
        )
    train = root / "train"
    known = sorted(_class_folders(train)) if train.is_dir() else []
    images.sort()
    if path.name == KAGGLE_LIST:
        classes = _kaggle_classes(path)
    elif path.name == TRUTH_LIST:
        classes = _kit_classes(path, _kit_names(root, folder, path), images)
    else:
        classes = _text_classes(path, known)
    unlisted = [image for image in images if _stem(image) not in classes]
    if unlisted:
        raise ValueError(f"{path} does not list {len(unlisted)} images of {folder}, the first is {unlisted[0]}")
    lost = set(classes) - {_stem(image) for image in images}
    if lost:
        raise ValueError(f"{folder} lacks {len(lost)} images that {path} lists, the first is {min(lost)}")
    found: dict[str, list[str]] = {name: [] for name in known or sorted(set(classes.values()))}
    for image in images:
        name = classes[_stem(image)]
        if name not in found:
            raise ValueError(f"{path} puts {image} into class {name}, for which {train} has no folder")
        found[name].append(image)
    return found


def _class_folders(folder: Path) -> Iterable[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def _find(root: Path, folder: Path, names: Sequence[str]) -> Path | None:
    places = [*(root / place for place in LIST_FOLDERS), folder]
    return next((place / name for name in names for place in places if (place / name).is_file()), None)


def _kaggle_classes(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or not row[1].split():
            raise ValueError(f"{path}, line {number}: expected an image and its boxes, got {','.join(row)[:80]!r}")
    return {_stem(row[0]): row[1].split()[0] for row in rows[1:]}


def _text_classes(path: Path, known: Sequence[str]) -> dict[str, str]:
    classes = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: expected a name and a class, got {line[:80]!r}")
        name = words[1]
        if name.isdecimal():
            if int(name) >= len(known):
                raise ValueError(f"{path}, line {number}: class {name} where train has {len(known)} folders")
            name = known[int(name)]
        classes[_stem(words[0])] = name
    return classes


def _kit_classes(path: Path, names: Mapping[int, str], images: Sequence[str]) -> dict[str, str]:
    numbers = path.read_text("utf-8").split()
    if len(numbers) != len(images):
        raise ValueError(f"{path} has {len(numbers)} lines for {len(images)} images")
    unknown = [number for number in numbers if not number.isdecimal() or int(number) not in names]
    if unknown:
        raise ValueError(f"{path} has the class number {unknown[0]!r}, which the development kit does not name")
    return {_stem(image): names[int(number)] for image, number in zip(images, numbers, strict=True)}


def _kit_names(root: Path, folder: Path, truth: Path) -> dict[int, str]:
    """WordNet names by the development kit's class numbers, which do not follow their order."""
    path = _find(root, folder, CLASS_LISTS)
    if path is None:
        raise FileNotFoundError(
            f"{truth} counts classes as the development kit does: put its {' or '.join(CLASS_LISTS)} into {root}"
        )
    try:
        if path.suffix == ".txt":  # n02119789 1 kit_fox
            lines = (line.split() for line in path.read_text("utf-8").splitlines() if line.strip())
            return {int(words[1]): words[0] for words in lines}
        synsets = importlib.import_module("scipy.io").loadmat(path, squeeze_me=True, struct_as_record=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    # NotImplementedError is what scipy says to files of MATLAB 7.3
    except (ImportError, KeyError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as the development kit's list of classes ({error})") from None
