import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT
from processes import wait_until

from experiments.runs.lock import LOCK_NAME, FolderInUse, FolderLock

HOLD = """
import sys
from pathlib import Path
from experiments.runs.lock import FolderLock, FolderInUse
try:
    with FolderLock(Path(sys.argv[1]), "the other run", stale_seconds=float(sys.argv[2])) as lock:
        print("held", lock.note, flush=True)
        sys.stdin.read()
except FolderInUse as error:
    print("refused", error, flush=True)
"""


@pytest.fixture
def start():
    """start(folder, stale_seconds, **environment): a process that holds the lock until its input ends, its first line.

    It gives ten signs of life in its `stale_seconds`.
    """
    processes = []

    def begin(folder, stale_seconds=300, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), str(stale_seconds)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def lock_of(folder, environment=None, **options):
    return FolderLock(folder, "this run", environment=environment or {}, **options)


def seconds_in(text, pattern):
    """The number that follows in a message."""
    return float(re.search(rf"{pattern} (\S+) s", text)[1])


def rewrite(folder, **changes):
    path = folder / LOCK_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def touch(folder, seconds_ago):
    then = time.time() - seconds_ago
    os.utime(folder / LOCK_NAME, (then, then))


def test_the_lock_goes_with_its_holder(tmp_path):
    folder = tmp_path / "a" / "run"
    with lock_of(folder) as lock:
        assert lock.note == "" and os.listdir(folder) == [LOCK_NAME]
    assert os.listdir(folder) == []
    with pytest.raises(ZeroDivisionError), lock_of(folder):
        1 / 0  # noqa: B018
    assert os.listdir(folder) == []


def test_a_second_process_is_refused_with_the_holder_named(tmp_path, start):
    holder, line = start(tmp_path, SLURM_JOB_ID="4711")
    assert line == "held"
    _, line = start(tmp_path)
    assert line.startswith("refused")
    for text in (
        str(tmp_path),
        f"process {holder.pid}",
        socket.gethostname(),
        "job slurm 4711",
        "the other run",
        "since 2",
    ):
        assert text in line
    with pytest.raises(FolderInUse, match=f"process {holder.pid}"):
        lock_of(tmp_path).acquire()
    holder.communicate("")
    assert holder.returncode == 0
    with lock_of(tmp_path) as lock:
        assert lock.note == ""


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, start):
    holder, line = start(tmp_path)
    assert line == "held"
    os.kill(holder.pid, signal.SIGKILL)
    while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # not waited for: a zombie counts as dead
    with lock_of(tmp_path) as lock:
        assert f"process {holder.pid}" in lock.note and "its process is gone" in lock.note
    assert os.listdir(tmp_path) == []


def test_a_number_that_another_process_got_is_no_sign_of_life(tmp_path, start):
    _, line = start(tmp_path)
    assert line == "held"
    rewrite(tmp_path, pid_started="1")
    with lock_of(tmp_path) as lock:
        assert "its process is gone" in lock.note


ELSEWHERE = [{"host": "elsewhere"}, {"boot": "another"}, {"pid_space": "pid:[1]"}]


@pytest.mark.parametrize("change", ELSEWHERE)
def test_elsewhere_a_holder_that_gave_no_sign_of_life_for_long_is_dead(tmp_path, start, change, capsys):
    _, line = start(tmp_path)
    assert line == "held"
    rewrite(tmp_path, pid=2**22 + 1, **change)  # no process here has this number
    touch(tmp_path, 60)
    with lock_of(tmp_path, stale_seconds=50) as lock:
        assert 60 <= seconds_in(lock.note, "no sign of life for") < 600
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", ELSEWHERE)
def test_elsewhere_the_next_sign_of_life_is_waited_for(tmp_path, start, change, capsys):
    """The holder gives one every 0.2 s, so it is known to live long before it would count as dead."""
    _, line = start(tmp_path, stale_seconds=2)
    assert line == "held"
    rewrite(tmp_path, pid=2**22 + 1, **change)
    with pytest.raises(FolderInUse, match="the other run"):
        lock_of(tmp_path, stale_seconds=600).acquire()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the other run" in told
    assert 2 < seconds_in(told, "its next sign of life is waited for,") <= 600  # by our limit, not by the holder's
    assert os.listdir(tmp_path) == [LOCK_NAME]


def test_a_holder_elsewhere_that_died_a_moment_ago_is_waited_out(tmp_path, start, capsys, monkeypatch):
    """As when a node fails and a chained job begins at once; time passes where the lock sleeps, and nowhere else."""
    dead, line = start(tmp_path)
    assert line == "held"
    dead.kill()
    dead.communicate()
    rewrite(tmp_path, host="elsewhere")
    naps = []
    clock = SimpleNamespace(sleep=naps.append, monotonic=lambda: sum(naps))
    monkeypatch.setattr("experiments.runs.lock.time", clock)
    monkeypatch.setattr("experiments.runs.lock._age", lambda path, probe: sum(naps))
    with lock_of(tmp_path, stale_seconds=100) as lock:
        assert "on elsewhere" in lock.note and "no sign of life for 101 s" in lock.note
    assert sum(naps) == 101
    assert capsys.readouterr().err.count("waited for, 100 s at most") == 1


def at_first_sleep(monkeypatch, action):
    """Lets something happen as soon as the lock waits."""
    actions, sleep = [action], time.sleep

    def act_and_sleep(seconds):
        if actions:
            actions.pop()()
        sleep(seconds)

    monkeypatch.setattr("experiments.runs.lock.time.sleep", act_and_sleep)


def test_a_lock_that_is_given_back_meanwhile_is_taken(tmp_path, capsys, monkeypatch):
    old = lock_of(tmp_path, stale_seconds=1000)  # no sign of life
    old.acquire()
    rewrite(tmp_path, host="elsewhere")
    at_first_sleep(monkeypatch, old.release)
    with lock_of(tmp_path, stale_seconds=1000) as lock:
        assert lock.note == ""
    assert capsys.readouterr().err.count("waited for") == 1


def test_one_that_took_over_meanwhile_is_named(tmp_path, monkeypatch):
    old = lock_of(tmp_path, stale_seconds=1000)
    old.acquire()
    rewrite(tmp_path, host="elsewhere")
    at_first_sleep(monkeypatch, lambda: rewrite(tmp_path, token="new", what="a third run"))
    with pytest.raises(FolderInUse, match="a third run"):
        lock_of(tmp_path, stale_seconds=1000).acquire()
    old.release()
    (tmp_path / LOCK_NAME).unlink()


def test_here_a_living_process_holds_without_signs_of_life(tmp_path, start):
    _, line = start(tmp_path)
    assert line == "held"
    touch(tmp_path, 10_000)
    with pytest.raises(FolderInUse):
        lock_of(tmp_path).acquire()


def test_the_holder_gives_signs_of_life(tmp_path):
    with lock_of(tmp_path, stale_seconds=0.5):
        begin = time.time()
        touch(tmp_path, 1000)
        assert wait_until(lambda: (tmp_path / LOCK_NAME).stat().st_mtime > begin - 500, 60)


@pytest.mark.parametrize(
    ("environment", "is_taken"),
    [
        ({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"}, True),
        ({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "5"}, False),
        ({"SLURM_JOB_ID": "6", "SLURM_RESTART_COUNT": "2"}, False),
        ({"LSB_JOBID": "5", "AADL_RESTART_COUNT": "2"}, False),
        ({}, False),
    ],
)
def test_a_restart_of_the_same_job_takes_over(tmp_path, start, environment, is_taken):
    _, line = start(tmp_path, 2, SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
    assert line == "held"
    rewrite(tmp_path, host="elsewhere")
    if is_taken:
        with lock_of(tmp_path, environment) as lock:
            assert "this is restart 2 of the same job" in lock.note
    else:
        with pytest.raises(FolderInUse):
            lock_of(tmp_path, environment).acquire()


def test_elements_of_an_lsf_array_are_different_jobs(tmp_path):
    first = {"LSB_JOBID": "5", "LSB_JOBINDEX": "1", "AADL_RESTART_COUNT": "0"}
    with lock_of(tmp_path, first, stale_seconds=2):
        rewrite(tmp_path, host="elsewhere")
        with pytest.raises(FolderInUse, match=r"job lsf 5\[1\]"):
            lock_of(tmp_path, {**first, "LSB_JOBINDEX": "2", "AADL_RESTART_COUNT": "1"}).acquire()
        with lock_of(tmp_path, {**first, "AADL_RESTART_COUNT": "1"}) as lock:
            assert lock.note


def test_the_lock_that_was_taken_over_is_not_removed_by_its_old_holder(tmp_path):
    old = lock_of(tmp_path)
    old.acquire()
    rewrite(tmp_path, host="elsewhere")
    touch(tmp_path, 1000)
    with lock_of(tmp_path):
        old.release()
        assert os.listdir(tmp_path) == [LOCK_NAME]
    assert os.listdir(tmp_path) == []


def test_a_damaged_lock_is_taken_over_when_it_is_old(tmp_path, monkeypatch):
    (tmp_path / LOCK_NAME).write_text("{")
    at_first_sleep(monkeypatch, lambda: touch(tmp_path, 0))
    with pytest.raises(FolderInUse, match="an unknown host"):
        lock_of(tmp_path).acquire()
    touch(tmp_path, 1000)
    with lock_of(tmp_path) as lock:
        assert "no sign of life" in lock.note


def test_file_systems_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with lock_of(tmp_path):
        with pytest.raises(FolderInUse, match="this run"):
            lock_of(tmp_path).acquire()
        assert os.listdir(tmp_path) == [LOCK_NAME]
    assert os.listdir(tmp_path) == []


def test_a_forked_process_does_not_release(tmp_path):
    with lock_of(tmp_path) as lock:
        lock._pid += 1  # as in the child
        lock.release()
        assert os.listdir(tmp_path) == [LOCK_NAME]
        lock._pid -= 1


def test_of_many_processes_one_takes_over(tmp_path, start):
    """All of them see the lock of a dead process at the same time."""
    dead, line = start(tmp_path)
    assert line == "held"
    dead.kill()
    dead.communicate()
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), "300"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    lines = [rival.stdout.readline().split()[0] for rival in rivals]
    for rival in rivals:
        rival.communicate("")
    assert sorted(lines) == ["held", "refused", "refused", "refused"]
    assert os.listdir(tmp_path) == []


def test_wrong_limits_are_named(tmp_path):
    with pytest.raises(ValueError, match="stale_seconds must be > 0, got 0"):
        lock_of(tmp_path, stale_seconds=0)
