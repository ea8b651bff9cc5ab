"""Labels of a flat validation folder: the list that is found, and which of its entries belongs to which image.

A list is looked for beside the folder of the images, in it, and in the unpacked development kit:

- `LOC_val_solution.csv` of Kaggle: `ImageId,PredictionString`, as `ILSVRC2012_val_00000001,n01751748 111 108 230 366`.
- `val.txt` or `validation.txt`: a line an image, its name and then its class: the name of a folder of train/, or its
  number in the order of names, from 0. Where folders are named by numbers, a number is always such a name.
- `ILSVRC2012_validation_ground_truth.txt` of the development kit: a line an image, in the order of names: the kit's
  class number, which `map_clsloc.txt` or `meta.mat` explains.
"""

from __future__ import annotations

import csv
import importlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

SUFFIXES = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Of images, in any case."""

KAGGLE_LIST = "LOC_val_solution.csv"
TEXT_LISTS = ("val.txt", "validation.txt")
TRUTH_LIST = "ILSVRC2012_validation_ground_truth.txt"
CLASS_LISTS = ("map_clsloc.txt", "meta.mat")  # what the kit's numbers mean; either is enough
LIST_FOLDERS = (".", "devkit/data", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t3/data")

Entry = tuple[str, str]
"""Name of an image as the list has it, and its class."""


def by_class(root: Path, folder: Path, images: Sequence[str], classes: Iterable[str]) -> dict[str, list[str]]:
    """Returns the images of each class, by the first list found; classes without an image have an empty list.

    Args:
        root: of the set.
        folder: of the images.
        images: names of the files in it.
        classes: names of the folders of train/; where there are none, those that the list names.

    Raises:
        FileNotFoundError: there is no list.
        ValueError: the list does not fit the images or the classes.
    """
    path = _find(root, folder, (KAGGLE_LIST, *TEXT_LISTS, TRUTH_LIST))
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds images without folders of classes, and no list says what they show: put {KAGGLE_LIST}, "
            f"{TEXT_LISTS[0]} or the development kit's {TRUTH_LIST} and {CLASS_LISTS[1]} into {root}"
        )
    known, images = sorted(classes), sorted(images)
    if path.name == TRUTH_LIST:
        class_of = _kit_classes(path, _kit_names(root, folder, path), images)
    else:
        entries = _kaggle_entries(path) if path.name == KAGGLE_LIST else _text_entries(path, known, images)
        class_of = _matched(path, entries, folder, images)
    found: dict[str, list[str]] = {name: [] for name in known or sorted(set(class_of.values()))}
    for image in images:
        name = class_of[image]
        if name not in found:
            raise ValueError(f"{path} puts {image} into class {name}, for which {root / 'train'} has no folder")
        found[name].append(image)
    return found


def _find(root: Path, folder: Path, names: Sequence[str]) -> Path | None:
    places = [*(root / place for place in LIST_FOLDERS), folder]
    return next((place / name for name in names for place in places if (place / name).is_file()), None)


# ---- which entry belongs to which image ------------------------------------------------------------------------------


def _matched(path: Path, entries: Sequence[Entry], folder: Path, images: Sequence[str]) -> dict[str, str]:
    """Returns the class of each image: an entry means the image of its whole name, else the only one of its stem."""
    whole = set(images)
    stems: dict[str, list[str]] = defaultdict(list)
    for image in images:
        stems[_stem(image)].append(image)
    class_of: dict[str, str] = {}
    lost = []
    for entry, name in entries:
        meant = [entry] if entry in whole else stems.get(entry) or stems.get(_stem(entry)) or []
        if len(meant) > 1:
            raise ValueError(f"{path} lists {entry}, which may be {' or '.join(meant)} of {folder}: write whole names")
        if not meant:
            lost.append(entry)
        elif class_of.setdefault(meant[0], name) != name:
            raise ValueError(f"{path} lists {meant[0]} with two classes, {class_of[meant[0]]} and {name}")
    unlisted = [image for image in images if image not in class_of]
    if unlisted:
        raise ValueError(f"{path} does not list {len(unlisted)} images of {folder}, the first is {unlisted[0]}")
    if lost:
        raise ValueError(f"{folder} lacks {len(lost)} images that {path} lists, the first is {min(lost)}")
    return class_of


def _stem(name: str) -> str:
    """The name without the suffix of an image; other dots are part of it."""
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)


def _base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


# ---- the lists -------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None


def _kaggle_entries(path: Path) -> list[Entry]:
    rows = list(csv.reader(_text(path).splitlines()))
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or not row[1].split():
            raise ValueError(f"{path}, line {number}: expected an image and its boxes, got {','.join(row)[:80]!r}")
    return [(_base(row[0]), row[1].split()[0]) for row in rows[1:]]


def _text_entries(path: Path, known: Sequence[str], images: Sequence[str]) -> list[Entry]:
    entries, whole = [], frozenset(images)
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, class_name = _divided(line, whole)
        if not name or not class_name:
            raise ValueError(f"{path}, line {number}: expected a name and a class, got {line[:80]!r}")
        try:
            entries.append((name, _class_name(class_name, known)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return entries


def _divided(line: str, images: frozenset[str]) -> Entry:
    """Divides a line at its tab, or at its only space, or where the name of an image ends; ("", "") for none."""
    parts = line.strip().split("\t") if "\t" in line.strip() else line.split()
    if len(parts) > 2:  # names may hold spaces
        places = [place for place in range(1, len(parts)) if _base(" ".join(parts[:place])) in images]
        parts = [" ".join(parts[: places[-1]]), " ".join(parts[places[-1] :])] if places else []
    return (_base(parts[0].strip()), parts[1].strip()) if len(parts) == 2 else ("", "")


def _class_name(text: str, known: Sequence[str]) -> str:
    """The class that a text list means: a number is a place in the order of folders, unless folders have such names."""
    if not text.isdecimal() or any(name.isdecimal() for name in known):
        return text
    if int(text) >= len(known):
        raise ValueError(f"class {text} where train has {len(known)} folders")
    return known[int(text)]


def _kit_classes(path: Path, names: Mapping[int, str], images: Sequence[str]) -> dict[str, str]:
    numbers = _text(path).split()
    if len(numbers) != len(images):
        raise ValueError(f"{path} has {len(numbers)} lines for {len(images)} images")
    unknown = [number for number in numbers if not number.isdecimal() or int(number) not in names]
    if unknown:
        raise ValueError(f"{path} has the class number {unknown[0]!r}, which the development kit does not name")
    return {image: names[int(number)] for image, number in zip(images, numbers, strict=True)}


def _kit_names(root: Path, folder: Path, truth: Path) -> dict[int, str]:
    """WordNet names by the development kit's class numbers, which do not follow their order."""
    path = _find(root, folder, CLASS_LISTS)
    if path is None:
        raise FileNotFoundError(
            f"{truth} counts classes as the development kit does: put its {' or '.join(CLASS_LISTS)} into {root}"
        )
    try:
        if path.suffix == ".txt":  # n02119789 1 kit_fox
            lines = (line.split() for line in _text(path).splitlines() if line.strip())
            return {int(words[1]): words[0] for words in lines}
        synsets = importlib.import_module("scipy.io").loadmat(path, squeeze_me=True, struct_as_record=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    # NotImplementedError is what scipy says to files of MATLAB 7.3
    except (ImportError, KeyError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as the development kit's list of classes ({error})") from None
