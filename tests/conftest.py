"""Fixtures of all tests, the marks that follow from a test's folder, and one thread for each process."""

import itertools
import os
import random
import signal
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too

import gloo
import marks
import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent

torch.set_num_threads(1)
# torch 2.13 takes kernels from its cache that were made for other vector instructions: they compute wrong numbers.
KERNELS = f"torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability().replace(' ', '_')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), KERNELS)))
# A shell starts background processes with SIGINT ignored, and their children inherit that: Ctrl-C has to work in tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        given = {mark.name for mark in item.iter_markers()}
        for mark in marks.marks(item.path.relative_to(TESTS), given, getattr(item, "fixturenames", ())):
            item.add_marker(mark)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: marks.place(item.path.relative_to(TESTS)))


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
