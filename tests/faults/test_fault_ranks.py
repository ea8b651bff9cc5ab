"""Faults of processes: ranks that die, hang, stray and fail, signals, time limits, and other numbers of processes."""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time

import launched
import pytest
from fault_jobs import LONGEST_SECONDS, PYTHONPATH, ROOT, Ended, Fault, Job, differences
from fault_site import (
    IMAGES,
    NUM_STEPS,
    PACE,
    QUICK,
    SGD,
    STEPS_PER_EPOCH,
    TABLE,
    changed,
    goes_on,
    has_met_its_fault,
    kept,
    was_stopped,
)

from experiments.distributed.interruption import EXIT_RESUME

full = pytest.mark.skipif(QUICK, reason="FAULTS=all runs it")
"""Of the longest ones."""


# ---- what the other tests rely on ------------------------------------------------------------------------------------


def test_other_ends_are_distinguished(site):
    """A run with another learning rate is no equal of the reference."""
    place, ended = site.reference()
    other = site.place(changed(TABLE, variants={"aadl": {"optimizer": {"name": "SGD", "lr": 0.011, "momentum": 0.9}}}))
    texts = differences((place, ended), (other, other.run()))
    assert "2 final states" in texts and "metrics/train/loss differs" in texts
    assert differences((place, ended), (place, ended)) == []
    stopped = site.place()
    first = stopped.run(Fault("SIGTERM", step=3))
    [text] = differences((place, ended), (stopped, first))
    assert text.startswith("it ended with [75]: ") and "stopped by SIGTERM after step" in text


# ---- ranks that die --------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), pytest.param(2, 0, marks=full), (2, 1)])
def test_sigkill_of_a_rank_amid_the_training(site, ranks, rank):
    place = site.place()
    first = place.run(Fault("SIGKILL", step=21, rank=rank), ranks=ranks, pace=PACE)
    has_met_its_fault(first)
    named = ranks == 1 or f"rank {rank} was killed" in first.log or f"because rank {rank} failed" in first.log
    assert named, first.tail()
    site.recovers(place, first, ranks=ranks)


def test_sigkill_at_random_moments_of_one_run(site):
    count, epochs, ranks = (5, 16, 2) if QUICK else (50, 96, 2)
    config = changed(TABLE, training={"epochs": epochs})
    numbers, place, last = random.Random(7), site.place(config), None
    for number in range(count):
        ended = killed_at_random(place, ranks, numbers)
        assert ended is not None, f"the run was over, or failed, after {number} kills"
        if ended.restored >= 0:
            if last is not None:
                goes_on(last, ended)
            last = ended
    again = place.run(ranks=ranks)
    if last is not None:
        goes_on(last, again)
    site.equals(place, again, config, ranks)


def killed_at_random(place, ranks, numbers):
    """A job that is killed at a random moment, None if it ended by itself.

    One rank is killed, or all as when a node fails. Before the first step it is always all of them: of a rank that is
    gone before it has met the others, only its launcher knows before the deadline for the start.
    """
    job = place.start(ranks=ranks, pace=0.01)  # no processor is so fast that the run ends before the last kill
    is_early = numbers.random() < 0.2
    seconds = numbers.uniform(0.0, 1.0 if is_early else 0.1)
    if not is_early and not job.wait_for("step", ranks * (1 + int(numbers.expovariate(1 / 6)))):
        return None
    time.sleep(seconds)
    if not job.lives:
        return None
    job.send(signal.SIGKILL, None if is_early or numbers.random() < 0.6 else numbers.randrange(ranks))
    ended = job.wait()
    return ended if any(code == -signal.SIGKILL for code in ended.codes) else None


def test_a_rank_that_crashes_again_and_again_under_torchrun(site):
    count = 1 if QUICK else 10
    place = site.place()
    kinds = ("raise_memory_error", "SIGKILL")
    faults = [Fault(kinds[n % 2], step=3 + 4 * n, rank=n // 2 % 2, attempt=n) for n in range(count)]
    log, diary = place.files()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += [f"--max-restarts={count}", "--monitor-interval=0.1", "-m", "fault_jobs", *place.arguments]
    environment = (
        launched.clean_environment() | place.instructions(diary, faults, pace=PACE) | {"PYTHONPATH": PYTHONPATH}
    )
    start = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            launcher, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=LONGEST_SECONDS + 40 * count)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    ended = Ended([code], start, time.monotonic(), log.read_text(errors="replace"), Job([], log, diary).diary())
    assert len(ended.entries("fault")) == count, ended.tail()
    assert ended.log.count("forcefully exiting via 9") == 0, "a rank did not end before torchrun killed it, after 30 s"
    assert len(ended.entries("restored")) == 2 * (count + 1)
    site.equals(place, ended, ranks=2)


# ---- signals and the end of the time ---------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["SIGUSR1"] if QUICK else ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_a_signal_to_one_rank_and_a_second_one_amid_the_save(site, name):
    place = site.place()
    faults = (Fault(name, step=21, rank=1), Fault(name, place="gathering", step=21, rank=1))
    first = site.stopped(place, *faults, ranks=2, pace=PACE)
    site.recovers(place, first, ranks=2)


def test_a_signal_to_all_processes_workers_of_data_included(site):
    config = changed(IMAGES, problem={"data_path": site.images(), "num_workers": 2})
    place = site.place(config)
    job = place.start(ranks=2, pace=PACE)
    job.wait_for("step", 4)
    job.send(signal.SIGUSR1, with_workers=True)
    first = job.wait()
    was_stopped(place, first, 2)
    site.recovers(place, first, config, ranks=2)


MOMENTS = {
    "first step": Fault("SIGUSR1", step=0),
    "validation": Fault("SIGUSR1", place="validation", step=9),
    "acceleration": Fault("SIGUSR1", place="acceleration", step=9),
    "last step of an epoch": Fault("SIGUSR1", step=2 * STEPS_PER_EPOCH - 1),
    "last step": Fault("SIGUSR1", step=NUM_STEPS - 1),
    "last validation": Fault("SIGUSR1", place="validation", step=NUM_STEPS),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(site, moment):
    place, fault = site.place(), MOMENTS[moment]
    first = place.run(fault)
    has_met_its_fault(first)
    if fault.step >= NUM_STEPS - 1 and not any(first.codes):  # the run may have ended first
        site.equals(place, first)
        return
    was_stopped(place, first, 1)
    site.recovers(place, first)


# ---- ranks that hang, fail or go astray ------------------------------------------------------------------------------


STRAYING = {
    "hang": r"rank 1( on \S+)? (gave no|did not|does not|hangs|is late|was lost)",
    "decide_otherwise": "the ranks have taken different decisions",
    "skip_step": "the ranks are at different steps",
    "send_another_shape": "",  # gloo ends one rank or both, in words of its own
}


@pytest.mark.parametrize("action", list(STRAYING)[: 2 if QUICK else None])
def test_a_rank_that_hangs_or_strays_ends_the_job_and_is_named(site, action):
    config = changed(TABLE, launch={"collective_seconds": 6 if action == "hang" else 10})
    place = site.place(config)
    first = place.run(Fault(action, step=21, rank=1), ranks=2, pace=PACE)
    has_met_its_fault(first)
    assert all(code not in (0, EXIT_RESUME) for code in first.codes) and kept(place)
    assert re.search(STRAYING[action], first.log), first.tail()
    site.recovers(place, first, config, ranks=2)


def test_a_rank_that_stood_still_for_a_while_is_named_and_the_run_goes_on(site):
    place = site.place()
    job = place.start(Fault("SIGSTOP", step=21, rank=1), ranks=2, pace=PACE)
    job.wait_for("fault")
    time.sleep(3.0)
    job.send(signal.SIGCONT, 1)
    ended = job.wait()
    site.equals(place, ended, ranks=2)
    printed = re.findall(r"rank 1 on \S+ stood still for ([\d.]+) s", ended.log)
    assert any(float(seconds) >= 2.0 for seconds in printed), ended.tail()


def test_an_exception_in_a_worker_of_data_ends_all_with_one_traceback(site):
    config = changed(IMAGES, problem={"data_path": site.images(), "num_workers": 1})
    place = site.place(config)
    first = place.run(Fault("raise_in_worker", place="worker", rank=1), ranks=2, pace=PACE)
    failed_with(first, "ZeroDivisionError: in a worker")
    site.recovers(place, first, config, ranks=2)


def failed_with(ended, message):
    """Checks that all ranks ended, with the traceback of the one that failed, once."""
    has_met_its_fault(ended)
    assert all(code == 1 for code in ended.codes), ended.tail()
    assert (ended.log.count(" failed:\nTraceback"), ended.log.count(f"\n{message}")) == (1, 1)
    assert "ended because rank 1" in ended.log


# ---- other numbers of processes, other moments -----------------------------------------------------------------------


def test_another_number_of_ranks_sees_the_same_rows_and_losses(site):
    plain = changed(TABLE, variants={"aadl": {"optimizer": SGD}})
    place = site.place(plain)
    parts = [place.run(Fault("SIGUSR1", step=11), rows=True), place.run(Fault("SIGUSR1", step=29), ranks=2, rows=True)]
    parts.append(place.run(rows=True))
    for before, after in itertools.pairwise(parts):
        assert after.restored == before.reached
    assert rows_by_step([site.reference(plain)[1]]) == rows_by_step(parts)
    site.equals(place, parts[-1], plain, tolerance=1e-6)


def rows_by_step(parts):
    """Checksums of the rows of each step (epoch, number of the step), in the order of the whole batch."""
    found = {}
    for part in parts:
        ranks = len(part.codes)
        for rank in range(ranks):
            for entry in part.entries("step", rank):
                batch = found.setdefault((entry["epoch"], entry["step"]), [0] * len(entry["rows"]) * ranks)
                batch[rank::ranks] = entry["rows"]
    return found
