"""A labeled set of images for machines without ImageNet, one fractal a class: `python -m data_loaders.fractals DST`.

What is drawn is in `data_loaders.fractals.drawing`; here it becomes folders of JPEG files, or packed shards. An image
depends on (seed, class, instance) alone: not on the number of classes, of images, or of worker processes.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from data_loaders.files import locked, replacing
from data_loaders.fractals.drawing import SIZES, USUAL, VERSION, check_integer, draw
from data_loaders.workers import follow_parent, num_cores, signals_held_back

__all__ = ["Settings", "class_names", "draw", "ensure", "write_folder", "write_shards"]

SETTINGS = "fractals.json"
LOCK = ".fractals.lock"
VALIDATION = 1 << 31
"""The first instance of the validation set, so that neither set changes with the size of the other."""
FOLDERS = {"train": "train", "validation": "val"}
VARIATIONS = (0.0, 2.0)  # the first one excluded
CHUNK = 64  # images a worker makes at a time


@dataclass(frozen=True)
class Settings:
    """What the files of a set depend on; as JSON beside them."""

    num_classes: int
    images_per_class: int
    validation_per_class: int
    size: int
    seed: int
    quality: int
    packed: bool
    variation: float = 1.0
    version: int = VERSION

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
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
        """Images of a class in "train" or "validation"."""
        return self.images_per_class if split == "train" else self.validation_per_class


def class_names(num_classes: int) -> tuple[str, ...]:
    """fractal_0000, fractal_0001, ...; with enough digits that their alphabetical order is that of the classes."""
    digits = max(4, len(str(num_classes - 1)))
    return tuple(f"fractal_{index:0{digits}d}" for index in range(num_classes))


def write_folder(
    target: str | os.PathLike[str],
    *,
    num_classes: int,
    images_per_class: int,
    validation_per_class: int,
    size: int,
    seed: int = 0,
    quality: int = 90,
    variation: float = 1.0,
    num_workers: int | None = None,
    progress: bool = True,
) -> None:
    """Writes the set as JPEG files, `target`/train/<class>/*.JPEG and `target`/val/<class>/*.JPEG.

    Every file appears whole or not at all, and the same call takes up what was interrupted and does nothing when
    all is there. Of several processes that call it, one works and the others wait.

    Args:
        target: a folder, made where it is missing; empty, or begun by the same call.
        num_classes, images_per_class, validation_per_class: at least 1.
        size: pixels of a side, in [8, 2048].
        seed: in [0, 2^63).
        quality: of the JPEG files, in [1, 100].
        variation: how far the images of a class are apart, in (0, 2]; 1 is the usual, see `fractal_images.Variation`.
        num_workers: processes, one a core by default; 0 works in this one. Started by spawn, so that a script that
            calls this needs the line `if __name__ == "__main__":`.
        progress: whether to show a bar on a terminal.

    Raises:
        ValueError: a value outside its range, or `target` holds something else.
        OSError: a file cannot be written.
    """
    settings = Settings(num_classes, images_per_class, validation_per_class, size, seed, quality, False, variation)
    _write(Path(target), settings, _write_files, num_workers, progress)


def write_shards(
    target: str | os.PathLike[str],
    *,
    num_classes: int,
    images_per_class: int,
    validation_per_class: int,
    size: int,
    seed: int = 0,
    quality: int = 90,
    variation: float = 1.0,
    num_workers: int | None = None,
    progress: bool = True,
) -> None:
    """Writes the set packed, as `data_loaders.imagenet.packed` reads it; arguments and errors: `write_folder`.

    The images of a split go round the classes, so that every shard holds all of them. A split is written whole or not
    at all.
    """
    settings = Settings(num_classes, images_per_class, validation_per_class, size, seed, quality, True, variation)
    _write(Path(target), settings, _write_packed, num_workers, progress)


def ensure(
    target: str | os.PathLike[str],
    *,
    num_classes: int,
    images_per_class: int,
    validation_per_class: int,
    size: int,
    seed: int = 0,
    quality: int = 90,
    variation: float = 1.0,
    packed: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """The folder of the set, made by `write_folder` or `write_shards` where it is missing or not finished."""
    (write_shards if packed else write_folder)(
        target,
        num_classes=num_classes,
        images_per_class=images_per_class,
        validation_per_class=validation_per_class,
        size=size,
        seed=seed,
        quality=quality,
        variation=variation,
        num_workers=num_workers,
        progress=progress,
    )
    return Path(target)


# ---- the state of a folder -------------------------------------------------------------------------------------------


def _write(
    target: Path,
    settings: Settings,
    write: Callable[[Path, Settings, int, tqdm[Any]], None],
    num_workers: int | None,
    progress: bool,
) -> None:
    """Calls `write` unless the set is complete, in a process at a time."""
    workers = num_cores() if num_workers is None else num_workers
    check_integer("num_workers", workers, 0, 4096)
    if _is_complete(target, settings):
        return
    target.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        if _is_complete(target, settings):
            return
        _write_settings(target, settings, complete=False)
        total = settings.num_classes * (settings.images_per_class + settings.validation_per_class)
        with tqdm(total=total, unit="image", desc=target.name, disable=None if progress else True) as bar:
            write(target, settings, workers, bar)
        os.sync()  # all files in one go: to wait for the disk after each would take longer than to draw it
        _write_settings(target, settings, complete=True)


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
    for name, value in asdict(settings).items():
        if found.get(name) != value:
            message = f"{target} was made with {name} {found.get(name)}, not {value}: name another folder, or delete it"
            raise ValueError(message)
    return complete


def _write_settings(target: Path, settings: Settings, complete: bool) -> None:
    text = json.dumps({**asdict(settings), "complete": complete}, indent=2, default=int) + "\n"
    with replacing(target / SETTINGS) as temporary:
        temporary.write_text(text)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process of this machine at a time, or of the cluster where the file system locks across nodes.

    It saves work; without it, processes that make the same set write the same images, each file or shard in one go.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(target / LOCK, wait=False))
        except BlockingIOError:
            print(f"{target}: waiting for another process, which makes it", file=sys.stderr)
            stack.enter_context(locked(target / LOCK, wait=True))
        yield


# ---- files and shards ------------------------------------------------------------------------------------------------


def _write_files(target: Path, settings: Settings, num_workers: int, bar: tqdm[Any]) -> None:
    names = class_names(settings.num_classes)
    for split in FOLDERS:
        for name in names:
            (target / FOLDERS[split] / name).mkdir(parents=True, exist_ok=True)
    tasks = (
        (target, settings, split, name, index, range(start, min(start + CHUNK, settings.count(split))))
        for split in FOLDERS
        for index, name in enumerate(names)
        for start in range(0, settings.count(split), CHUNK)
    )
    with closing(_in_order(_write_chunk, tasks, num_workers)) as chunks:
        for made in chunks:
            bar.update(made)


def _write_chunk(target: Path, settings: Settings, split: str, name: str, index: int, numbers: range) -> int:
    """Writes images of one class that are missing, returns the length of `numbers`."""
    for number in numbers:
        path = target / FOLDERS[split] / name / _file_name(name, number)
        if not _is_whole(path):
            with replacing(path, sync=False) as temporary:
                temporary.write_bytes(encode(settings, split, index, number))
    return len(numbers)


def _is_whole(path: Path) -> bool:
    """Whether a JPEG file is there with its end marker, which a file cut short by a crash of the machine lacks."""
    try:
        with path.open("rb") as file:
            file.seek(-2, os.SEEK_END)
            return file.read() == b"\xff\xd9"
    except OSError:  # missing, or shorter than two bytes
        return False


def _write_packed(target: Path, settings: Settings, num_workers: int, bar: tqdm[Any]) -> None:
    from data_loaders.imagenet.packed import write_packed

    names = class_names(settings.num_classes)
    for split in FOLDERS:
        if _is_packed(target, split):
            bar.update(settings.num_classes * settings.count(split))
        else:
            with closing(_items(settings, split, names, num_workers, bar)) as items:
                write_packed(target, split, items, names, source=f"fractals of seed {settings.seed}")


def _is_packed(target: Path, split: str) -> bool:
    """Whether a split is there, as `write_packed` writes all of it or nothing, except where a machine crashes."""
    from data_loaders.imagenet.packed import PackedImages

    try:
        PackedImages(target, split)
    except (FileNotFoundError, ValueError):  # missing, or in part
        return False
    return True


def _items(
    settings: Settings, split: str, names: tuple[str, ...], num_workers: int, bar: tqdm[Any]
) -> Generator[tuple[str, int, bytes], None, None]:
    """(name, label, JPEG file) of every image of a split: the first of each class, then the second of each, ..."""
    keys = ((index, number) for number in range(settings.count(split)) for index in range(settings.num_classes))
    chunks = iter(lambda: tuple(islice(keys, CHUNK)), ())
    tasks = ((settings, split, chunk) for chunk in chunks)
    with closing(_in_order(_encode_chunk, tasks, num_workers)) as encoded:
        for images in encoded:
            for index, number, content in images:
                yield f"{names[index]}/{_file_name(names[index], number)}", index, content
                bar.update()


def _encode_chunk(settings: Settings, split: str, keys: tuple[tuple[int, int], ...]) -> list[tuple[int, int, bytes]]:
    return [(index, number, encode(settings, split, index, number)) for index, number in keys]


def encode(settings: Settings, split: str, class_index: int, number: int) -> bytes:
    """The JPEG file of an image; `number` counts those of a class in "train" or "validation"."""
    instance = number if split == "train" else VALIDATION + number
    buffer = io.BytesIO()
    image = Image.fromarray(draw(settings.seed, class_index, instance, settings.size, USUAL.times(settings.variation)))
    image.save(buffer, "JPEG", quality=settings.quality)
    return buffer.getvalue()


def _file_name(class_name: str, number: int) -> str:
    return f"{class_name}_{number:05d}.JPEG"


# ---- workers ---------------------------------------------------------------------------------------------------------

Result = TypeVar("Result")


def _in_order(
    function: Callable[..., Result], tasks: Iterator[tuple[Any, ...]], num_workers: int
) -> Generator[Result, None, None]:
    """function(*task) of every task in their order, with a few tasks a worker in flight."""
    if not num_workers:
        yield from (function(*task) for task in tasks)
        return
    # Spawned: a fork would copy the threads of torch and MPI halfway.
    context = multiprocessing.get_context("spawn")
    with signals_held_back():
        pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=follow_parent)
    pending: deque[Future[Result]] = deque()

    def submit(count: int) -> None:
        for task in islice(tasks, count):
            with signals_held_back():  # now and then a worker is started
                pending.append(pool.submit(function, *task))

    try:
        submit(4 * num_workers)
        while pending:
            result = pending.popleft().result()
            submit(1)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
