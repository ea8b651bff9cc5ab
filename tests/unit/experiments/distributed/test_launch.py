import os
import resource
import signal
import sys
import types

import launched
import pytest
import torch
import torch.distributed as dist

from experiments.distributed import devices, launch, mpi
from experiments.distributed.departure import control_group, end_on_failure, leave, stop_process_group
from experiments.distributed.devices import binding, device_of, safe_start_method
from experiments.distributed.launch import ranks_from_environment, start_process_group
from experiments.distributed.ranks import Ranks
from experiments.distributed.step_vote import StepVote
from experiments.runs.checkpoint import Checkpoints
from experiments.settings.launch_settings import LaunchSettings
from experiments.settings.schema import read_settings

BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


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


# --- ranks from the environment (test_ranks.py has the launchers)


def test_a_single_process():
    assert ranks_from_environment({"HOME": "/"}) == Ranks()
    assert Ranks().world_size == 1


def test_a_process_of_four():
    ranks = ranks_from_environment(BY_HAND)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)
    assert (ranks.master_address, ranks.master_port) == ("host", 29500)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_a_missing_variable_is_named(name):
    env = {key: value for key, value in BY_HAND.items() if key != name}
    with pytest.raises(ValueError, match=rf"environment variable {name} is missing .*torchrun sets all of"):
        ranks_from_environment(env)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "x", "RANK must be an integer >= 0, got 'x'"),
        ("RANK", "-1", "RANK must be an integer >= 0, got '-1'"),
        ("RANK", "4", "RANK=4 must be below WORLD_SIZE=4"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be an integer >= 1"),
        ("LOCAL_RANK", "7", "LOCAL_RANK=7 must not exceed RANK=3"),
        ("MASTER_PORT", "70000", r"MASTER_PORT must be an integer in \[1, 65535\]"),
        ("MASTER_ADDR", "", "MASTER_ADDR must name the host"),
    ],
)
def test_a_wrong_variable_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        ranks_from_environment(BY_HAND | {name: value})


def test_pmix_without_mpi4py_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"the number of ranks is known to MPI alone, and mpi4py cannot be used"):
        ranks_from_environment({"PMIX_RANK": "0"})


# --- settings


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"start_seconds": 0}, "launch.start_seconds must be greater than 0"),
        ({"backend": "mpi"}, "launch.backend must be one of auto, nccl, gloo"),
        ({"device": "gpu"}, "launch.device must be one of auto, cpu, cuda"),
        ({"nccl": {"PATH": "x"}}, "a name in launch.nccl must be a variable NCCL_"),
        ({"nccl": ["NCCL_DEBUG"]}, "launch.nccl must be a mapping"),
        ({"interface": ""}, "launch.interface must be a text that is not empty"),
        ({"flight_recorder": -1}, "launch.flight_recorder must be greater than or equal to 0"),
        ({"start_method": "fork"}, "unknown key launch.start_method"),  # the problem has it
        ({"timeout": 3}, "unknown key launch.timeout"),
    ],
)
def test_a_wrong_setting_is_named(raw, message):
    with pytest.raises(ValueError, match=message):
        read_settings(LaunchSettings, raw, "launch")


def test_settings_reach_nccl_but_not_over_what_was_exported(environment, tmp_path):
    variables = {"NCCL_DEBUG": "WARN", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": 600, "NCCL_IB_DISABLE": True}
    raw = {"nccl": variables, "flight_recorder": 100}
    settings = read_settings(LaunchSettings, raw, "launch")
    environment["NCCL_DEBUG"] = "INFO"
    launch._export_settings(settings, tmp_path)
    assert environment["NCCL_DEBUG"] == "INFO"
    assert environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "600" and environment["NCCL_IB_DISABLE"] == "1"
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert environment["TORCH_FR_BUFFER_SIZE"] == "100" and environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))
    assert "TORCH_DISTRIBUTED_DEBUG" not in environment


def test_no_flight_recorder(environment):
    launch._export_settings(LaunchSettings(flight_recorder=0), None)
    assert not {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"} & environment.keys()


@pytest.mark.parametrize("in_use", ["nothing", "MPI", "a GPU"])
def test_nothing_is_forked_where_mpi_or_a_gpu_is_in_use(monkeypatch, in_use):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: in_use == "a GPU")
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setattr(mpi, "_was_used", in_use == "MPI")
    assert safe_start_method("spawn") == "spawn" and safe_start_method("forkserver") == "forkserver"
    assert safe_start_method("fork") == ("fork" if in_use == "nothing" else "forkserver")
    for usual in ("fork", "spawn", "forkserver"):
        monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none, usual=usual: usual)
        assert safe_start_method() == safe_start_method(usual)


# --- devices


def test_device():
    assert device_of(Ranks()).type == ("cuda" if torch.cuda.is_available() else "cpu")


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
    with pytest.raises(
        ValueError, match=r"local rank 2 on n1 has no GPU: this process sees 2 .*DEVICES=4,5.*--gpus-per"
    ):
        device_of(Ranks(2, 4, 2, host="n1"))
    _, _, problem = devices.choose(Ranks(2, 4, 2, host="n1"), LaunchSettings())
    assert "local rank 2 on n1" in problem  # which the roll call tells to all ranks
    see_gpus(monkeypatch, 0)
    assert "has no GPU" in devices.choose(Ranks(), LaunchSettings(backend="nccl"))[2]
    assert "launch.debug needs" in devices.choose(Ranks(), LaunchSettings(debug=True, backend="gloo"))[2]
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


def test_a_variable_of_a_shell_without_a_job_promises_nothing(monkeypatch):
    see_gpus(monkeypatch, 0)
    assert devices.with_device(Ranks(), LaunchSettings(), {"CUDA_VISIBLE_DEVICES": "0"}).device == "auto"


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
        (facts(backend="gloo"), LaunchSettings(), "rank 0 on n1 wants nccl and rank 1 on n1 wants gloo"),
        (facts(problem="no such device"), LaunchSettings(), "rank 1: no such device"),
    ],
)
def test_ranks_that_cannot_work_together(second, settings, problem):
    told = devices.judge([facts(device="GPU-a"), second], settings)
    assert problem in told and bool(problem) == bool(told)


def test_ranks_may_share_a_device_by_gloo():
    shared = [facts(device="GPU-a", backend="gloo")] * 2
    assert devices.judge(shared, LaunchSettings(share_devices=True)) == ""
    assert "use the same GPU" in devices.judge(shared, LaunchSettings())


# --- open files


@pytest.fixture
def limit(monkeypatch):
    """limit(soft, hard): such a limit of open files, and the list of what it is set to."""
    told = []

    def begin(soft, hard):
        limits = [(soft, hard)]
        monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
        monkeypatch.setattr(resource, "setrlimit", lambda _, new: (limits.append(new), told.append(new)))
        return told

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
    told = limit(soft, hard)
    launch._allow_many_files(1536)
    assert told == expected
    text = launch._few_files(Ranks(3, 1536, host="n7"))
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
    told = []
    for _ in range(2):
        start_process_group(ranks, LaunchSettings(start_seconds=30.0), folder)
        numbers = [len(dist.distributed_c10d._world.pg_map)]
        for run in range(3):
            for asynchronous in (False, True):
                checkpoints = Checkpoints(folder / "run", ranks, asynchronous=asynchronous)
                checkpoints.save(run, {}, {})
                checkpoints.close()
            assert StepVote(ranks).vote_now(run, ranks.rank == 1, True).stop
            numbers.append(len(dist.distributed_c10d._world.pg_map))
        stop_process_group(ranks)
        told.append(numbers)
    (folder / f"groups-{ranks.rank}").write_text(str(told))
    leave(0)


def test_runs_share_their_groups(tmp_path):
    processes = [
        launched.start(count_groups, launched.srun_variables(rank, 2), tmp_path / "log", tmp_path) for rank in range(2)
    ]
    assert launched.finish(processes) == [0, 0], (tmp_path / "log").read_text()
    # The world and control
    assert [(tmp_path / f"groups-{rank}").read_text() for rank in range(2)] == [str([[2, 2, 2, 2]] * 2)] * 2


def test_a_rank_without_a_group_is_told():
    assert control_group(Ranks()) is None
    with pytest.raises(RuntimeError, match="rank 1 of 2 has no process group yet"):
        control_group(Ranks(1, 2, 1))


# --- MPI


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


def test_another_mpi_library_is_told(monkeypatch):
    monkeypatch.setattr(mpi, "start_mpi", lambda: mpi_of(0, 1))
    message = r"mpich started rank 1 of 2, but MPI.COMM_WORLD has rank 0 of 1: .*Open MPI v5.0.11.*rendezvous: file"
    with pytest.raises(ValueError, match=message):
        mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher="mpich"), LaunchSettings())


def test_without_mpi4py_the_file_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher="mpich"), LaunchSettings()) is None
    with pytest.raises(ValueError, match=r"launch\.rendezvous is mpi, but mpi4py cannot be used"):
        mpi.mpi_for_rendezvous(Ranks(1, 2, 1, launcher="mpich"), LaunchSettings(rendezvous="mpi"))


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


# --- several processes


def run_job(tmp_path, *args, size=2):
    """Exit codes and logs of a job of `size` tasks of srun."""
    processes = [
        launched.start(launched.job, launched.srun_variables(rank, size), tmp_path / f"log-{rank}", tmp_path, *args)
        for rank in range(size)
    ]
    return launched.finish(processes), [(tmp_path / f"log-{rank}").read_text() for rank in range(size)]


def test_the_binding_is_the_same_on_all_ranks(tmp_path):
    processes = [
        launched.start(launched.gather_binding, launched.srun_variables(rank, 2), tmp_path / f"log-{rank}", tmp_path)
        for rank in range(2)
    ]
    assert launched.finish(processes) == [0, 0], (tmp_path / "log-0").read_text()
    first, second = ((tmp_path / f"binding-{rank}").read_text() for rank in range(2))
    assert first == second and "'rank': 1" in first and "'cores': '" in first and "'interface': 'lo'" in first


@pytest.mark.parametrize(
    ("fail", "failing"),
    [("raises", 1), ("raises", 0), ("alone", 1), ("alone", 0), ("mistake", 1), ("afterwards", 0), ("afterwards", 1)],
)
def test_a_rank_that_fails_ends_the_job_with_one_traceback(tmp_path, fail, failing):
    """The other one waits in a collective, or is "alone", far from any, or "afterwards" about to leave."""
    codes, logs = run_job(tmp_path, fail, failing)
    other = 1 - failing
    if fail == "mistake":
        assert codes[failing] == 2 and logs[failing].count("error: rank 1 on") == 1
        assert "the batch has 3 rows" in logs[failing] and "Traceback" not in logs[failing]
    else:
        assert codes[failing] == 1 and logs[failing].startswith(f"rank {failing} on ")
        assert "Traceback" in logs[failing] and "KeyError: 'no such thing'" in logs[failing]
    assert codes[other] == 1
    assert f"ended because rank {failing} on " in logs[other] and "Traceback" not in logs[other]
    assert len([line for line in logs[other].splitlines() if not line.endswith(" summed")]) == 1


def test_ranks_leave_together(tmp_path):
    processes = [
        launched.start(launched.work_after_the_group, launched.srun_variables(rank, 2), tmp_path / "log", tmp_path)
        for rank in range(2)
    ]
    processes[1].join(60)
    assert (tmp_path / "written").exists()
    assert launched.finish(processes) == [75, 75], (tmp_path / "log").read_text()


def only_line(log):
    """What a rank says of the end of another one; torch itself warns of a lost store in many more lines."""
    assert "Traceback (most recent call last)" not in log
    [line] = [line for line in log.splitlines() if line.startswith(("rank ", "error: "))]
    return line


@pytest.mark.parametrize(("fail", "failing"), [("killed", 1), ("killed", 0), ("killed alone", 0)])
def test_a_rank_that_is_killed_ends_the_job(tmp_path, fail, failing):
    codes, logs = run_job(tmp_path, fail, failing)
    assert codes[failing] == -9 and codes[1 - failing] == 1
    other = only_line(logs[1 - failing])
    if failing == 0:
        assert "ended because rank 0 failed: it ended, and its store with it" in other
    else:  # which could not say anything
        assert other.startswith("error: rank 0 on ") and "rank 1 was killed, or its host is gone" in other


def die_within_a_step(folder, doomed):
    ranks = ranks_from_environment(os.environ)
    with end_on_failure(ranks):
        start_process_group(ranks, LaunchSettings(start_seconds=30.0), folder)
        try:
            vote = StepVote(ranks)
            for step in range(5):
                vote.result()
                if step == 3 and ranks.rank == doomed:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    vote.cast(step, False, True)
                except RuntimeError as error:
                    raise RuntimeError(f"the run failed: {error}") from error
            vote.result()
        finally:
            stop_process_group(ranks)
    leave(0)


@pytest.mark.parametrize("doomed", [2, 0])
def test_a_rank_killed_within_a_step_ends_all_others_with_one_line_each(tmp_path, doomed):
    """The second neighbor in the ring has no connection that breaks."""
    size = 5
    processes = [
        launched.start(
            die_within_a_step, launched.srun_variables(rank, size), tmp_path / f"log-{rank}", tmp_path, doomed
        )
        for rank in range(size)
    ]
    codes = launched.finish(processes)  # long before the timeout of 600 s
    assert codes == [-9 if rank == doomed else 1 for rank in range(size)]
    lines = [only_line((tmp_path / f"log-{rank}").read_text()) for rank in range(size) if rank != doomed]
    assert all(f"rank {doomed} " in line for line in lines), lines
    if doomed:
        assert sum(line.startswith("error: rank ") and "rank 2 was lost at step 3" in line for line in lines) == 1, (
            lines
        )
