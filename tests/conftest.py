"""Fixtures of all tests: fixed seeds, one thread, and processes joined by gloo."""

import itertools
import random

import gloo
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def spawn_ranks(tmp_path):
    """spawn_ranks(function, world_size, *args): the results of function(rank, world_size, *args), by rank (gloo.py)."""
    folders = (tmp_path / f"ranks-{number}" for number in itertools.count())
    return lambda function, world_size, *args: gloo.spawn_ranks(next(folders), function, world_size, *args)
