"""Faults of files: writers that are killed, damaged and forged checkpoints, full and forbidden disks."""

import random
import signal
import time

import h5py
import pytest
from disks import small_disk
from fault_jobs import Fault
from fault_site import PACE, QUICK, STEPS_PER_EPOCH, TABLE, changed, goes_on, has_met_its_fault, kept


@pytest.mark.parametrize("rank", [0, 1, -1])
def test_sigkill_of_a_rank_or_of_both_amid_a_save(site, rank):
    place = site.place()
    first = place.run(Fault("SIGKILL", place="gathering", step=24, rank=rank), ranks=2, pace=PACE)
    has_met_its_fault(first)
    again = place.run(ranks=2)
    assert len({(entry["step"], entry["digest"]) for entry in again.entries("restored")}) == 1
    goes_on(first, again)
    site.equals(place, again, ranks=2)


@pytest.mark.parametrize(("what", "moment"), [("checkpoint", "step"), ("record", "after unlink")])
def test_a_full_disk_ends_the_run_in_one_sentence_and_costs_no_checkpoint(site, what, moment):
    with small_disk(site.folder / f"disk-{what}", "24m") as disk:
        place = site.place(results=disk / "results")
        ballast = disk / "ballast"
        first = place.run(Fault("fill_disk", step=21, place=moment), pace=PACE, ballast=str(ballast))
        has_met_its_fault(first)
        assert first.codes == [1] and "No space left on device" in first.log and str(disk) in first.log
        assert "Traceback" not in first.log and (what == "record" or "bytes are free" in first.log)
        assert not [path.name for path in disk.rglob("*") if "tmp" in path.name] and kept(place)
        ballast.unlink()
        site.recovers(place, first)


def test_sigkill_while_the_record_is_written_and_read_by_others(site):
    count = 4 if QUICK else 20
    config = changed(TABLE, training={"epochs": 12 if QUICK else 40}, save={"every_seconds": 0.0})
    numbers, place, last = random.Random(3), site.place(config), None
    for number in range(count):
        job = place.start(pace=PACE)  # so that no processor is done before the last kill
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
