import os
import resource

import launched
import pytest
import torch
import torch.distributed as dist

from experiments.distributed import process_group
from experiments.distributed.departure import control_group, end_on_failure, leave, stop_process_group
from experiments.distributed.devices import binding
from experiments.distributed.process_group import start_process_group
from experiments.distributed.ranks import Ranks, ranks_from_environment
from experiments.distributed.step_vote import StepVote
from experiments.runs.checkpoint import Checkpoints
from experiments.settings.launch_settings import LaunchSettings
from experiments.settings.schema import read_settings


@pytest.fixture
def environment(monkeypatch):
    """The environment of a single process, restored afterwards."""
    clean = launched.clean_environment()
    for name in os.environ.keys() - clean.keys():
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield os.environ
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


# --- settings


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"start_seconds": 0}, "launch.start_seconds must be greater than 0"),
        ({"backend": "mpi"}, "launch.backend must be one of auto, nccl, gloo"),
        ({"device": "gpu"}, "launch.device must be one of auto, cpu, cuda"),
        ({"interface": ""}, "launch.interface must be a text that is not empty"),
        ({"timeout": 3}, "unknown key launch.timeout"),
    ],
)
def test_a_wrong_setting_is_named(raw, message):
    with pytest.raises(ValueError, match=message):
        read_settings(LaunchSettings, raw, "launch")


# --- open files


@pytest.fixture
def limit(monkeypatch):
    """limit(soft, hard): such a limit of open files, and the list of what it is set to."""
    changes = []

    def begin(soft, hard):
        limits = [(soft, hard)]
        monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
        monkeypatch.setattr(resource, "setrlimit", lambda _, new: (limits.append(new), changes.append(new)))
        return changes

    return begin


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, resource.RLIM_INFINITY, [(5 * 1536 + 512, resource.RLIM_INFINITY)]),
        (1024, 4096, [(4096, 4096)]),
        (20_000, 20_000, []),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, []),
    ],
)
def test_many_ranks_need_many_files(limit, soft, hard, expected):
    changes = limit(soft, hard)
    process_group.allow_many_files(1536)
    assert changes == expected
    text = process_group.few_files(Ranks(3, 1536, host="n7"))
    assert bool(text) == (hard == 4096)
    if text:
        assert "a process on n7 may open 4096 files, and one of 1536 ranks needs 4672" in text


def limited(folder):
    """A rank with few files to open; writes the limit afterwards."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    ranks = ranks_from_environment(os.environ)
    start_process_group(ranks, LaunchSettings(start_seconds=30.0), folder)
    (folder / f"limit-{ranks.rank}").write_text(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    stop_process_group(ranks)
    leave(0)


def test_every_rank_may_open_more_files(tmp_path):
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    variables = [launched.srun_variables(rank, 2) for rank in range(2)]
    processes = [launched.start(limited, *both, tmp_path) for both in zip(variables, logs, strict=True)]
    assert launched.finish(processes) == [0, 0], logs[0].read_text()
    assert [(tmp_path / f"limit-{rank}").read_text() for rank in range(2)] == ["522", "522"]


# --- groups beside the world


def count_groups(folder):
    """Runs that come and go in one process group, and then in another one."""
    ranks = ranks_from_environment(os.environ)
    counts = []
    for _ in range(2):
        start_process_group(ranks, LaunchSettings(start_seconds=30.0), folder)
        numbers = [len(dist.distributed_c10d._world.pg_map)]
        for run in range(3):
            Checkpoints(folder / "run", ranks).save(run, {}, {})
            assert StepVote(ranks).vote_now(run, ranks.rank == 1, True).stop
            numbers.append(len(dist.distributed_c10d._world.pg_map))
        stop_process_group(ranks)
        counts.append(numbers)
    (folder / f"groups-{ranks.rank}").write_text(str(counts))
    leave(0)


def test_runs_share_their_groups(tmp_path):
    processes = [
        launched.start(count_groups, launched.srun_variables(rank, 2), tmp_path / "log", tmp_path) for rank in range(2)
    ]
    assert launched.finish(processes) == [0, 0], (tmp_path / "log").read_text()
    # The world and control
    assert [(tmp_path / f"groups-{rank}").read_text() for rank in range(2)] == [str([[2, 2, 2, 2]] * 2)] * 2


def test_a_rank_without_a_group_is_an_error():
    assert control_group(Ranks()) is None
    with pytest.raises(RuntimeError, match="rank 1 of 2 has no process group yet"):
        control_group(Ranks(1, 2, 1))


# --- one process


def test_one_process_needs_no_network(monkeypatch, environment):
    def forbidden(*arguments, **keywords):
        raise AssertionError("a socket")

    monkeypatch.setattr("socket.socket", forbidden)
    start_process_group(Ranks())
    assert not torch.distributed.is_initialized()
    [place] = binding(Ranks())
    assert place["rank"] == 0 and place["pid"] == os.getpid() and place["cores"]
    stop_process_group(Ranks())
    with pytest.raises(KeyError), end_on_failure(Ranks()):
        raise KeyError
    with pytest.raises(SystemExit, match="3"):
        leave(3)
