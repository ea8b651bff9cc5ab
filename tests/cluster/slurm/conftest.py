"""One Slurm cluster for all tests of this folder."""

import cluster as emulated
import pytest


@pytest.fixture(scope="session")
def cluster():
    """A running cluster of four nodes, or a skip that says what is missing."""
    reason = emulated.missing()
    if reason:
        pytest.skip(reason)
    instance = emulated.Cluster()
    try:
        instance.start()
        yield instance
    finally:
        instance.stop()
