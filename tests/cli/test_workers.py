"""Workers and signals: those of a scheduler do not end them, the end of their parent does."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from every_experiment import write_config
from paths import ROOT, SUPPORT
from processes import is_running, wait_until

from experiments.runs.lock import LOCK_NAME

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

LOADER = """
import multiprocessing, os, signal, subprocess, sys, time
sys.path.insert(0, {tests!r})
from image_sets import ListedImages, encoded
from data_loaders.imagenet import loaders as imagenet

def loader():
    images = ListedImages([encoded(seed=seed) for seed in range(24)])
    decoding = imagenet.Decoding(16, 20)
    return imagenet.TrainLoader(images, decoding, batch_size=4, seed=0, num_workers=2, start_method={start_method!r})
"""

# They come from another process, as a scheduler's do, and find the second worker unprepared.
SIGNALED = """
SEND = "import os, signal, sys; n = int(sys.argv[1]); signal.signal(n, signal.SIG_IGN); os.killpg(0, n)"
follow_parent = imagenet.follow_parent

def slowly():
    if multiprocessing.current_process().name.endswith("2"):
        time.sleep(3)
    follow_parent()

imagenet.follow_parent = slowly

if __name__ == "__main__":
    for number in {signals}:
        signal.signal(number, lambda *_: print("caught"))
    with loader() as batches:
        for step, batch in enumerate(batches.batches(0)):
            for number in {signals} if not step else ():
                subprocess.run([sys.executable, "-c", SEND, str(number)])
    print("steps", step + 1)
"""

# The frames of an exception that nobody catches keep the loader and its workers until the interpreter ends.
FAILING = """
if __name__ == "__main__":
    with loader() as batches:
        for step, batch in enumerate(batches.batches(0)):
            os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
"""

POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from data_loaders.workers import follow_parent, signals_held_back

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, multiprocessing.get_context({start_method!r}), follow_parent)
    with signals_held_back():
        waiting = [pool.submit(time.sleep, 0.5) for _ in range(2)]
    for each in waiting:
        each.result()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def start(folder, text, **values):
    """A Python script as the leader of a process group."""
    script = folder / "script.py"
    script.write_text(text.format(tests=str(SUPPORT), signals=[int(number) for number in SIGNALS], **values))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(script)], env=env, **pipes, text=True, start_new_session=True)


def end(process):
    """(exit code, stdout, stderr) of a script that ends by itself."""
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_workers_survive_the_signals_of_a_scheduler(tmp_path, start_method):
    code, out, err = end(start(tmp_path, LOADER + SIGNALED, start_method=start_method))
    assert (code, out.split()) == (0, ["caught"] * 3 + ["steps", "6"]), err
    assert "resource_tracker" not in err


def test_a_program_that_loses_a_worker_fails_and_ends(tmp_path):
    code, _, err = end(start(tmp_path, LOADER + FAILING, start_method="fork"))
    assert code == 1
    # A traceback; or what the interpreter says where torch raises a second error while it prints that.
    assert re.search(r"RuntimeError(: |\(['\"])(a worker that reads images ended|DataLoader worker )", err), err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_workers_end_with_a_killed_parent_and_not_by_signals(tmp_path, start_method):
    with start(tmp_path, POOL, start_method=start_method) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(workers) == 2
            for number in SIGNALS:
                for pid in workers:
                    os.kill(pid, number)
            assert not wait_until(lambda: not all(map(is_running, workers)), 1)
            parent.kill()
            assert wait_until(lambda: not any(map(is_running, workers)))
        finally:
            parent.kill()
            for pid in filter(is_running, workers):
                os.kill(pid, signal.SIGKILL)


# Signals go to the whole group, as those of a terminal; the workers do not hear them, their parent tells them.
JOBS = """
import pathlib, sys, time
from experiments.runs import execute
from experiments.runs import pool
from experiments.__main__ import main
from experiments.runs.lock import LOCK_NAME

train = execute.train

def train_or_fail(run, session, **options):
    if f"{{session.folder.parent.name}} {{session.folder.stem.removeprefix('seed-')}}" == {failing!r}:
        while len(list(pathlib.Path({results!r}).rglob(LOCK_NAME))) < 2:  # another run has begun
            time.sleep(0.05)
        raise ZeroDivisionError("its own")
    return train(run, session, **options)

def print_and_note(text, **options):  # the parent has heard of the failure
    print(text, **options)
    pathlib.Path({results!r}, "failed").touch()

execute.train, pool.print = train_or_fail, print_and_note

if __name__ == "__main__":
    settings = ["--set", "training.epochs=1000000", "--set", "seeds={seeds}"]
    sys.exit(main(["run", {config!r}, "--results", {results!r}, "--jobs", "2", *settings]))
"""


FAILURE = "run sgd, seed 0 failed: ZeroDivisionError: its own"


def run_of(results, path):
    """The run that a file belongs to, as "sgd 0"."""
    variant, seed = path.relative_to(results).parts[2:4]
    return f"{variant} {re.findall('[0-9]+', seed)[0]}"


def start_jobs(folder, seeds, running, failing=""):
    """(process of the command with two runs at a time, folder of its results) when these runs have begun."""
    results = folder / "results"
    config = write_config("graduate_admissions", folder)
    process = start(folder, JOBS, config=str(config), results=str(results), seeds=seeds, failing=failing)

    def have_begun():
        if bool(failing) != (results / "failed").exists():
            return False
        return {run_of(results, lock) for lock in results.rglob(LOCK_NAME)} == running

    wait_until(lambda: have_begun() or process.poll() is not None)
    if process.poll() is not None or not have_begun():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(process.communicate()[1])
    return process, results


def saved(results):
    """The runs that were saved."""
    return {run_of(results, place) for place in results.rglob("step-*")}


def kill_worker(results, run):
    """Kills the process that makes a run."""
    (lock,) = (path for path in results.rglob(LOCK_NAME) if run_of(results, path) == run)
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow)]
)
def test_signals_end_the_runs_of_jobs(tmp_path, number, expected):
    process, results = start_jobs(tmp_path, "0-3", {"sgd 0", "sgd_aadl 0"})
    os.killpg(process.pid, number)
    code, _, err = end(process)
    printed = "interrupted: " if number == signal.SIGINT else "stopped by SIGUSR1; the runs that had begun are"
    assert code == expected and err.splitlines()[-1].startswith(printed), err
    assert saved(results) == {"sgd 0", "sgd_aadl 0"}
    assert "resource_tracker" not in err  # nor is the helper process of the pool ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_runs_of_jobs_after_one_has_failed(tmp_path, number):
    process, results = start_jobs(tmp_path, "0-3", {"sgd_aadl 0"}, failing="sgd 0")
    if number == signal.SIGKILL:
        kill_worker(results, "sgd_aadl 0")
    else:
        os.killpg(process.pid, number)
    code, _, err = end(process)
    assert code == 1 and err.splitlines()[-1] == f"error: {FAILURE}"
    assert f"\n{FAILURE}; what has begun is finished first\n" in err
    assert saved(results) == (set() if number == signal.SIGKILL else {"sgd_aadl 0"})


def test_where_a_worker_of_jobs_is_killed_the_other_saves(tmp_path):
    process, results = start_jobs(tmp_path, "0-3", {"sgd 0", "sgd_aadl 0"})
    kill_worker(results, "sgd 0")
    code, _, err = end(process)
    assert code == 1 and "error: a worker process was killed" in err.splitlines()[-1]
    assert saved(results) == {"sgd_aadl 0"}  # and none that lay in the queue has begun


# As a program ends on an error of its own: torch must not see workers fail.
ERROR = """
if __name__ == "__main__":
    with loader() as batches:
        waiting = iter(batches.batches(0))
        next(waiting)
        raise ValueError("its own")
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_program_that_fails_ends_with_its_own_error(tmp_path, start_method):
    code, _, err = end(start(tmp_path, LOADER + ERROR, start_method=start_method))
    assert code == 1 and "\nValueError: its own\n" in err
    assert "DataLoader worker" not in err  # though a worker that was just starting may complain of its lost parent
