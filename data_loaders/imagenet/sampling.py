"""Orders and random numbers that depend on (seed, epoch, index) alone: no state, the same for any ranks and workers.

All of them are outputs of SplitMix64 (Steele, Lea, Flood 2014): integer arithmetic, hence the same on every machine and
with every version of numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STATISTICS_EPOCH = -1  # stands for no epoch of the training: the images that BatchNorm statistics are recomputed on

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ORDER, _AUGMENTATION = 1, 2  # separate streams


def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """A random permutation of the images, the same on every rank; seed and epoch count modulo 2^64.

    Global batch b of B images is order[b B : (b + 1) B], and rank r of W takes its entries r, r + W, ...

    The permutation sorts the images by one output of SplitMix64 each. They all differ, because the map is one to one.
    """
    return np.argsort(_stream(seed, epoch, _ORDER, np.arange(num_images, dtype=np.uint64))).astype(np.int64)


def rank_indices(
    order: NDArray[np.int64], step: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """What a rank reads at a step: entries rank, rank + W, ... of the global batch, see `epoch_order`."""
    return order[step * batch_size + rank : (step + 1) * batch_size : world_size]


def shard_bounds(num_images: int, rank: int, world_size: int) -> tuple[int, int]:
    """First index of the contiguous shard of a rank, and the one after its last; sizes differ by one at most."""
    return num_images * rank // world_size, num_images * (rank + 1) // world_size


def sample_seed(seed: int, epoch: int, index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for the augmentation of each image, (n,), whoever reads it; seed and epoch count modulo 2^64."""
    return _stream(seed, epoch, _AUGMENTATION, index.astype(np.uint64))


def uniform(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) from each seed, (n, count), with 53 random bits each."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return (_mix(seeds[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _stream(seed: int, epoch: int, stream: int, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output number `index` of the generator that belongs to (seed, epoch, stream)."""
    state = 0
    for word in (stream, seed, epoch):
        state = int(_mix(np.array([(state + word * _GAMMA + _GAMMA) & _MASK], dtype=np.uint64))[0])
    return _mix(np.uint64(state) + (index + np.uint64(1)) * np.uint64(_GAMMA))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64, one to one on 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
