"""Faults of files: writers that are killed, damaged and forged checkpoints, full and forbidden disks."""

import argparse
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import pytest
import torch
from fault_jobs import Fault, Place
from fault_site import PACE, QUICK, STEPS_PER_EPOCH, TABLE, changed, failed_in_time, goes_on, kept
from system_calls import POINTS
from torch import Tensor

from experiments.runs.checkpoint_files import read
from experiments.runs.checkpoint_state import leaves


@pytest.mark.parametrize("point", ["after fsync", "after replace"] if QUICK else POINTS)
def test_sigkill_of_rank_0_at_a_point_of_writing_a_checkpoint(site, point):
    ranks = 1 if QUICK else 2
    place = site.place()
    first = place.run(Fault("SIGKILL", place=point, step=24), ranks=ranks, pace=PACE)
    failed_in_time(first)
    steps = kept(place)
    assert steps and steps[0] in [entry["step"] for entry in first.entries("save", 0)][-2:]
    again = place.run(ranks=ranks)
    assert again.restored == steps[0]
    site.equals(place, again, ranks=ranks)


@pytest.mark.parametrize("rank", [0, 1, -1])
def test_sigkill_of_a_rank_or_of_both_amid_a_save(site, rank):
    place = site.place()
    first = place.run(Fault("SIGKILL", place="gathering", step=24, rank=rank), ranks=2, pace=PACE)
    failed_in_time(first)
    again = place.run(ranks=2)
    assert len({(entry["step"], entry["digest"]) for entry in again.entries("restored")}) == 1
    goes_on(first, again)
    site.equals(place, again, ranks=2)


# ---- damaged and hostile checkpoints ---------------------------------------------------------------------------------


def damage(path, tensor, kind):
    """Damages a file; a flipped bit falls into the tensor, if one is given."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if kind == "bit":
        place = middle
        if tensor is not None:
            place = data.index(tensor.contiguous().numpy().tobytes()) + tensor.numel() * tensor.element_size() // 2
        data[place] ^= 4
    elif kind == "hole":
        start = middle // 4096 * 4096
        data[start : start + 4096] = bytes(4096)
    else:
        del data[int(len(data) * float(kind)) :]
    path.write_bytes(data)


def sections(path):
    """One tensor of each kind of state in a checkpoint."""
    content = read(path)
    shared = [(n, t) for n, t in leaves(content["shared"], "shared") if isinstance(t, Tensor) and t.numel() > 100]
    own = [(n, t) for n, t in leaves(content["own"][0], "own") if isinstance(t, Tensor)]
    patterns = {"weights": r"\bmodel\b.*weight", "momentum": "momentum_buffer", "history": "aadl"}
    found = {name: next(t for n, t in shared if re.search(pattern, n)) for name, pattern in patterns.items()}
    return found | {"RNG": next(t for n, t in own if "rng" in n and t.numel() > 100)}


@pytest.fixture(scope="module")
def stopped(site):
    """A place with a stopped run, and a copy of what it left."""
    place = site.place()
    site.stopped(place, Fault("SIGTERM", step=21), pace=PACE)
    shutil.copytree(place.results, place.folder / "original")
    return place


DAMAGES = ("weights", "momentum", "history", "RNG", "hole", "0.1", "0.5", "0.99")


@pytest.mark.parametrize("what", DAMAGES[:: 3 if QUICK else 1])
def test_damage_of_the_newest_checkpoint_is_told_and_the_one_before_is_taken(site, stopped, what):
    shutil.rmtree(stopped.results)
    shutil.copytree(stopped.folder / "original", stopped.results)
    newest = max(stopped.run_folder.glob("step-*"))
    tensor = sections(newest).get(what)
    damage(newest, tensor, "bit" if tensor is not None else what)
    again = stopped.run()
    assert f"checkpoint {newest.name} is not used: {newest.name} is damaged" in again.log
    site.equals(stopped, again)


def test_with_no_good_checkpoint_left_the_run_ends_in_one_sentence(stopped):
    shutil.rmtree(stopped.results)
    shutil.copytree(stopped.folder / "original", stopped.results)
    for path in stopped.run_folder.glob("step-*"):
        damage(path, None, "bit")
    last = stopped.run()
    assert last.codes == [1] and "no checkpoint in" in last.log and "Traceback" not in last.log


class Command:
    """What a pickle runs when it is loaded by somebody who trusts it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["command", "object"])
def test_a_forged_checkpoint_is_refused_and_not_executed(site, kind):
    place = site.place()
    site.stopped(place, Fault("SIGTERM", step=21), pace=PACE)
    newest, witness = max(place.run_folder.glob("step-*")), place.folder / "witness"
    content = Command(f"touch {witness}") if kind == "command" else argparse.Namespace(lr=1)
    torch.save({**read(newest), "shared": content}, newest, pickle_module=pickle)
    again = place.run()
    assert f"checkpoint {newest.name} is not used: {newest.name} is damaged or refused (it asks for " in again.log
    assert not witness.exists()
    site.equals(place, again)
    if kind == "command":  # the oracle can fail: whoever trusts the file runs the command
        torch.save({"shared": content}, place.folder / "forged", pickle_module=pickle)
        torch.load(place.folder / "forged", weights_only=False)
        assert witness.exists()


# ---- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder, size):
    """A file system of its own."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount: {error.strerror}")
    if done.returncode != 0:
        pytest.skip(f"a small disk needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize(("what", "moment"), [("checkpoint", "step"), ("record", "after unlink")])
def test_a_full_disk_ends_the_run_in_one_sentence_and_costs_no_checkpoint(site, what, moment):
    with small_disk(site.folder / f"disk-{what}", "24m") as disk:
        place = site.place(results=disk / "results")
        ballast = disk / "ballast"
        first = place.run(Fault("fill_disk", step=21, place=moment), pace=PACE, ballast=str(ballast))
        failed_in_time(first)
        assert first.codes == [1] and "No space left on device" in first.log and str(disk) in first.log
        assert "Traceback" not in first.log and (what == "record" or "bytes are free" in first.log)
        assert not [path.name for path in disk.rglob("*") if "tmp" in path.name] and kept(place)
        ballast.unlink()
        again = place.run()
        goes_on(first, again)
        site.equals(place, again)


def test_one_eio_from_a_disk_that_works_again_costs_one_warning(site):
    place = site.place()
    ended = place.run(Fault("raise_transient", place="before fsync", step=21), ranks=2, pace=PACE)
    assert ended.entries("fault") and ended.log.count("and is written once more") == 1
    site.equals(place, ended, ranks=2)


def test_a_folder_without_permission_is_refused_before_the_first_step():
    with tempfile.TemporaryDirectory() as parent:  # because the site's own folder may be closed to others
        os.chmod(parent, 0o755)
        results = Path(parent) / "results"
        results.mkdir(mode=0o555)
        place = Place(Path(parent) / "place", TABLE, results=results)
        os.chmod(place.folder, 0o777)
        ended = place.run(user=65534 if os.getuid() == 0 else None)
        assert ended.codes == [2] and "cannot be written: Permission denied" in ended.log
        assert not ended.entries("step") and "Traceback" not in ended.log


# ---- the record ------------------------------------------------------------------------------------------------------


def test_sigkill_while_the_record_is_written_and_read_by_others(site):
    count = 4 if QUICK else 20
    config = changed(TABLE, training={"epochs": 12 if QUICK else 40}, save={"every_seconds": 0.0})
    numbers, place, last = random.Random(3), site.place(config), None
    for number in range(count):
        job = place.start()
        end = None
        while job.lives and (end is None or time.monotonic() < end):
            if end is None and any(entry["what"] == "saved" for entry in job.diary()):
                end = time.monotonic() + numbers.uniform(0.0, 0.5)
            readable_epochs(place)
            time.sleep(0.01)
        assert job.lives, f"the run was over before kill {number + 1}"
        job.send(signal.SIGKILL)
        ended = job.wait()
        assert (readable_epochs(place) or 0) >= max(0, ended.saved - 1) // STEPS_PER_EPOCH  # evaluated after its last
        if last is not None:
            goes_on(last, ended)
        last = ended
    place.configure(changed(config, save={"every_seconds": 1.0}))
    site.equals(place, place.run(), config)


def readable_epochs(place):
    """Completed epochs in the record of the run, None where there is no record yet."""
    for path in place.results.glob("*/*/*/seed-*.h5"):
        with h5py.File(path, "r") as file:
            return len(file["metrics/validation/loss"]) - 1
    return None
