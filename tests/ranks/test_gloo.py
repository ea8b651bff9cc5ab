"""The fixture spawn_ranks itself."""

import pytest
import torch
import torch.distributed as dist


def sum_of_ranks(rank, world_size, offset):
    value = torch.tensor(float(rank + offset))
    dist.all_reduce(value)
    return rank, value.item(), torch.get_num_threads()


def fail_on_last(rank, world_size):
    if rank == world_size - 1:
        raise RuntimeError("this rank fails")


def test_ranks_talk_and_return_their_results(spawn_ranks):
    assert spawn_ranks(sum_of_ranks, 2, 10) == [(0, 21.0, 1), (1, 21.0, 1)]


def test_an_exception_on_a_rank_reaches_the_test(spawn_ranks):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="this rank fails"):
        spawn_ranks(fail_on_last, 2)
