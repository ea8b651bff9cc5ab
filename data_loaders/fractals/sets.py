"""A labeled set of images for machines without ImageNet, one fractal a class: `python -m data_loaders.fractals DST`.

What is drawn is in `data_loaders.fractals.drawing`; here it becomes JPEG files in packed shards. An image depends
on (seed, class, instance) alone: not on the number of classes, of images, or of worker processes.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_loaders.files import locked, replacing
from data_loaders.fractals.drawing import SIZES, USUAL, VERSION, check_integer, draw
from data_loaders.imagenet.packing import OtherShardsError, Packing, pack
from data_loaders.imagenet.shards import SPLITS, digest_of
from data_loaders.workers import num_cores

SETTINGS = "fractals.json"
LOCK = ".fractals.lock"
VALIDATION = 1 << 31
"""The first instance of the validation set, so that neither set changes with the size of the other."""
VARIATIONS = (0.0, 2.0)  # the first one excluded
IMAGES_PER_SHARD = 1000  # a shard is what a worker makes at a time


@dataclass(frozen=True)
class Settings:
    """What the files of a set depend on; as JSON beside them.

    The size is the pixels of a side, the quality that of the JPEG files. The variation says how far the images of a
    class are apart; 1 is the usual, see `drawing.Variation`. ValueError for a value outside its range.
    """

    num_classes: int
    images_per_class: int
    validation_per_class: int
    size: int
    seed: int = 0
    quality: int = 90
    variation: float = 1.0
    version: int = VERSION

    def __post_init__(self) -> None:
        check_integer("num_classes", self.num_classes, 1, 1 << 31)
        check_integer("images_per_class", self.images_per_class, 1, VALIDATION)
        check_integer("validation_per_class", self.validation_per_class, 1, VALIDATION - 1)
        check_integer("size", self.size, *SIZES)
        check_integer("seed", self.seed, 0, (1 << 63) - 1)
        check_integer("quality", self.quality, 1, 100)
        low, high = VARIATIONS
        if not (math.isfinite(self.variation) and low < self.variation <= high):
            raise ValueError(f"variation must be a number in ({low:g}, {high:g}], got {self.variation}")

    def count(self, split: str) -> int:
        return self.images_per_class if split == "train" else self.validation_per_class


def class_names(num_classes: int) -> tuple[str, ...]:
    """fractal_0000, fractal_0001, ...; with enough digits that their alphabetical order is that of the classes."""
    digits = max(4, len(str(num_classes - 1)))
    return tuple(f"fractal_{index:0{digits}d}" for index in range(num_classes))


def encode(settings: Settings, split: str, class_index: int, number: int) -> bytes:
    """The JPEG file of an image; `number` counts those of a class in "train" or "validation"."""
    instance = number if split == "train" else VALIDATION + number
    buffer = io.BytesIO()
    image = Image.fromarray(draw(settings.seed, class_index, instance, settings.size, USUAL.times(settings.variation)))
    image.save(buffer, "JPEG", quality=settings.quality)
    return buffer.getvalue()


class FractalImages:
    """A split that is drawn as it is read (see data_loaders.imagenet.folder.Images), to be packed.

    The images go round the classes: the first of each class, then the second of each. So every shard holds all classes.
    """

    def __init__(self, settings: Settings, split: str) -> None:
        self.settings, self.split = settings, split
        self.folder = Path()
        self.class_names = class_names(settings.num_classes)
        self.labels = np.tile(np.arange(settings.num_classes, dtype=np.int64), settings.count(split))
        self.source = f"fractals of seed {settings.seed}"
        self.digest = digest_of(asdict(settings), split)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        number, class_index = divmod(index, self.settings.num_classes)
        return encode(self.settings, self.split, class_index, number)

    def name(self, index: int) -> str:
        number, class_index = divmod(index, self.settings.num_classes)
        name = self.class_names[class_index]
        return f"{name}/{name}_{number:05d}.JPEG"

    def at(self, root: Path) -> FractalImages:
        return self


def ensure(target: str | os.PathLike[str], settings: Settings, *, num_workers: int | None = None) -> Path:
    """Makes the set, packed as `data_loaders.imagenet.packed` reads it, where it is missing or not finished.

    Every shard appears whole or not at all. The same call takes up what was interrupted, and does nothing when all is
    there. Of several processes that call it, one works and the others wait.

    Args:
        target: a folder, made where it is missing; empty, or begun by the same call.
        settings: what to draw.
        num_workers: processes, one a core by default; a script that calls this with several needs the line
            `if __name__ == "__main__":`.

    Raises:
        ValueError: a value outside its range, or `target` holds something else.
        OSError: a file cannot be written.
    """
    folder = Path(target)
    workers = num_cores() if num_workers is None else num_workers
    check_integer("num_workers", workers, 1, 4096)
    if _is_complete(folder, settings):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if not _is_complete(folder, settings):
            _write_settings(folder, settings, complete=False)
            packing = Packing(images_per_shard=IMAGES_PER_SHARD)
            for split in SPLITS:
                images = FractalImages(settings, split)
                try:
                    pack(images, folder, split, packing, num_workers=workers, progress=sys.stderr.isatty())
                except OtherShardsError:  # of these settings, as was just checked, but of another writer
                    raise ValueError(_of_earlier_version(folder)) from None
            _write_settings(folder, settings, complete=True)
    return folder


# ---- the state of a folder -------------------------------------------------------------------------------------------


def _is_complete(target: Path, settings: Settings) -> bool:
    """Whether the set is there; raises ValueError where `target` holds another one, or other files."""
    path = target / SETTINGS
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is not a folder")
    try:
        found = json.loads(path.read_text("utf-8"))
        complete = bool(found.pop("complete"))
    except FileNotFoundError:
        # Looked at once, and without what is hidden: another process may be about to begin this very set.
        names = {entry.name for entry in target.iterdir() if entry.name[0] != "."} if target.exists() else set()
        if names and SETTINGS not in names:
            raise ValueError(f"{target} has files but no {SETTINGS}: name a new or an empty folder") from None
        return False
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path} does not hold the settings of a fractal set: name another folder") from None
    if found.get("packed") is False:
        raise ValueError(_of_earlier_version(target))
    for name, value in _as_json(settings).items():
        if found.get(name) != value:
            message = f"{target} was made with {name} {found.get(name)}, not {value}: name another folder, or delete it"
            raise ValueError(message)
    return complete


def _of_earlier_version(target: Path) -> str:
    return f"{target} was made by an earlier version of this program: name another folder, or delete it"


def _as_json(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "packed": True}  # once, there were sets of one file an image


def _write_settings(target: Path, settings: Settings, complete: bool) -> None:
    text = json.dumps({**_as_json(settings), "complete": complete}, indent=2, default=int) + "\n"
    with replacing(target / SETTINGS) as temporary:
        temporary.write_text(text)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process of this machine at a time, or of the cluster where locks hold across nodes: `pack` refuses two."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(target / LOCK, wait=False))
        except BlockingIOError:
            print(f"{target}: waiting for another process, which makes it", file=sys.stderr)
            stack.enter_context(locked(target / LOCK, wait=True))
        yield
