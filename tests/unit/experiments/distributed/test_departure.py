"""How ranks leave: together, or at once with one readable cause."""

import os
import signal

import launched
import pytest

from experiments.distributed.departure import end_on_failure, leave, stop_process_group
from experiments.distributed.process_group import start_process_group
from experiments.distributed.ranks import ranks_from_environment
from experiments.distributed.step_vote import StepVote
from experiments.settings.launch_settings import LaunchSettings


def run_job(tmp_path, *args, size=2):
    """Exit codes and logs of a job of `size` tasks of srun."""
    processes = [
        launched.start(launched.job, launched.srun_variables(rank, size), tmp_path / f"log-{rank}", tmp_path, *args)
        for rank in range(size)
    ]
    return launched.finish(processes), [(tmp_path / f"log-{rank}").read_text() for rank in range(size)]


@pytest.mark.parametrize(
    ("fail", "failing"), [("raises", 1), ("raises", 0), ("alone", 1), ("mistake", 1), ("afterwards", 0)]
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
                vote.cast(step, False, True)
            vote.result()
        except RuntimeError:
            raise KeyError("what cleans up failed as well")  # noqa: B904
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
        assert sum(line.startswith("error: rank ") and "rank 2 was killed" in line for line in lines) == 1, lines
