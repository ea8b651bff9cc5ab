"""Packs a split into shards, in parallel and resumable."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from data_loaders.files import locked
from data_loaders.imagenet import packed
from data_loaders.imagenet.folder import Images
from data_loaders.imagenet.pictures import POLICIES, ImageError, open_image, orientation, quiet, to_rgb
from data_loaders.imagenet.shards import (
    IMAGES_PER_SHARD,
    SHARD_VERSION,
    Header,
    Item,
    check_split,
    digest_of,
    read_header,
    shard_path,
    write_shard,
)
from data_loaders.workers import check_temporary_folder, follow_parent, signals_held_back

PICTURES = 2
"""Version of what is encoded again: a packing that was begun before a change is not finished with other pictures."""

# What says nothing about an image: the file system or the process failed, and another attempt may read it.
PASSING = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "EREMOTEIO", "EMFILE", "ENFILE", "ENOMEM")
    if hasattr(errno, name)
)

LEFTOVER_SECONDS = 6 * 3600
"""Age of an unfinished file that no process writes any more. Where locks hold within a node alone, a younger one may be
that of a process on another node; a shard is written within minutes."""


class OtherShardsError(ValueError):
    """A folder holds shards of other images or settings."""


@dataclass(frozen=True)
class Packing:
    """How images are packed.

    Attributes:
        resize: short side in pixels of larger images, which are encoded again as JPEG; None keeps all bytes.
        quality: of this JPEG, 1 to 100.
        images_per_shard: >= 1.
        on_corrupt: what an unreadable image does: "skip" leaves it out and names it, "stop" ends the packing.
    """

    resize: int | None = None
    quality: int = 90
    images_per_shard: int = IMAGES_PER_SHARD
    on_corrupt: str = "skip"

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize must be at least 1 pixel, got {self.resize}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1 to 100, got {self.quality}")
        if self.on_corrupt not in POLICIES:
            raise ValueError(f"on_corrupt must be {' or '.join(POLICIES)}, got {self.on_corrupt!r}")
        if self.images_per_shard < 1:
            raise ValueError(f"images_per_shard must be at least 1, got {self.images_per_shard}")


class _Task(NamedTuple):
    path: Path
    shard: int
    num_shards: int


# ---- one shard, here or in a worker ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packer:
    """Packs shards of a set; calls `advance` after each image, and ends at the next one where `is_stopped`."""

    images: Images
    header: Header
    packing: Packing
    advance: Callable[[], object]
    is_stopped: Callable[[], bool] = lambda: False

    def pack(self, task: _Task) -> None:
        left_out: list[str] = []
        with quiet():
            write_shard(task.path, self.header, task.shard, task.num_shards, self._items(task, left_out), left_out)

    def _items(self, task: _Task, left_out: list[str]) -> Iterator[Item]:
        first = task.shard * self.packing.images_per_shard
        for index in range(first, min(first + self.packing.images_per_shard, len(self.images))):
            if self.is_stopped():
                raise InterruptedError
            name = self.images.name(index)
            try:
                yield name, int(self.images.labels[index]), encode(self.images.read(index), self.packing)
            except (ImageError, OSError) as error:
                if isinstance(error, OSError) and error.errno and error.errno in PASSING:
                    raise OSError(
                        f"image {index} ({name}) cannot be read: {os.strerror(error.errno)}. It may be whole, so "
                        "that it is not left out: start the packing again, and delete the image if it fails always"
                    ) from None
                reason = str(error) if isinstance(error, ImageError) else error.strerror or str(error)
                if self.packing.on_corrupt == "stop":
                    raise ImageError(f"image {index} ({name}) cannot be read: {reason}") from None
                left_out.append(f"image {index} ({name}): {reason}")
            self.advance()


_packer: _Packer
"""Of a worker."""


def _start_worker(images: Images, header: Header, packing: Packing, num_done: Any, stop: Any) -> None:
    global _packer

    def advance() -> None:
        with num_done.get_lock():
            num_done.value += 1

    follow_parent()  # which ends a packing by the event
    _packer = _Packer(images, header, packing, advance, stop.is_set)


def _pack_in_worker(task: _Task) -> None:
    _packer.pack(task)


def encode(data: bytes, packing: Packing) -> bytes:
    """Returns the bytes given, or a smaller JPEG with the same EXIF orientation; damage shows here, as ImageError."""
    image = open_image(data)
    picture = to_rgb(image)
    short = min(picture.size)
    if packing.resize is None or short <= packing.resize:
        return data
    width, height = (round(side * packing.resize / short) for side in picture.size)
    exif = Image.Exif()
    if (turn := orientation(image)) != 1:  # kept, because the training decides whether it counts
        exif[ExifTags.Base.Orientation] = turn
    buffer = io.BytesIO()
    smaller = picture.resize((width, height), Image.Resampling.BICUBIC)
    smaller.save(buffer, "JPEG", quality=packing.quality, exif=exif)
    return buffer.getvalue()


# ---- all shards ------------------------------------------------------------------------------------------------------


def pack(
    images: Images,
    folder: str | os.PathLike[str],
    split: str,
    packing: Packing,
    *,
    num_workers: int = 1,
    progress: bool = False,
) -> packed.PackedImages:
    """Packs a split in parallel; shards that an earlier call finished stay, all others are made again.

    Each of the workers, of which one needs no other process than this, writes a shard at a time.

    Raises:
        OtherShardsError: the folder holds shards of other images or settings.
        ValueError: no worker, no such split, or another process is at work in the folder.
        ImageError: an unreadable image under "stop", or no readable one.
        OSError: writing failed, or reading for a reason that may pass.
    """
    check_split(split)
    if num_workers < 1:
        raise ValueError(f"workers must be at least 1, got {num_workers}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    settings: list[int | None] = [packing.resize, packing.quality if packing.resize else None, packing.images_per_shard]
    if packing.resize:
        settings.append(PICTURES)
    digest = digest_of([SHARD_VERSION, images.digest, *settings])
    resized = f", short side {packing.resize}, quality {packing.quality}" if packing.resize else ""
    header = Header(split, images.class_names, f"packed {images.source}{resized}", digest)
    num_shards = -(-len(images) // packing.images_per_shard)
    tasks = [_Task(shard_path(target, split, shard, num_shards), shard, num_shards) for shard in range(num_shards)]
    with (
        _alone(target, split),
        tqdm(total=len(images), desc=split, unit="image", disable=not progress, dynamic_ncols=True) as bar,
    ):
        finished = _finished(target, split, tasks, digest)
        remaining = [task for task in tasks if task.path not in finished]
        bar.update(min(len(images), len(finished) * packing.images_per_shard))
        if min(num_workers, len(remaining)) > 1:
            _pack_in_workers(remaining, (images, header, packing), min(num_workers, len(remaining)), bar)
        else:
            packer = _Packer(images, header, packing, bar.update)
            for task in remaining:
                packer.pack(task)
    result = packed.PackedImages(target, split)
    if not len(result):
        raise ImageError(f"none of the {len(images)} images can be read; the first is {result.left_out[0]}")
    _check_counts(images, result)
    return result


@contextmanager
def _alone(folder: Path, split: str) -> Iterator[None]:
    """Keeps other packings of a split out of a folder, and removes what killed ones left, where it can be locked."""
    with ExitStack() as stack:
        try:
            is_held = stack.enter_context(locked(folder / f".packing-{split}.lock", wait=False))
        except BlockingIOError:
            raise ValueError(f"another process is packing {split} into {folder}") from None
        if is_held:
            oldest = time.time() - LEFTOVER_SECONDS
            for leftover in folder.glob(f".{split}-*.tmp"):
                with suppress(FileNotFoundError):
                    if leftover.stat().st_mtime < oldest:
                        leftover.unlink()
        yield


def _finished(folder: Path, split: str, tasks: Sequence[_Task], digest: str) -> set[Path]:
    """Shards that are there already; OtherShardsError where one belongs to another set."""
    wanted = {task.path for task in tasks}
    finished = set()
    for path in sorted(folder.glob(f"{split}-*-of-*.h5")):
        try:
            same = read_header(path).pack_digest == digest
        except ValueError:  # of another version, or damaged: made again if its name is that of a shard of this set
            if path in wanted:
                continue
            same = False
        if not same or path not in wanted:
            raise OtherShardsError(
                f"{folder} holds {path.name} of other images or settings: choose another folder, or delete its shards"
            )
        finished.add(path)
    return finished


def _pack_in_workers(
    tasks: Sequence[_Task], what: tuple[Images, Header, Packing], num_workers: int, bar: tqdm[Any]
) -> None:
    """Fills shards in processes; after an error or an interruption the others end at their next image."""
    check_temporary_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, for all workers
    with signals_held_back():  # their helper process is not to die of them either
        num_done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (*what, num_done, stop)) as pool:
        before = bar.n
        try:
            with signals_held_back():
                waiting: set[Future[None]] = {pool.submit(_pack_in_worker, task) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(before + num_done.value - bar.n)
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _check_counts(images: Images, result: packed.PackedImages) -> None:
    before, after = (np.bincount(each.labels, minlength=len(each.class_names)) for each in (images, result))
    emptied = [images.class_names[label] for label in np.flatnonzero((before > 0) & (after == 0))]
    if emptied:
        raise ValueError(f"no image of {', '.join(emptied[:5])} in {result.split} can be read")
