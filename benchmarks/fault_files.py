"""Faults of files: writers that are killed, damaged and forged checkpoints, full and forbidden disks."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from benchmarks.fault_jobs import Fault, Place
from benchmarks.fault_site import PACE, STEPS_PER_EPOCH, TABLE, Impossible, Outcome, Site, changed, kept
from experiments import checkpoint_files, checkpoint_folder
from experiments.checkpoint import Checkpoints
from experiments.interruption import EXIT_RESUME
from experiments.launch import Ranks
from experiments.state import leaves

# ---- writers that die ------------------------------------------------------------------------------------------------

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
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as parent:  # for the site's own folder may be closed to others
        os.chmod(parent, 0o755)
        results = Path(parent) / "results"
        results.mkdir(mode=0o555)
        place = Place(Path(parent) / "place", TABLE, results=results)
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
        complete = max(0, saved - 1) // STEPS_PER_EPOCH  # evaluated after its last step
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
