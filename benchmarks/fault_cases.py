"""The faults, one function each: it lets them happen to real processes, starts the same command again, and compares."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
from torch import Tensor

from benchmarks.fault_jobs import ROOT, Ended, Fault, Hung, Job, Place, clean_environment, differences
from data_loaders import fractals
from experiments import checkpoint_files, checkpoint_folder
from experiments.checkpoint import Checkpoints, verify_folder
from experiments.interruption import EXIT_RESUME
from experiments.launch import Ranks
from experiments.state import leaves

SGD = {"name": "SGD", "lr": 1e-2, "momentum": 0.9, "nesterov": True}
EAGER = {"store_each_nth": 1, "frequency": 2, "wait_iterations": 1, "history_depth": 3}
STEPS_PER_EPOCH = 8
TABLE: dict[str, Any] = {
    "experiment": "graduate_admissions",
    "scale": "faults",
    "seeds": [0],
    "problem": {"hidden_sizes": [16, 16]},
    "training": {"epochs": 6, "batch_size": 40},
    "variants": {"aadl": {"optimizer": SGD, "acceleration": EAGER}},
    "save": {"every_seconds": 0.1, "keep": 2},
    "launch": {"rendezvous": "file", "start_seconds": 60, "collective_seconds": 60},
}
IMAGES: dict[str, Any] = TABLE | {
    "experiment": "imagenet",
    "problem": {
        "data": "folder",
        "model": "resnet18",
        "image_size": 24,
        "resize": 24,
        "statistics_images": 16,
        "statistics_batch": 8,
        "evaluation_batch": 8,
    },
    "training": {"epochs": 3, "batch_size": 8, "schedule": "cosine", "warmup_epochs": 0.5},
    "variants": {"aadl": {"optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9}, "acceleration": EAGER}},
}
NUM_STEPS = 6 * STEPS_PER_EPOCH
PACE = 0.02
"""Seconds that a job is held up after each step, so that it lasts long enough for several saves."""


class Impossible(Exception):
    """A fault cannot be made to happen here; the message says why."""


@dataclass
class Outcome:
    """What the faults of an item led to; of several, the worst is told.

    Attributes:
        detections: seconds from each fault to the end of its job, or to its next step where it goes on.
        lost: steps taken before the fault that had to be taken again.
        recoveries: seconds from each new start to its first new step on all ranks.
        problems: what was not as it must be.
        notes: what else to tell.
        num_compared: comparisons with a run without faults.
    """

    detections: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_compared: int = 0

    def check(self, good: bool, problem: str) -> None:
        """Notes a problem unless all is good."""
        if not good:
            self.problems.append(problem)

    def failed(self, ended: Ended, what: str = "") -> None:
        """A job that was ended by a fault: how long that took."""
        faults = ended.entries("fault")
        if not faults:
            self.problems.append(f"{what}: the fault did not happen: {ended.tail()}")
            return
        self.detections.append(ended.end - faults[0]["time"])

    def went_on(self, before: Ended, after: Ended, at: int | None = None) -> None:
        """The job that follows: what was lost, and how long it took."""
        faults = before.entries("fault")
        reached = at if at is not None else int(faults[0]["step"]) if faults else before.reached
        self.lost.append(max(0, reached - max(after.restored, 0)))
        if after.recovery_seconds is not None:
            self.recoveries.append(after.recovery_seconds)

    def compare(
        self,
        expected: tuple[Place, Ended],
        found: tuple[Place, Ended],
        what: str = "",
        tolerance: float | None = None,
    ) -> None:
        """Compares the end with that of a run without faults."""
        self.num_compared += 1
        self.problems += [f"{what}: {text}" if what else text for text in differences(expected, found, tolerance)]


class Site:
    """Where the jobs of the faults are, and the runs without any, made once each."""

    def __init__(self, folder: Path, *, quick: bool = False, say: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.quick, self.say = folder, quick, say
        self._references: dict[tuple[str, int], tuple[Place, Ended]] = {}
        self._count = 0

    def place(self, config: Mapping[str, Any] = TABLE, results: Path | None = None) -> Place:
        """A new output folder."""
        self._count += 1
        return Place(self.folder / f"place-{self._count}", config, results=results)

    def reference(self, config: Mapping[str, Any] = TABLE, ranks: int = 1) -> tuple[Place, Ended]:
        """The uninterrupted run.

        Raises:
            RuntimeError: not even that ends well.
        """
        key = json.dumps({**config, "save": None}, sort_keys=True), ranks
        if key not in self._references:
            place = self.place({**config, "save": {"every_seconds": 1e6}})
            ended = place.run(ranks=ranks, rows=True)
            if any(ended.codes):
                raise RuntimeError(f"a run without any fault ended with {ended.codes}: {ended.tail()}")
            self._references[key] = place, ended
        return self._references[key]

    def images(self) -> str:
        """A small set of images."""
        folder = self.folder / "images"
        if not folder.exists():
            options = {"num_classes": 4, "images_per_class": 12, "validation_per_class": 5, "size": 24, "seed": 3}
            fractals.write_folder(folder, **options, num_workers=1, progress=False)
        return str(folder)


def changed(config: Mapping[str, Any], **changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other settings in some of its parts."""
    raw = copy.deepcopy(dict(config))
    for part, settings in changes.items():
        raw[part] = {**raw[part], **settings}
    return raw


def kept(place: Place) -> list[int]:
    """Steps of the good checkpoints, newest first."""
    return [f.step for f in verify_folder(place.run_folder) if not f.problem and f.step is not None]


# ---- processes that die, writers included ----------------------------------------------------------------------------


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


WRITER_POINTS = (
    "before temporary",
    "temporary made",
    "file written",
    "file synced",
    "before manifest",
    "manifest synced",
    "renamed",
    "published",
    "pruning",
    "pruned",
)


def killed_writer(site: Site) -> Outcome:
    """SIGKILL of rank 0 at each point of writing a checkpoint"""
    outcome = Outcome()
    points = WRITER_POINTS[3:8:4] if site.quick else WRITER_POINTS
    ranks = 1 if site.quick else 2
    for point in points:
        place = site.place()
        first = place.run(Fault("SIGKILL", place=point, step=24), ranks=ranks, pace=PACE)
        outcome.failed(first, point)
        steps = kept(place)
        begun = [entry["step"] for entry in first.entries("save", 0)]
        outcome.check(bool(steps) and steps[0] in begun[-2:], f"{point}: kept {steps}, saves at {begun}")
        again = place.run(ranks=ranks)
        outcome.check(again.restored == max(steps, default=0), f"{point}: the newest good one was not taken")
        outcome.went_on(first, again)
        outcome.compare(site.reference(ranks=ranks), (place, again), point)
    outcome.notes.append(f"{len(points)} points, {ranks} ranks")
    return outcome


def killed_amid_save(site: Site) -> Outcome:
    """SIGKILL of each rank, and of both, amid a save; damage that only one rank can see"""
    outcome = Outcome()
    for rank in (0, 1, -1):
        place = site.place()
        first = place.run(Fault("SIGKILL", place="file written", step=24, rank=rank), ranks=2, pace=PACE)
        outcome.failed(first)
        if rank == -1:  # the file of rank 1 in the newest checkpoint: both ranks must take the one before
            newest = max(place.run_folder.glob("step-*"))
            damage(newest / checkpoint_folder.rank_file(1), None, "bit")
        again = place.run(ranks=2)
        states = {(entry["step"], entry["digest"]) for entry in again.entries("restored")}
        outcome.check(len(states) == 1, f"the ranks went on from {len(states)} states")
        told = "is not used: rank-00001.pt is damaged" in again.log
        outcome.check(told == (rank == -1), f"rank {rank}: what was said of damage is wrong: {again.tail()}")
        outcome.went_on(first, again)
        outcome.compare(site.reference(ranks=2), (place, again), f"rank {rank}")
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
    job.send(signal.SIGKILL, None if is_early or numbers.random() < 0.5 else numbers.randrange(ranks))
    ended = job.wait()
    if not any(code == -signal.SIGKILL for code in ended.codes):
        return None
    outcome.detections.append(ended.end - killed_at)
    return ended


def amid_save(ended: Ended) -> bool:
    """Whether rank 0 was saving when it ended."""
    return len(ended.entries("save", 0)) > len(ended.entries("saved", 0))


# ---- damaged and hostile checkpoints ---------------------------------------------------------------------------------


def damage(path: Path, tensor: Tensor | None, kind: str) -> None:
    """Damages a file; a flipped bit falls into the tensor, if one is given."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if kind == "bit":
        place = middle
        if tensor is not None:
            found = data.find(tensor.contiguous().numpy().tobytes())
            if found < 0:
                raise RuntimeError(f"{path.name} does not hold the tensor as it is")
            place = found + tensor.numel() * tensor.element_size() // 2
        data[place] ^= 4
    elif kind == "hole":
        start = middle // 4096 * 4096
        data[start : start + 4096] = bytes(4096)
    else:
        del data[int(len(data) * float(kind)) :]
    path.write_bytes(data)


def sections(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """File and one tensor of each kind of state in a checkpoint."""
    identity = checkpoint_folder.read_manifest(folder)["identity"]
    loaded = Checkpoints(folder.parent, Ranks()).load(identity=identity)
    assert loaded is not None and loaded.folder == folder and loaded.own is not None
    shared = [(n, t) for n, t in leaves(loaded.shared, "shared") if isinstance(t, Tensor) and t.numel() > 100]
    own = [(n, t) for n, t in leaves(loaded.own, "own") if isinstance(t, Tensor)]
    patterns = {"weights": r"\bmodel\b.*weight", "momentum": "momentum_buffer", "history": "aadl"}
    found = {
        section: (checkpoint_files.SHARED, next(t for name, t in shared if re.search(pattern, name)))
        for section, pattern in patterns.items()
    }
    return found | {"RNG": (checkpoint_folder.rank_file(0), next(t for n, t in own if "rng" in n and t.numel() > 100))}


def damaged_checkpoint(site: Site) -> Outcome:
    """Flipped bits, holes and cuts in the newest checkpoint, then in all"""
    outcome = Outcome()
    place = site.place()
    first = place.run(Fault("SIGTERM", step=21), pace=PACE)
    outcome.check(first.codes == [EXIT_RESUME], f"the run was not stopped: {first.tail()}")
    newest = max(place.run_folder.glob("step-*"))
    found = sections(newest)
    damages: dict[str, tuple[str, Tensor | None, str]]
    damages = {f"a bit of the {section}": (*where, "bit") for section, where in found.items()}
    shared = (checkpoint_files.SHARED, None)
    damages |= {"a hole": (*shared, "hole")} | {f"cut at {at}": (*shared, at) for at in ("0.1", "0.5", "0.99")}
    original = place.folder / "original"
    shutil.copytree(place.results, original)
    for what, (name, tensor, kind) in list(damages.items())[:: 3 if site.quick else 1]:
        shutil.rmtree(place.results)
        shutil.copytree(original, place.results)
        damage(newest / name, tensor, kind)
        again = place.run()
        told = f"checkpoint {newest.name} is not used: {name}" in again.log
        outcome.check(told, f"{what}: not told: {again.tail()}")
        outcome.went_on(first, again)
        outcome.compare(site.reference(), (place, again), what)
    shutil.rmtree(place.results)
    shutil.copytree(original, place.results)
    for folder in place.run_folder.glob("step-*"):
        damage(folder / checkpoint_files.SHARED, None, "bit")
    last = place.run()
    good = last.codes == [1] and "no checkpoint in" in last.log and "Traceback" not in last.log
    outcome.check(good, f"all damaged: ended with {last.codes}: {last.tail()}")
    outcome.notes.append("with none left: code 1 and one sentence")
    return outcome


class _Command:
    """What a pickle runs when it is loaded by somebody who trusts it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def hostile_checkpoint(site: Site) -> Outcome:
    """A forged checkpoint that runs a command when it is unpickled, and one with other objects"""
    import argparse

    import torch

    outcome = Outcome()
    for content in (_Command("touch %s"), argparse.Namespace(lr=1)):
        place = site.place()
        first = place.run(Fault("SIGTERM", step=21), pace=PACE)
        newest, witness = max(place.run_folder.glob("step-*")), place.folder / "witness"
        if isinstance(content, _Command):
            content.command %= witness
        torch.save({"tree": content, "tensors": []}, newest / checkpoint_files.SHARED, pickle_module=pickle)
        forge_manifest(newest, checkpoint_files.SHARED)
        again = place.run()
        refused = f"checkpoint {newest.name} is not used: {checkpoint_files.SHARED} is refused" in again.log
        outcome.check(refused, f"not refused: {again.tail()}")
        outcome.check(not witness.exists(), "the command was executed")
        outcome.went_on(first, again)
        outcome.compare(site.reference(), (place, again))
    with suppress(FileNotFoundError):  # the oracle can fail: whoever trusts the file runs the command
        torch.load(newest / checkpoint_files.SHARED, weights_only=False)
    return outcome


def forge_manifest(folder: Path, name: str) -> None:
    """Makes the manifest fit a file that was exchanged."""
    manifest = checkpoint_folder.read_manifest(folder)
    manifest["files"][name] = checkpoint_files.entry_of(folder / name)._asdict()
    manifest["checksum"] = checkpoint_folder.checksum_of(manifest)
    (folder / checkpoint_folder.MANIFEST).write_text(json.dumps(manifest))


# ---- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own.

    Raises:
        Impossible: this user cannot mount one.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Impossible(f"no mount: {error.strerror}") from None
    if done.returncode != 0:
        raise Impossible(f"a small disk needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(site: Site) -> Outcome:
    """A disk of 24 MB that is full when a checkpoint, and then when the record, is written"""
    outcome = Outcome()
    for what, moment in {"checkpoint": "step", "record": "pruned"}.items():
        with small_disk(site.folder / f"disk-{what}", "24m") as disk:
            place = site.place(results=disk / "results")
            ballast = disk / "ballast"
            first = place.run(Fault("fill_disk", step=21, place=moment), pace=PACE, ballast=str(ballast))
            outcome.failed(first, what)
            told = "No space left on device" in first.log and str(disk) in first.log
            good = first.codes == [1] and told and "Traceback" not in first.log
            outcome.check(good, f"{what}: ended with {first.codes}: {first.tail()}")
            if what == "checkpoint":
                outcome.check("bytes are free" in first.log, "the bytes are not told")
            left = [path.name for path in disk.rglob("*") if "tmp" in path.name]
            outcome.check(not left and bool(kept(place)), f"{what}: left {left}; good checkpoints {kept(place)}")
            ballast.unlink()
            again = place.run()
            outcome.went_on(first, again)
            outcome.compare(site.reference(), (place, again), what)
    outcome.notes.append("the run ends with code 1 and one sentence")
    return outcome


def transient_error(site: Site) -> Outcome:
    """One EIO from a disk that works again at once"""
    outcome, place = Outcome(), site.place()
    ended = place.run(Fault("raise_transient", place="file written", step=21), ranks=2, pace=PACE)
    outcome.check(bool(ended.entries("fault")), "the fault did not happen")
    outcome.check(ended.log.count("and is written once more") == 1, f"not one warning: {ended.tail()}")
    outcome.lost.append(0)
    outcome.compare(site.reference(ranks=2), (place, ended))
    outcome.notes.append("one warning, and the run goes on")
    return outcome


def unwritable_folder(site: Site) -> Outcome:
    """An output folder without permission to write"""
    outcome, place = Outcome(), site.place()
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        place.results = Path(parent) / "results"
        place.results.mkdir(mode=0o555)
        for folder in [place.folder, *place.folder.parents]:
            if folder.owner() == Path.home().owner() and folder.stat().st_uid == os.getuid() and folder != Path("/"):
                with suppress(OSError):
                    os.chmod(folder, folder.stat().st_mode | 0o011)
        os.chmod(place.folder, 0o777)
        ended = place.run(user=65534 if os.getuid() == 0 else None)
        outcome.detections.append(ended.end - ended.start)
        outcome.check(ended.codes == [2] and "cannot be written: Permission denied" in ended.log, ended.tail())
        outcome.check(not ended.entries("step") and "Traceback" not in ended.log, "a step was taken before")
    outcome.lost.append(0)
    outcome.notes.append("code 2 before the first step")
    return outcome


def killed_record(site: Site) -> Outcome:
    """SIGKILL at random moments while the record is written again and again, and read by others"""
    count = 4 if site.quick else 20
    config = changed(TABLE, training={"epochs": 12 if site.quick else 40}, save={"every_seconds": 0.0})
    outcome, numbers, place = Outcome(), random.Random(3), site.place(config)
    reads, last = 0, None
    for number in range(count):
        job = place.start()
        end = None
        while job.lives and (end is None or time.monotonic() < end):
            if end is None and any(entry["what"] == "saved" for entry in job.diary()):
                end = time.monotonic() + numbers.uniform(0.0, 0.5)
            reads += readable_epochs(place, outcome) is not None
            time.sleep(0.01)
        outcome.check(job.lives, f"the run was over before kill {number + 1}")
        killed_at = time.monotonic()
        job.send(signal.SIGKILL)
        ended = job.wait()
        outcome.detections.append(ended.end - killed_at)
        epochs = readable_epochs(place, outcome)
        saved = max((int(entry["step"]) for entry in ended.entries("saved")), default=0)
        complete = saved // STEPS_PER_EPOCH
        outcome.check(epochs is not None and epochs >= complete, f"{epochs} epochs in the record after {saved} steps")
        if last is not None:
            outcome.went_on(last, ended)
        last = ended
    place.configure(changed(config, save={"every_seconds": 1.0}))
    again = place.run()
    outcome.compare(site.reference(config), (place, again))
    outcome.notes.append(f"{count} kills, {reads} reads meanwhile, none of them failed" if not outcome.problems else "")
    return outcome


def readable_epochs(place: Place, outcome: Outcome) -> int | None:
    """Completed epochs in the record of the run, None where there is no record yet."""
    for path in place.results.glob("*/*/*/seed-*.h5"):
        try:
            with h5py.File(path, "r") as file:
                return len(file["metrics/validation/loss"]) - 1
        except (OSError, KeyError) as error:
            outcome.problems.append(f"the record cannot be read: {error}")
    return None


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
    crashes, begins = ended.entries("fault"), ended.entries("begin")
    outcome.check(len(crashes) == count and len(begins) == 2 * (count + 1), f"{len(crashes)} crashes: {ended.tail()}")
    for crash in crashes:
        later = [entry for entry in ended.diary if entry["time"] > crash["time"]]
        restored = [entry["step"] for entry in later if entry["what"] == "restored"][:2]
        first = [
            next(
                (e["time"] for e in later if e["what"] == "step" and e["rank"] == r and e["time"] > _restart(later)),
                None,
            )
            for r in (0, 1)
        ]
        if restored and None not in first:
            outcome.lost.append(max(0, crash["step"] - min(restored)))
            outcome.recoveries.append(max(filter(None, first)) - crash["time"])
    outcome.compare(site.reference(ranks=2), (place, ended))
    outcome.notes.append(
        f"{len(outcome.recoveries)} of {count} crashes in one job; recovery from crash to step, Python starting anew"
    )
    return outcome


def _restart(entries: Sequence[Mapping[str, Any]]) -> float:
    """When the next attempt began."""
    return min((entry["time"] for entry in entries if entry["what"] == "restored"), default=float("inf"))


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
        "send_another_shape": "",
    }
    for action, message in list(expected.items())[1 if site.quick else 0 : 2 if site.quick else 3]:
        debug = action == "send_another_shape"  # torch alone can tell, and only if it is asked to compare
        config = changed(TABLE, launch={"debug": debug, "collective_seconds": 10})
        place = site.place(config)
        first = place.run(Fault(action, step=21, rank=1), ranks=2, pace=PACE)
        outcome.failed(first, action)
        outcome.check(all(code == 1 for code in first.codes), f"{action}: codes {first.codes}: {first.tail()}")
        told = "mismatch" in first.log.lower() if debug else message in first.log
        outcome.check(told, f"{action}: not told: {first.tail()}")
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
    outcome.notes.append("the run goes on")
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
        config = changed(IMAGES, problem={"data_path": site.images(), "num_workers": 1, "start_method": "fork"})
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
        config = changed(IMAGES, problem={"data_path": site.images()})
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
    2: killed_writer,
    3: killed_amid_save,
    4: damaged_checkpoint,
    5: full_disk,
    6: transient_error,
    7: unwritable_folder,
    8: signaled_rank,
    9: signaled_anywhere,
    10: restarts_of_torchrun,
    11: hanging_rank,
    12: straying_rank,
    17: disagreeing_losses,
    18: other_world_size,
    19: resumed_anywhere,
    22: killed_record,
    25: second_job,
    26: time_limit,
    27: hostile_checkpoint,
    29: stopped_process,
    30: failing_rank,
    31: random_kills,
}
"""By their numbers in the list of faults that a training suite should survive; the numbers left out are about numerics
and data, which have tests of their own."""
