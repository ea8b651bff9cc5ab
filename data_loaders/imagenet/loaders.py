"""Batches of pixels of a set, for training and evaluation on any number of ranks."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data_loaders.imagenet.decode import Decoding, check_decoder
from data_loaders.imagenet.folder import Images
from data_loaders.imagenet.pictures import ImageError
from data_loaders.imagenet.reading import Answer, Key, Reader
from data_loaders.imagenet.sampling import (
    STATISTICS_EPOCH,
    epoch_order,
    rank_indices,
    shard_bounds,
)
from data_loaders.workers import check_temporary_folder, follow_parent, signals_held_back

log = logging.getLogger("data_loaders")
Self = TypeVar("Self", bound="_Loader")


def _start_worker(_: int) -> None:
    follow_parent()


def _from_workers(answers: Iterator[Answer]) -> Iterator[Answer]:
    """Says what has happened where a worker that died is noticed by a broken connection first."""
    try:
        yield from answers
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("a worker that reads images ended unexpectedly: was it killed for memory?") from error


def _as_it_is(answer: Answer) -> Answer:
    return answer


# ---- loaders ---------------------------------------------------------------------------------------------------------


class _Loader:
    """Passes over a set, in this process or by workers that live until `close`.

    Attributes:
        unreadable: reasons by index of the images that this rank could not read so far; each was logged once.
        num_unreadable: how many the present pass met, or the last one.
        num_fallbacks: images so far that the chosen decoder refused and Pillow read; the first is logged.
    """

    def __init__(
        self,
        images: Images,
        decoding: Decoding,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        start_method: str = "forkserver",
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 to {world_size - 1}, got {rank}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_decoder(decoding.decoder)
        self.images, self.decoding, self.batch_size, self.seed = images, decoding, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._check_sizes()
        self.unreadable: dict[int, str] = {}
        self.num_unreadable = self.num_fallbacks = 0
        self._pass = 0
        self._started = False  # the workers
        self._reader = Reader(images, decoding, seed)
        self._keys: list[Key] = []  # of the present pass; the workers stay while they change
        self._workers: DataLoader[Answer] | None = None
        self._pin = pin_memory and not num_workers  # DataLoader pins for itself
        if num_workers:
            self._workers = self._start(num_workers, start_method, pin_memory)

    def _check_sizes(self) -> None:
        """Raises ValueError for a batch size that the set or the number of ranks does not allow."""

    def _start(self, num_workers: int, start_method: str, pin_memory: bool) -> DataLoader[Answer]:
        check_temporary_folder()
        context = multiprocessing.get_context(start_method)
        if start_method == "forkserver":  # it imports torch once, for all workers; without effect once it runs
            context.set_forkserver_preload(["__main__", __name__])
        return DataLoader(
            self._reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._keys,
            num_workers=num_workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            generator=torch.Generator(),  # or the global one, which training uses, would be advanced
            persistent_workers=True,
        )

    def _answers(self, keys: Iterable[Key], count: int) -> Iterator[Answer]:
        """Answers in the order of the `count` keys, with what could not be read noted; one pass at a time."""
        self._pass += 1
        number, self.num_unreadable = self._pass, 0
        if self._workers is None:
            answers: Iterator[Answer] = map(self._pinned if self._pin else self._reader.__getitem__, keys)
        else:
            self._keys[:] = keys
            with nullcontext() if self._started else signals_held_back():
                answers = _from_workers(iter(self._workers))
            self._started = True
        for place, answer in enumerate(answers, start=1):
            self._note(answer)
            yield answer
            if number != self._pass and place < count:
                raise RuntimeError("another pass over the same loader was begun before this one ended")

    def _pinned(self, key: Key) -> Answer:
        answer = self._reader[key]
        return answer._replace(images=answer.images.pin_memory(), labels=answer.labels.pin_memory())

    def _note(self, answer: Answer) -> None:
        self.num_unreadable += len(answer.unreadable)
        if answer.num_fallbacks and not self.num_fallbacks:
            log.warning("decoder %s refuses some images, which Pillow reads", self.decoding.decoder)
        self.num_fallbacks += answer.num_fallbacks
        for index, reason in answer.unreadable.items():
            if index not in self.unreadable:
                self.unreadable[index] = reason
                if not (answer.failed and self.decoding.on_corrupt == "stop"):
                    log.warning("image %d (%s) cannot be read: %s", index, self.images.name(index), reason)
        if answer.failed:
            index, reason = next(iter(answer.unreadable.items()))
            named = f"image {index} ({self.images.name(index)})"
            if self.decoding.on_corrupt == "stop":
                raise ImageError(f"{named} cannot be read: {reason}")
            raise ImageError(f"{len(answer.unreadable)} images in a row cannot be read, from {named} on: {reason}")

    def close(self) -> None:
        """Ends the workers; later passes are made in this process."""
        self._pass += 1
        self._workers = None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TrainLoader(_Loader):
    """Shuffled batches of augmented images, determined by (seed, epoch, step): the same images for any number of ranks
    and workers, and from any step on.

    Each image is cropped at random and mirrored in half of the cases, see data_loaders.imagenet.decode. An image that
    cannot be read is replaced by the next one in the set that can. Batches are uint8: the device normalizes them.

    Args:
        images: the set.
        decoding: size of the crop, decoder, what an unreadable image does.
        batch_size: images of all ranks together; a multiple of `world_size`.
        seed: of orders and augmentation.
        rank, world_size: of this process, and the number of ranks.
        num_workers: processes that decode; 0 for this one.
        start_method: of the workers: "fork", "spawn" or "forkserver". A forkserver that starts here leaves SIGTERM
            blocked in all processes of the program that come from it later: those it terminates must be of "spawn".
        pin_memory: batches in page-locked memory, for asynchronous copies to a GPU, whoever decodes.

    Attributes:
        steps_per_epoch: full global batches; the remainder is left out, other images in each epoch.

    Raises:
        ValueError: an argument outside its range, a decoder that does not import, fewer images than a batch.
    """

    def _check_sizes(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                "batch_size counts the images of all ranks and must be a multiple of their number, "
                f"{self.world_size}, got {self.batch_size}"
            )
        if len(self.images) < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than the set, which has {len(self.images)} images"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images) // self.batch_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (batch_size / world_size, 3, size, size) and labels of this rank in an epoch, from step `first` on.

        Nothing before it is read. ImageError for an unreadable image under "stop", or too many in a row.
        """
        order = epoch_order(self.seed, epoch, len(self.images))
        place = (self.batch_size, self.rank, self.world_size)
        steps = range(first, self.steps_per_epoch)
        keys = (Key(epoch, rank_indices(order, step, *place)) for step in steps)
        return ((answer.images, answer.labels) for answer in self._answers(keys, len(steps)))

    def statistics_batches(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """`count` training images to recompute statistics on: always the same ones, with the same crops.

        They are cut into the same batches for any number of ranks; batch b goes to rank b modulo world_size. The last
        batch may be smaller, and ranks may get different numbers of batches.
        """
        if not 1 <= count <= len(self.images) or batch_size < 1:
            raise ValueError(
                f"statistics take 1 to {len(self.images)} images, the size of the set, in batches of at least 1, "
                f"got {count} in batches of {batch_size}"
            )
        chosen = epoch_order(self.seed, STATISTICS_EPOCH, len(self.images))[:count]
        starts = range(self.rank * batch_size, count, self.world_size * batch_size)
        keys = (Key(STATISTICS_EPOCH, chosen[start : start + batch_size]) for start in starts)
        return (answer.images for answer in self._answers(keys, len(starts)))


class EvaluationLoader(_Loader):
    """Every image exactly once over the ranks, in contiguous shards of unequal size: no padding, no repetition.

    Short side resized, central crop. An image that cannot be read is left out and counted: over all ranks, images
    returned and `num_unreadable` add up to the size of the set. Args as `TrainLoader`, but for `batch_size`, which
    counts the images of this rank, of which there are `num_images`.
    """

    def __init__(self, images: Images, decoding: Decoding, *, batch_size: int, **share: Any) -> None:
        super().__init__(images, decoding, batch_size=batch_size, seed=0, **share)
        self._bounds = shard_bounds(len(images), self.rank, self.world_size)
        self.num_images = self._bounds[1] - self._bounds[0]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, 3, size, size), 0 < b <= batch_size, and labels; ImageError under "stop" or if all are broken."""
        start, stop = self._bounds
        indices = np.arange(start, stop, dtype=np.int64)
        starts = range(0, stop - start, self.batch_size)
        keys = (Key(None, indices[each : each + self.batch_size]) for each in starts)
        for answer in self._answers(keys, len(starts)):
            if len(answer.labels):
                yield answer.images, answer.labels
        if self.num_unreadable == len(self.images):
            reason = next(iter(self.unreadable.values()))
            raise ImageError(f"none of the {len(self.images)} images can be read, the first because {reason}")
