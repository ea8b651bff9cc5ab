"""Which device is whose, and ranks whose devices do not go together."""

import sys
from types import ModuleType

import launched
import pytest
import torch

from experiments.distributed import devices
from experiments.distributed.devices import device_of, safe_start_method
from experiments.distributed.ranks import Ranks
from experiments.settings.launch_settings import LaunchSettings


def test_the_binding_is_the_same_on_all_ranks(tmp_path):
    processes = [
        launched.start(launched.gather_binding, launched.srun_variables(rank, 2), tmp_path / f"log-{rank}", tmp_path)
        for rank in range(2)
    ]
    assert launched.finish(processes) == [0, 0], (tmp_path / "log-0").read_text()
    first, second = ((tmp_path / f"binding-{rank}").read_text() for rank in range(2))
    assert first == second and "'rank': 1" in first and "'cores': '" in first and "'interface': 'lo'" in first


@pytest.mark.parametrize("in_use", ["nothing", "MPI", "a GPU"])
def test_nothing_is_forked_where_mpi_or_a_gpu_is_in_use(monkeypatch, in_use):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: in_use == "a GPU")
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    if in_use == "MPI":
        monkeypatch.setitem(sys.modules, "mpi4py.MPI", ModuleType("MPI"))
    for usual in ("fork", "spawn", "forkserver"):
        monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none, usual=usual: usual)
        assert safe_start_method() == ("forkserver" if usual == "fork" and in_use != "nothing" else usual)


def see_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "local", "device"), [(0, 3, "cpu"), (1, 3, "cuda:0"), (4, 3, "cuda:3"), (8, 0, "cuda:0")]
)
def test_the_device_of_a_rank(monkeypatch, count, local, device):
    see_gpus(monkeypatch, count)
    assert str(device_of(Ranks(3, 8, local))) == device


def test_more_ranks_than_devices(monkeypatch):
    see_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ValueError, match=r"local rank 2 on n1 has no GPU: this process sees 2 .*DEVICES=4,5.*--gpus"):
        device_of(Ranks(2, 4, 2, host="n1"))
    _, _, problem = devices.choose(Ranks(2, 4, 2, host="n1"), LaunchSettings())
    assert "local rank 2 on n1" in problem  # which the roll call reports on all ranks
    see_gpus(monkeypatch, 0)
    assert "has no GPU" in devices.choose(Ranks(), LaunchSettings(backend="nccl"))[2]
    assert devices.choose(Ranks(), LaunchSettings())[::2] == ("gloo", "")


@pytest.mark.parametrize(
    ("settings", "env", "refused"),
    [
        ({}, {}, ""),
        ({}, {"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1 gives the job GPUs, but rank 2 on n1 sees no GPU"),
        ({}, {"SLURM_GPUS_PER_NODE": "a100:4"}, "SLURM_GPUS_PER_NODE=a100:4 gives the job GPUs"),
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0 gives the job GPUs"),
        ({}, {"LSB_EFFECTIVE_RSRCREQ": "rusage[ngpus_physical=2.00/host]"}, "=2.00/host. gives the job GPUs"),
        ({}, {"LSB_EFFECTIVE_RSRCREQ": "select[ngpus>0] rusage[mem=8,ngpus_physical=0.00]"}, ""),
        ({}, {"SLURM_GPUS_ON_NODE": "0", "CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"device": "cpu"}, {"SLURM_JOB_GPUS": "0"}, ""),
        ({"device": "cuda"}, {}, "launch.device is cuda, but rank 2 on n1 sees no GPU"),
        ({"backend": "nccl"}, {}, "launch.backend is nccl, but rank 2 on n1 sees no GPU"),
        ({"device": "cpu", "backend": "nccl"}, {}, "launch.backend nccl needs GPUs, but launch.device is cpu"),
    ],
)
def test_a_job_that_was_promised_gpus_and_sees_none_stops(monkeypatch, settings, env, refused):
    see_gpus(monkeypatch, 0)
    ranks, wanted = Ranks(2, 4, 0, host="n1", scheduler="slurm"), LaunchSettings(**settings)
    if refused:
        with pytest.raises(ValueError, match=refused):
            devices.with_device(ranks, wanted, env)
    else:
        assert device_of(devices.with_device(ranks, wanted, env)).type == "cpu"
    # A variable of a shell without a job promises nothing.
    assert devices.with_device(Ranks(), LaunchSettings(), env).device == "auto"


def test_the_cpu_is_taken_where_there_are_gpus(monkeypatch):
    see_gpus(monkeypatch, 4)
    ranks = devices.with_device(Ranks(1, 2, 1), LaunchSettings(device="cpu"), {})
    assert device_of(ranks).type == "cpu"
    assert devices.choose(ranks, LaunchSettings())[::2] == ("gloo", "")
    assert devices.describe_device(ranks) == "device: cpu; world size: 2"


def facts(**different):
    return {"host": "n1", "machine": "n1", "backend": "nccl", "device": "", "problem": "", **different}


@pytest.mark.parametrize(
    ("second", "settings", "problem"),
    [
        (facts(device="GPU-b"), LaunchSettings(), ""),
        (facts(device="GPU-a"), LaunchSettings(), "ranks 0 and 1 on n1 use the same GPU GPU-a"),
        (facts(device="GPU-a", machine="n2"), LaunchSettings(), ""),
        (facts(device="GPU-a"), LaunchSettings(share_devices=True), "use the same GPU"),  # NCCL cannot
        (facts(device="GPU-a", backend="gloo"), LaunchSettings(), "wants nccl and rank 1 on n1 wants gloo"),
        (facts(problem="no such device"), LaunchSettings(), "rank 1: no such device"),
    ],
)
def test_ranks_that_cannot_work_together(second, settings, problem):
    found = devices.judge([facts(device="GPU-a"), second], settings)
    assert problem in found and bool(problem) == bool(found)
    shared = [facts(device="GPU-a", backend="gloo")] * 2
    assert devices.judge(shared, LaunchSettings(share_devices=True)) == ""
    assert "use the same GPU" in devices.judge(shared, LaunchSettings())
