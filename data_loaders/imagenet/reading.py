"""A batch of images from its key alone: the same in every process, whatever the process read before."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.imagenet.decode import NUM_UNIFORM, Decoder, Decoding, Pixels
from data_loaders.imagenet.folder import Images
from data_loaders.imagenet.pictures import ImageError, quiet
from data_loaders.imagenet.sampling import sample_seed, uniform

MAX_REPLACED = 1000  # unreadable images in a row, after which the storage is to blame and not an image


class Key(NamedTuple):
    """What is asked of a worker: images of an epoch; None for evaluation."""

    epoch: int | None
    indices: NDArray[np.int64]


class Answer(NamedTuple):
    """What a worker answers.

    Attributes:
        images: (b, 3, size, size), uint8, in channels-last memory.
        labels: (b,).
        unreadable: reasons by index.
        failed: whether the batch is worthless.
        num_fallbacks: images that the chosen decoder refused and Pillow read.
    """

    images: Tensor
    labels: Tensor
    unreadable: dict[int, str]
    failed: bool
    num_fallbacks: int


class Reader:
    """Makes a batch from its key alone: the same in every process, whatever it made before."""

    def __init__(self, images: Images, decoding: Decoding, seed: int) -> None:
        self.images, self.decoding, self.seed = images, decoding, seed
        self._decoder: Decoder | None = None

    def __getitem__(self, key: Key) -> Answer:
        size = self.decoding.size
        squares = np.empty((len(key.indices), size, size, 3), np.uint8)
        unreadable: dict[int, str] = {}
        if self._decoder is None:
            self._decoder = Decoder(self.decoding)
        before = self._decoder.num_fallbacks
        with quiet():
            make = self._evaluation if key.epoch is None else self._training
            read = make(self._decoder, key, squares, unreadable)
        failed = -1 in read or bool(unreadable and self.decoding.on_corrupt == "stop")
        pixels = torch.from_numpy(squares[: len(read)]).permute(0, 3, 1, 2)
        labels = self.images.labels[np.array(read, np.int64)]
        return Answer(pixels, torch.from_numpy(labels), unreadable, failed, self._decoder.num_fallbacks - before)

    def _training(self, decoder: Decoder, key: Key, squares: Pixels, unreadable: dict[int, str]) -> list[int]:
        """An image an entry: the one asked for, or in its place the next one that can be read."""
        numbers = uniform(sample_seed(self.seed, key.epoch or 0, key.indices), NUM_UNIFORM).tolist()
        attempts = 1 if self.decoding.on_corrupt == "stop" else min(len(self.images), MAX_REPLACED)
        read = []
        for row, index in enumerate(key.indices.tolist()):
            target = squares[row : row + 1]
            candidates = (each % len(self.images) for each in range(index, index + attempts))
            read.append(next((c for c in candidates if self._reads(decoder, c, numbers[row], target, unreadable)), -1))
            if read[-1] < 0:
                break
        return read

    def _evaluation(self, decoder: Decoder, key: Key, squares: Pixels, unreadable: dict[int, str]) -> list[int]:
        """The images that can be read."""
        read: list[int] = []
        for index in key.indices.tolist():
            if self._reads(decoder, index, None, squares[len(read) : len(read) + 1], unreadable):
                read.append(index)
            elif self.decoding.on_corrupt == "stop":
                break
        return read

    def _reads(
        self, decoder: Decoder, index: int, numbers: list[float] | None, target: Pixels, unreadable: dict[int, str]
    ) -> bool:
        try:
            target[0] = decoder(self.images.read(index), numbers)
            return True
        except ImageError as error:
            unreadable[index] = str(error)
        except OSError as error:
            unreadable[index] = error.strerror or str(error)
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None}  # each process makes its own
