"""The faults, one function each: it lets them happen to real processes, starts the same command again, and compares."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py

from benchmarks import fault_files
from benchmarks.fault_jobs import ROOT, Ended, Fault, Hung, Job, Place, clean_environment
from benchmarks.fault_site import (
    EAGER,
    IMAGES,
    NUM_STEPS,
    PACE,
    SGD,
    STEPS_PER_EPOCH,
    TABLE,
    Outcome,
    Site,
    changed,
    kept,
)
from experiments.interruption import EXIT_RESUME

# ---- ranks that die --------------------------------------------------------------------------------------------------


def killed_rank(site: Site) -> Outcome:
    """SIGKILL of a rank amid the training, then the same command"""
    outcome = Outcome()
    for ranks, rank in ((1, 0), (2, 1)) if site.quick else ((1, 0), (2, 0), (2, 1)):
        place = site.place()
        first = place.run(Fault("SIGKILL", step=21, rank=rank), ranks=ranks, pace=PACE)
        outcome.failed(first)
        named = ranks == 1 or f"rank {rank} was killed" in first.log or f"because rank {rank} failed" in first.log
        outcome.check(named, f"rank {rank} of {ranks} is not named: {first.tail()}")
        again = place.run(ranks=ranks)
        outcome.went_on(first, again)
        outcome.compare(site.reference(ranks=ranks), (place, again), f"rank {rank} of {ranks}")
    return outcome


def random_kills(site: Site) -> Outcome:
    """SIGKILL at random moments of one run, of one rank or of all"""
    count, epochs, ranks = (5, 16, 2) if site.quick else (50, 96, 2)
    config = changed(TABLE, training={"epochs": epochs})
    outcome, numbers = Outcome(), random.Random(7)
    place, moments = site.place(config), Counter[str]()
    last: Ended | None = None
    for number in range(count):
        ended = killed_at_random(place, ranks, numbers, outcome)
        if ended is None:
            outcome.problems.append(f"the run was over, or failed, after {number} kills")
            break
        has_begun = ended.restored >= 0 and ended.entries("step")
        moments["amid a save" if amid_save(ended) else "amid the steps" if has_begun else "before a step"] += 1
        if ended.restored >= 0:
            if last is not None:
                outcome.went_on(last, ended)
            last = ended
    again = place.run(ranks=ranks)
    if last is not None:
        outcome.went_on(last, again)
    outcome.compare(site.reference(config, ranks), (place, again))
    told = ", ".join(f"{number} {moment}" for moment, number in sorted(moments.items()))
    outcome.notes.append(f"{sum(moments.values())} kills ({told}) in {epochs * STEPS_PER_EPOCH} steps")
    return outcome


def killed_at_random(place: Place, ranks: int, numbers: random.Random, outcome: Outcome) -> Ended | None:
    """A job that is killed at a random moment, None if it ended by itself.

    One rank is killed, or all as when a node fails. Before the first step it is always all of them: of a rank that is
    gone before it has met the others, only its launcher knows before the deadline for the start.
    """
    job = place.start(ranks=ranks, pace=0.005)
    is_early = numbers.random() < 0.2
    seconds = numbers.uniform(0.0, 1.0 if is_early else 0.1)
    if not is_early and not job.wait_for("step", ranks * (1 + int(numbers.expovariate(1 / 6)))):
        return None
    time.sleep(seconds)
    if not job.lives:
        return None
    killed_at = time.monotonic()
    job.send(signal.SIGKILL, None if is_early or numbers.random() < 0.6 else numbers.randrange(ranks))
    ended = job.wait()
    if not any(code == -signal.SIGKILL for code in ended.codes):
        return None
    outcome.detections.append(ended.end - killed_at)
    return ended


def amid_save(ended: Ended) -> bool:
    """Whether rank 0 was saving when it ended."""
    return len(ended.entries("save", 0)) > len(ended.entries("saved", 0))


# ---- signals and the end of the time ---------------------------------------------------------------------------------


def signaled_rank(site: Site) -> Outcome:
    """USR1, USR2, TERM to one rank; a second one amid the save; all processes at once, workers of data included"""
    outcome = Outcome()
    for name in ("SIGUSR1",) if site.quick else ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        faults = (Fault(name, step=21, rank=1), Fault(name, place="file written", step=21, rank=1))
        stopped_and_continued(site, outcome, TABLE, faults, ranks=2)
    if not site.quick:
        config = changed(IMAGES, problem={"data_path": site.images(), "num_workers": 2})
        place = site.place(config)
        job = place.start(ranks=2, pace=PACE)
        job.wait_for("step", 4)
        job.send(signal.SIGUSR1, with_workers=True)
        continued(site, outcome, config, place, job.wait(), ranks=2)
        outcome.notes.append("2 ranks with 2 workers of data each")
    return outcome


def signaled_anywhere(site: Site) -> Outcome:
    """A signal in the first step, a validation, an acceleration, the last step of an epoch, and the last of all"""
    outcome = Outcome()
    moments = {
        "first step": Fault("SIGUSR1", step=0),
        "validation": Fault("SIGUSR1", place="validation", step=9),
        "acceleration": Fault("SIGUSR1", place="acceleration", step=9),
        "last step of an epoch": Fault("SIGUSR1", step=2 * STEPS_PER_EPOCH - 1),
        "last step": Fault("SIGUSR1", step=NUM_STEPS - 1),
        "last validation": Fault("SIGUSR1", place="validation", step=NUM_STEPS),
    }
    for what, fault in moments.items():
        is_end = fault.step >= NUM_STEPS - 1
        stopped_and_continued(site, outcome, TABLE, (fault,), what=what, may_finish=is_end, pace=0.0)
    outcome.notes.append(f"{len(moments)} moments")
    return outcome


def stopped_and_continued(
    site: Site,
    outcome: Outcome,
    config: Mapping[str, Any],
    faults: Sequence[Fault],
    *,
    ranks: int = 1,
    what: str = "",
    may_finish: bool = False,
    pace: float = PACE,
) -> None:
    """A run that signals stop, and the same command again."""
    place = site.place(config)
    first = place.run(*faults, ranks=ranks, pace=pace)
    outcome.failed(first, what)
    if may_finish and not any(first.codes):
        outcome.compare(site.reference(config, ranks), (place, first), what)
        return
    continued(site, outcome, config, place, first, ranks=ranks, what=what)


def continued(
    site: Site, outcome: Outcome, config: Mapping[str, Any], place: Place, first: Ended, *, ranks: int, what: str = ""
) -> None:
    """Checks how a run was stopped, and that the same command ends it."""
    outcome.check(first.codes == [EXIT_RESUME] * ranks, f"{what}: codes {first.codes}: {first.tail()}")
    last = [max((entry["step"] for entry in first.entries("step", rank)), default=-1) for rank in range(ranks)]
    outcome.check(len(set(last)) == 1, f"{what}: the ranks stopped after steps {last}")
    outcome.check(bool(kept(place)) and kept(place)[0] == last[0], f"{what}: kept {kept(place)}, reached {last[0]}")
    again = place.run(ranks=ranks)
    outcome.went_on(first, again, at=last[0])
    outcome.compare(site.reference(config, ranks), (place, again), what)


def time_limit(site: Site) -> Outcome:
    """The end of the job's time, 62 s after its start: 60 s are the margin"""
    outcome, place = Outcome(), site.place(changed(TABLE, training={"epochs": 100}))
    end = time.time() + 62
    first = place.run(ranks=2, pace=PACE, variables={"AADL_END_TIME": str(end)})
    spare = end - time.time()
    outcome.check(50 < spare < 62, f"it stopped {spare:.0f} s before the end")
    outcome.check("stopped by time limit" in first.log, first.tail())
    continued(site, outcome, changed(TABLE, training={"epochs": 100}), place, first, ranks=2)
    outcome.notes.append(f"stopped and saved {spare:.0f} s before the end")
    return outcome


# ---- ranks that hang, fail or go astray ------------------------------------------------------------------------------


def restarts_of_torchrun(site: Site) -> Outcome:
    """A rank that crashes again and again under torchrun --max-restarts"""
    count = 1 if site.quick else 10
    outcome, place = Outcome(), site.place()
    kinds = ("raise_memory_error", "SIGKILL")
    faults = [Fault(kinds[n % 2], step=3 + 4 * n, rank=n // 2 % 2, attempt=n) for n in range(count)]
    log, diary = place.files()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += [f"--max-restarts={count}", "--monitor-interval=0.1", "-m", "benchmarks.fault_jobs", *place.arguments]
    environment = clean_environment() | place.instructions(diary, faults, pace=PACE)
    start = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            launcher, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=60 + 40 * count)
        except subprocess.TimeoutExpired:
            raise Hung(f"torchrun did not end; {log.read_text(errors='replace')[-300:]}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    ended = Ended([code], start, time.monotonic(), log.read_text(errors="replace"), Job([], log, diary).diary())
    crashes = ended.entries("fault")
    outcome.check(len(crashes) == count, f"{len(crashes)} of {count} crashes: {ended.tail()}")
    num_forced = ended.log.count("forcefully exiting via 9")
    outcome.check(num_forced == 0, f"{num_forced} times a rank did not end before torchrun killed it, after 30 s")
    ends = [*(crash["time"] for crash in crashes[1:]), ended.end]
    for crash, end in zip(crashes, ends, strict=True):
        attempt = [entry for entry in ended.diary if crash["time"] < entry["time"] <= end]
        restored = [entry for entry in attempt if entry["what"] == "restored"]
        begun = max((entry["time"] for entry in restored), default=end)
        steps = [entry["time"] for entry in attempt if entry["what"] == "step" and entry["time"] > begun]
        if len(restored) == 2 and steps:
            outcome.lost.append(max(0, int(crash["step"] - min(entry["step"] for entry in restored))))
            outcome.recoveries.append(min(steps) - crash["time"])
    outcome.check(len(outcome.recoveries) == count, f"{len(outcome.recoveries)} of {count} recoveries")
    outcome.compare(site.reference(ranks=2), (place, ended))
    outcome.notes.append(f"{count} crashes in one job; from the crash to a new step, two interpreters started anew")
    return outcome


def hanging_rank(site: Site) -> Outcome:
    """A rank that hangs, with 6 s for a collective"""
    outcome = Outcome()
    config = changed(TABLE, launch={"collective_seconds": 6})
    place = site.place(config)
    first = place.run(Fault("hang", step=21, rank=1), ranks=2, pace=PACE)
    outcome.failed(first)
    outcome.check(max(outcome.detections, default=99.0) < 15, "it took too long")
    outcome.check(all(code not in (0, EXIT_RESUME) for code in first.codes), f"codes {first.codes}")
    outcome.check(bool(kept(place)), "no good checkpoint was left")
    named = re.search(r"rank 1( on \S+)? (gave no|did not|does not|hangs|is late|was lost)", first.log)
    outcome.check(named is not None, f"the rank that hangs is not named: {first.tail()}")
    again = place.run(ranks=2)
    outcome.went_on(first, again)
    outcome.compare(site.reference(config, 2), (place, again))
    return outcome


def straying_rank(site: Site) -> Outcome:
    """A rank that skips a step, decides otherwise, or sends another shape"""
    outcome = Outcome()
    expected = {
        "skip_step": "the ranks are at different steps",
        "decide_otherwise": "the ranks have taken different decisions",
        "send_another_shape": "",  # gloo ends one rank or both, in words of its own
    }
    for action, message in list(expected.items())[1 if site.quick else 0 : 2 if site.quick else 3]:
        config = changed(TABLE, launch={"collective_seconds": 10})
        place = site.place(config)
        first = place.run(Fault(action, step=21, rank=1), ranks=2, pace=PACE)
        outcome.failed(first, action)
        outcome.check(all(code not in (0, EXIT_RESUME) for code in first.codes), f"{action}: codes {first.codes}")
        outcome.check(message in first.log, f"{action}: not told: {first.tail()}")
        again = place.run(ranks=2)
        outcome.went_on(first, again)
        outcome.compare(site.reference(config, 2), (place, again), action)
    return outcome


def disagreeing_losses(site: Site) -> Outcome:
    """Ranks whose local losses disagree on every candidate"""
    outcome = Outcome()
    acceleration = EAGER | {"safeguard": "loss"}
    config = changed(
        TABLE, variants={"aadl": {"optimizer": SGD, "acceleration": acceleration}}, training={"epochs": 13}
    )
    place = site.place(config)
    ended = place.run(ranks=2, skewed=True)
    digests = [[entry["digest"] for entry in ended.entries("end", rank)] for rank in (0, 1)]
    outcome.check(len(digests[0]) == 1 and digests[0] == digests[1], f"the ranks ended apart: {ended.tail()}")
    outcome.check(ended.codes == [0, 0], f"codes {ended.codes}")
    if not outcome.problems:
        with h5py.File(place.record) as file:
            group = file["acceleration"]
            attempts, accepted = int(group["attempts"][-1]), int(group["accepted"][-1])
        outcome.check(0 < accepted < attempts, f"{accepted} of {attempts} candidates were accepted: nothing to decide")
        outcome.notes.append(f"{accepted} of {attempts} candidates accepted in 104 steps")
    outcome.num_compared += 1
    return outcome


def stopped_process(site: Site) -> Outcome:
    """SIGSTOP of a rank for 3 s, then SIGCONT"""
    outcome, place = Outcome(), site.place()
    job = place.start(Fault("SIGSTOP", step=21, rank=1), ranks=2, pace=PACE)
    job.wait_for("fault")
    time.sleep(3.0)
    job.send(signal.SIGCONT, 1)
    ended = job.wait()
    outcome.lost.append(0)
    outcome.compare(site.reference(ranks=2), (place, ended))
    told = re.findall(r"rank 1 on \S+ stood still for ([\d.]+) s", ended.log)
    outcome.check(any(float(seconds) >= 2.0 for seconds in told), f"the straggler is not told: {ended.tail()}")
    outcome.notes.append("the run goes on, and tells who was late")
    return outcome


def failing_rank(site: Site) -> Outcome:
    """A MemoryError on one rank, and an exception in a worker of data"""
    outcome = Outcome()
    place = site.place()
    first = place.run(Fault("raise_memory_error", step=21, rank=1), ranks=2, pace=PACE)
    check_failure(outcome, first, "MemoryError: as if there were none left")
    again = place.run(ranks=2)
    outcome.went_on(first, again)
    outcome.compare(site.reference(ranks=2), (place, again))
    if not site.quick:
        config = changed(IMAGES, problem={"data_path": site.images(), "num_workers": 1})
        place = site.place(config)
        first = place.run(Fault("raise_in_worker", place="worker", rank=1), ranks=2, pace=PACE)
        check_failure(outcome, first, "ZeroDivisionError: in a worker")
        again = place.run(ranks=2)
        outcome.went_on(first, again, at=first.reached)
        outcome.compare(site.reference(config, 2), (place, again), "worker")
    return outcome


def check_failure(outcome: Outcome, ended: Ended, message: str) -> None:
    """Whether all ranks ended, with the traceback of the one that failed, once."""
    outcome.failed(ended)
    outcome.check(all(code == 1 for code in ended.codes), f"codes {ended.codes}: {ended.tail()}")
    told = ended.log.count(" failed:\nTraceback"), ended.log.count(f"\n{message}")
    outcome.check(told == (1, 1), f"{told} tracebacks of {message}")
    outcome.check("ended because rank 1" in ended.log, "the other rank does not name it")


# ---- other numbers of processes, other moments -----------------------------------------------------------------------


def other_world_size(site: Site) -> Outcome:
    """1, then 2, then 1 rank; 0, then 2 workers of data"""
    outcome = Outcome()
    plain = changed(TABLE, variants={"aadl": {"optimizer": SGD}})
    place = site.place(plain)
    parts = [place.run(Fault("SIGUSR1", step=11), rows=True), place.run(Fault("SIGUSR1", step=29), ranks=2, rows=True)]
    parts.append(place.run(rows=True))
    for before, after in itertools.pairwise(parts):
        outcome.went_on(before, after, at=before.reached)
    expected = site.reference(plain)
    orders = [rows_by_step([expected[1]]), rows_by_step(parts)]
    outcome.check(orders[0] == orders[1], "the steps saw other rows, or in another order")
    outcome.compare(expected, (place, parts[-1]), "ranks", tolerance=1e-6)
    if not site.quick:
        config = changed(IMAGES, problem={"data_path": site.images(), "num_workers": 0})
        place = site.place(config)
        first = place.run(Fault("SIGUSR1", step=8), pace=PACE)
        place.configure(changed(config, problem={"num_workers": 2}))
        again = place.run()
        outcome.went_on(first, again, at=first.reached)
        outcome.compare(site.reference(config), (place, again), "workers")
    outcome.notes.append("losses within 1e-6, rows of every step in the same order" if not outcome.problems else "")
    return outcome


def rows_by_step(parts: Sequence[Ended]) -> dict[tuple[int, int], list[int]]:
    """Checksums of the rows of each step (epoch, number of the step), in the order of the whole batch."""
    found: dict[tuple[int, int], list[int]] = {}
    for part in parts:
        ranks = len(part.codes)
        for rank in range(ranks):
            for entry in part.entries("step", rank):
                batch = found.setdefault((entry["epoch"], entry["step"]), [0] * len(entry["rows"]) * ranks)
                batch[rank::ranks] = entry["rows"]
    return found


def resumed_anywhere(site: Site) -> Outcome:
    """Stops after the first steps of an epoch, its last ones, and at its end"""
    outcome, place = Outcome(), site.place()
    epoch = STEPS_PER_EPOCH
    moments = (0, 1, 2 * epoch - 2, 2 * epoch - 1, 3 * epoch, 4 * epoch + 1)
    parts = []
    for moment in moments:
        parts.append(place.run(Fault("SIGUSR1", step=moment), rows=True))
        outcome.check(parts[-1].codes == [EXIT_RESUME], f"step {moment}: {parts[-1].tail()}")
        outcome.check(kept(place)[:1] == [parts[-1].reached], f"step {moment}: saved elsewhere: {kept(place)}")
    parts.append(place.run(rows=True))
    for before, after in itertools.pairwise(parts):
        outcome.went_on(before, after, at=before.reached)
    seen: dict[int, Counter[int]] = {}
    for part in parts:
        for entry in part.entries("step"):
            seen.setdefault(entry["epoch"], Counter()).update(entry["rows"])
    expected = site.reference()
    whole = Counter(row for entry in expected[1].entries("step") if entry["epoch"] == 1 for row in entry["rows"])
    outcome.check(
        len(seen) == 6 and all(rows == whole for rows in seen.values()), "an epoch missed rows, or saw some twice"
    )
    outcome.compare(expected, (place, parts[-1]))
    outcome.notes.append(f"{len(moments)} stops in one run; every row once an epoch" if not outcome.problems else "")
    return outcome


def second_job(site: Site) -> Outcome:
    """A second job on the same output folder; then a third one after the first was killed"""
    outcome, place = Outcome(), site.place()
    job = place.start(pace=0.2)
    job.wait_for("saved")
    second = place.run()
    outcome.detections.append(second.end - second.start)
    outcome.check(second.codes == [2] and "is in use by process" in second.log, f"not refused: {second.tail()}")
    outcome.check(not second.entries("step") and job.lives, "the second job took steps, or ended the first")
    job.send(signal.SIGKILL)
    first = job.wait()
    again = place.run()
    outcome.check("its process is gone" in again.log, f"the lock of a dead job was not taken over: {again.tail()}")
    outcome.went_on(first, again)
    outcome.compare(site.reference(), (place, again))
    return outcome


FAULTS: dict[int, Callable[[Site], Outcome]] = {
    1: killed_rank,
    2: fault_files.killed_writer,
    3: fault_files.killed_amid_save,
    4: fault_files.damaged_checkpoint,
    5: fault_files.full_disk,
    6: fault_files.transient_error,
    7: fault_files.unwritable_folder,
    8: signaled_rank,
    9: signaled_anywhere,
    10: restarts_of_torchrun,
    11: hanging_rank,
    12: straying_rank,
    17: disagreeing_losses,
    18: other_world_size,
    19: resumed_anywhere,
    22: fault_files.killed_record,
    25: second_job,
    26: time_limit,
    27: fault_files.hostile_checkpoint,
    29: stopped_process,
    30: failing_rank,
    31: random_kills,
}
"""By their numbers in the list of faults that a training suite should survive; the numbers left out are about numerics
and data, which have tests of their own."""
