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

from experiments.distributed.ranks import Ranks
from experiments.runs.lock import LOCK_NAME, FolderInUse, FolderLock

HOLD = """
import sys
from pathlib import Path
from experiments.distributed.ranks import Ranks
from experiments.runs.lock import FolderLock, FolderInUse
try:
    with FolderLock(Path(sys.argv[1]), "the other run", Ranks()):
        print("held", flush=True)
        sys.stdin.read()
except FolderInUse as error:
    print("refused", flush=True)
"""


def start(folder):
    """A process that holds the lock until its input ends, or is refused; it prints which."""
    line = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def dead(tmp_path):
    """A killed process, which held the lock of `tmp_path`; it is a zombie until the test ends."""
    process = start(tmp_path)
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    yield process
    process.communicate()


def lock_of(folder, ranks=None, what="this run", **options):
    return FolderLock(folder, what, ranks or Ranks(), **options)


@pytest.fixture
def holder(tmp_path):
    """The lock of a job that gives no sign of life, as if it were on another host."""
    lock = lock_of(tmp_path, Ranks(scheduler="slurm", job_id="5", job_restarts=1), "the other run", stale_seconds=1e6)
    lock.acquire()
    rewrite(tmp_path, machine="elsewhere", host="elsewhere", pid=2**22 + 1)  # no process here has this number
    yield lock
    lock.release()


def rewrite(folder, **changes):
    path = folder / LOCK_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def touch(folder, seconds_ago):
    then = time.time() - seconds_ago
    os.utime(folder / LOCK_NAME, (then, then))


def seconds_in(text, pattern):
    """The number that follows in a message."""
    return float(re.search(rf"{pattern} (\S+) s", text)[1])


def test_the_lock_goes_with_its_holder(tmp_path):
    folder = tmp_path / "a" / "run"
    with lock_of(folder) as lock:
        assert lock.note == "" and os.listdir(folder) == [LOCK_NAME]
    assert os.listdir(folder) == []
    with pytest.raises(ZeroDivisionError), lock_of(folder):
        1 / 0  # noqa: B018
    assert os.listdir(folder) == []


def test_a_second_job_is_refused_with_the_holder_named(tmp_path):
    with lock_of(tmp_path, Ranks(scheduler="slurm", job_id="4711")):
        touch(tmp_path, 10_000)  # a living process of this host needs no signs of life
        with pytest.raises(FolderInUse) as refused:
            lock_of(tmp_path).acquire()
        here = f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}, job slurm 4711"
        assert f"{here}, which has run this run since 2" in str(refused.value)
    with lock_of(tmp_path) as lock:
        assert lock.note == ""


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, dead):
    with lock_of(tmp_path) as lock:
        assert f"process {dead.pid}" in lock.note and "its process is gone" in lock.note
    assert os.listdir(tmp_path) == []


def test_of_many_processes_one_takes_over(tmp_path, dead):
    """All of them see the lock of a dead process at the same time."""
    rivals = [start(tmp_path) for _ in range(4)]
    lines = [rival.stdout.readline().strip() for rival in rivals]
    for rival in rivals:
        rival.communicate("")
    assert sorted(lines) == ["held", "refused", "refused", "refused"]
    assert os.listdir(tmp_path) == []


def test_a_number_that_another_process_got_is_no_sign_of_life(tmp_path, holder):
    rewrite(tmp_path, machine=json.loads(own_lock(tmp_path / "own"))["machine"], pid=os.getpid(), pid_started="1")
    with lock_of(tmp_path) as lock:
        assert "its process is gone" in lock.note


def own_lock(folder):
    """What a lock of this process says."""
    with lock_of(folder) as lock:
        return lock.path.read_text()


def test_elsewhere_a_holder_that_gave_no_sign_of_life_for_long_is_dead(tmp_path, holder, capsys):
    touch(tmp_path, 60)
    with lock_of(tmp_path, stale_seconds=50) as lock:
        assert 60 <= seconds_in(lock.note, "no sign of life for") < 600
        holder.release()  # which it has lost
        assert os.listdir(tmp_path) == [LOCK_NAME]
    assert os.listdir(tmp_path) == [] and capsys.readouterr().err == ""


def test_elsewhere_the_next_sign_of_life_is_waited_for(tmp_path, capsys):
    """The holder gives one every 0.2 s, so it is known to live long before it would count as dead."""
    with lock_of(tmp_path, what="the other run", stale_seconds=2):
        rewrite(tmp_path, machine="elsewhere")
        with pytest.raises(FolderInUse, match="the other run"):
            lock_of(tmp_path, stale_seconds=600).acquire()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "the other run" in said
        assert 2 < seconds_in(said, "its next sign of life is waited for,") <= 600  # by our limit, not by the holder's
        assert os.listdir(tmp_path) == [LOCK_NAME]


@pytest.fixture
def naps(monkeypatch):
    """Time passes where the lock sleeps, and nowhere else."""
    naps = []
    clock = SimpleNamespace(sleep=naps.append, monotonic=lambda: sum(naps))
    monkeypatch.setattr("experiments.runs.lock.time", clock)
    return naps


def test_a_holder_elsewhere_that_died_a_moment_ago_is_waited_out(tmp_path, holder, capsys, naps, monkeypatch):
    """As when a node fails and a chained job begins at once."""
    begin, make = time.time(), Path.touch

    def made_now(path):
        make(path)
        os.utime(path, (begin + sum(naps),) * 2)

    os.utime(tmp_path / LOCK_NAME, (begin, begin))
    monkeypatch.setattr(Path, "touch", made_now)  # by the clock of the file system, which the lock asks
    with lock_of(tmp_path, stale_seconds=100) as lock:
        assert "on elsewhere" in lock.note and "no sign of life for 101 s" in lock.note
    assert sum(naps) == 101
    assert capsys.readouterr().err.count("waited for, 100 s at most") == 1


def test_a_lock_that_cannot_be_looked_at_is_not_waited_for_without_end(tmp_path, naps, monkeypatch):
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "gone")  # or its server has lost it
    looks, stat = [], os.stat

    def look(path, **options):
        looks.append(path)
        assert len(looks) < 10_000, "it does not sleep"
        return stat(path, **options)

    with monkeypatch.context() as patch, pytest.raises(FolderInUse, match="an unknown host"):
        patch.setattr(os, "stat", look)
        lock_of(tmp_path, stale_seconds=10).acquire()
    assert 11 <= sum(naps) < 12


def test_a_full_disk_leaves_no_lock_behind(tmp_path, holder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        lock_of(tmp_path / "own").acquire()
    touch(tmp_path, 60)
    with pytest.raises(OSError, match="No space"):  # from the guard of a takeover
        lock_of(tmp_path, stale_seconds=50).acquire()
    assert os.listdir(tmp_path / "own") == [] and sorted(os.listdir(tmp_path)) == ["own", LOCK_NAME]


def at_first_sleep(monkeypatch, action):
    """Lets something happen as soon as the lock waits, which then takes no time."""
    actions = [action]
    monkeypatch.setattr("experiments.runs.lock.time.sleep", lambda _: actions.pop()() if actions else None)


def test_a_lock_that_is_given_back_meanwhile_is_taken(tmp_path, holder, monkeypatch):
    at_first_sleep(monkeypatch, holder.release)
    with lock_of(tmp_path, stale_seconds=1000) as lock:
        assert lock.note == ""


def test_one_that_took_over_meanwhile_is_named(tmp_path, holder, monkeypatch):
    at_first_sleep(monkeypatch, lambda: rewrite(tmp_path, token="new", what="a third run"))
    with pytest.raises(FolderInUse, match="a third run"):
        lock_of(tmp_path, stale_seconds=1000).acquire()


@pytest.mark.parametrize(
    ("ranks", "is_taken"),
    [
        (Ranks(scheduler="slurm", job_id="5", job_restarts=2), True),
        (Ranks(scheduler="slurm", job_id="5", job_restarts=1), False),
        (Ranks(scheduler="slurm", job_id="5", job_restarts=1, restart_count=4), False),  # another torchrun in this job
        (Ranks(scheduler="slurm", job_id="6", job_restarts=2), False),
        (Ranks(scheduler="lsf", job_id="5", job_restarts=2), False),
        (Ranks(job_id="5", job_restarts=2), False),  # torchrun's id, which may be the same for all of its jobs
    ],
)
def test_a_restart_of_the_same_job_takes_over(tmp_path, holder, monkeypatch, ranks, is_taken):
    if is_taken:
        with lock_of(tmp_path, ranks) as lock:
            assert "this is restart 2 of the same job" in lock.note
    else:
        at_first_sleep(monkeypatch, lambda: touch(tmp_path, 1))
        with pytest.raises(FolderInUse):
            lock_of(tmp_path, ranks).acquire()


def test_the_holder_gives_signs_of_life(tmp_path):
    with lock_of(tmp_path, stale_seconds=0.5):
        begin = time.time()
        touch(tmp_path, 1000)
        assert wait_until(lambda: (tmp_path / LOCK_NAME).stat().st_mtime > begin - 500)


def test_a_damaged_lock_is_taken_over_when_it_is_old(tmp_path, monkeypatch):
    (tmp_path / LOCK_NAME).write_text("{")
    at_first_sleep(monkeypatch, lambda: touch(tmp_path, 1))
    with pytest.raises(FolderInUse, match="an unknown host"):
        lock_of(tmp_path).acquire()
    touch(tmp_path, 1000)
    with lock_of(tmp_path) as lock:
        assert "no sign of life" in lock.note
