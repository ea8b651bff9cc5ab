"""Orders and seeds: permutations, the same for any ranks, independent of each other, fixed for good."""

import numpy as np
import pytest

from data_loaders.imagenet.sampling import epoch_order, rank_indices, sample_seed, shard_bounds, uniform

ORDER = [3, 2, 0, 6, 9, 4, 1, 8, 7, 11, 5, 10]
SEEDS = [10372422686677323579, 15591048023150110025, 817385246985199218]


@pytest.mark.parametrize("num_images", [0, 1, 2, 97, 10_000])
def test_an_order_is_a_permutation(num_images):
    order = epoch_order(3, 5, num_images)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_images))


def test_orders_differ_by_seed_and_epoch_and_are_reproducible():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1, 2) for epoch in (-1, 0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert np.array_equal(orders[0], epoch_order(0, -1, 100))


def test_orders_and_seeds_never_change():
    """A run that goes on after an update reads what it would have read; the numbers were written down once."""
    assert epoch_order(7, 3, 12).tolist() == ORDER
    assert [int(each) for each in sample_seed(7, 3, np.array([0, 1, 1_281_166]))] == SEEDS


def test_splitmix64_is_the_published_generator():
    """First outputs for the seed 1234567, as listed with the reference implementation."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    numbers = uniform(np.array([1234567], dtype=np.uint64), 3)
    assert numbers.tolist() == [[(output >> 11) * 2.0**-53 for output in outputs]]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_interleave_to_the_global_batch(world_size):
    order = epoch_order(1, 2, 100)
    for step in range(100 // 24):
        parts = [rank_indices(order, step, 24, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.stack(parts, axis=1).ravel(), order[24 * step : 24 * step + 24])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 97, 120])
def test_shards_of_an_evaluation_partition_the_set(world_size):
    bounds = [shard_bounds(97, rank, world_size) for rank in range(world_size)]
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(97))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_seeds_depend_on_all_three_and_on_nothing_else():
    index = np.arange(1000)
    seeds = np.concatenate([sample_seed(seed, epoch, index) for seed in (0, 1) for epoch in (-1, 0, 1)])
    assert len(set(seeds.tolist())) == len(seeds)
    assert np.array_equal(sample_seed(1, 0, index[::-1])[::-1], sample_seed(1, 0, index))
    assert sample_seed(0, 1, np.array([0])) != sample_seed(1, 0, np.array([0]))
