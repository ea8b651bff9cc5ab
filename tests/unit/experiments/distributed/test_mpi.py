"""MPI, where mpiexec spawned the ranks."""

import sys
import types

import pytest

from experiments.distributed import mpi
from experiments.distributed.ranks import Ranks
from experiments.settings.launch_settings import LaunchSettings


def mpi_of(rank, size):
    world = types.SimpleNamespace(rank=rank, size=size)
    return types.SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "Open MPI v5.0.11, package")


def test_mpi_is_used_where_mpiexec_spawned_the_ranks(monkeypatch):
    monkeypatch.setattr(mpi, "start_mpi", lambda: mpi_of(1, 2))
    ranks = Ranks(1, 2, 1, launcher="mpich")
    assert mpi.mpi_for_rendezvous(ranks, LaunchSettings()) is not None
    assert mpi.mpi_for_rendezvous(ranks, LaunchSettings(rendezvous="file")) is None
    for launcher in ("srun", "jsrun", "torchrun", "env"):
        assert mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher=launcher), LaunchSettings()) is None
    assert mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher="srun"), LaunchSettings(rendezvous="mpi")) is not None


def test_another_mpi_library_is_an_error(monkeypatch):
    monkeypatch.setattr(mpi, "start_mpi", lambda: mpi_of(0, 1))
    message = r"mpich started rank 1 of 2, but MPI.COMM_WORLD has rank 0 of 1: .*Open MPI v5.0.11.*rendezvous: file"
    with pytest.raises(ValueError, match=message):
        mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher="mpich"), LaunchSettings())


def test_without_mpi4py_the_file_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher="mpich"), LaunchSettings()) is None
    with pytest.raises(ValueError, match=r"launch\.rendezvous is mpi, but mpi4py cannot be used"):
        mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher="mpich"), LaunchSettings(rendezvous="mpi"))
