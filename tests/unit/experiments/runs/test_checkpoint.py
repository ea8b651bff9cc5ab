"""Checkpoints of a single process: what they hold, and that a good one is left whatever happens."""

import argparse
import contextlib
import errno
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import threading

import numpy as np
import pytest
import torch
from digests import digest
from disks import small_disk
from saved_states import assert_loads, names, own_at, save, saved, state_at
from system_calls import POINTS, meet_points
from torch import nn

from experiments.distributed.ranks import Ranks
from experiments.runs import checkpoint, checkpoint_files
from experiments.runs.checkpoint import CheckpointError, Checkpoints
from experiments.runs.checkpoint_state import rng_state, set_rng_state

# ---- what they hold --------------------------------------------------------------------------------------------------


def test_values_and_types_survive(tmp_path):
    tied = torch.randn(3)
    state = {
        "floats": [0.1, math.inf, -math.inf, math.nan, -0.0, 5e-324],
        "tuple": (0.9, (1, "a")),
        "others": {"int": 2**80, "bool": True, "none": None, "text": "Ωλ\n\udcff", "empty": [{}, [], (), ""]},
        7: {"int key": False, "7": 1},
        "tensors": [
            torch.randn(2, 3).bfloat16(),
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.tensor(math.nan),
            torch.empty(0, 4),
            torch.tensor([True, False]),
            torch.randn(3, dtype=torch.complex64).conj(),
            nn.Parameter(torch.randn(4)),
            tied,
            tied,
        ],
    }
    checkpoints = Checkpoints(tmp_path, Ranks())
    checkpoints.save(1, state, {})
    loaded = checkpoints.load().shared
    assert repr({key: loaded[key] for key in ("floats", "tuple", "others", 7)}) == repr(
        {key: state[key] for key in ("floats", "tuple", "others", 7)}
    )
    assert digest(loaded) == digest(state)
    assert loaded["tensors"][1].stride() == state["tensors"][1].stride()
    assert loaded["tensors"][7].data_ptr() == loaded["tensors"][8].data_ptr()


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    checkpoints = Checkpoints(tmp_path, Ranks())
    checkpoints.save(1, {"row": torch.zeros(100, 100_000)[3]}, {})
    assert (tmp_path / "step-0000000001.pt").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float64(1.0), "is a numpy.float64"),
        (argparse.Namespace(a=1), "is a argparse.Namespace"),
        ({1.5: 0}, "has the key 1.5 of type float"),
        ({True: 0}, "has the key True of type bool"),
    ],
)
def test_other_entries_are_refused_by_name(tmp_path, value, text):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(TypeError) as caught:
        checkpoints.save(2, {"a": [0, {"b": value}]}, {}, identity="run")
    assert "shared['a'][1]['b']" in str(caught.value) and text in str(caught.value)
    with pytest.raises(TypeError, match="own"):
        checkpoints.save(2, {}, {"b": value}, identity="run")
    assert_loads(checkpoints, 1)
    assert names(tmp_path) == ["step-0000000001.pt"]


def test_random_generators_continue(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    draw()  # an odd number of gauss calls leaves one number behind
    checkpoints = Checkpoints(tmp_path, Ranks())
    checkpoints.save(1, {}, {"rng": rng_state()})
    expected = [draw() for _ in range(400)]
    assert [draw() for _ in range(400)] != expected
    set_rng_state(checkpoints.load().own["rng"])
    assert [draw() for _ in range(400)] == expected


# ---- which of them stay ----------------------------------------------------------------------------------------------


def test_a_folder_without_checkpoints_loads_none(tmp_path):
    assert Checkpoints(tmp_path / "missing", Ranks()).load() is None
    (tmp_path / ".step-0000000009.pt-abcd.tmp").touch()  # leftovers and other files are none
    (tmp_path / "results.h5").touch()
    assert Checkpoints(tmp_path, Ranks()).load() is None


def test_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2)
    for step in range(6):
        save(checkpoints, step)
    assert names(tmp_path) == ["step-0000000004.pt", "step-0000000005.pt"]
    assert_loads(checkpoints, 5)


def test_a_checkpoint_marked_as_the_best_by_a_former_version_is_one(tmp_path):
    checkpoints = saved(tmp_path, 1, keep=1)
    (tmp_path / "step-0000000001.pt").rename(tmp_path / "step-0000000001-best.pt")
    assert_loads(checkpoints, 1)
    save(checkpoints, 2)
    assert names(tmp_path) == ["step-0000000002.pt"]


def test_a_best_one_of_the_same_step_is_replaced_and_is_no_older_one(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, keep=2)
    (tmp_path / "step-0000000002.pt").rename(tmp_path / "step-0000000002-best.pt")
    save(checkpoints, 2)
    assert names(tmp_path) == ["step-0000000001.pt", "step-0000000002.pt"]
    flip_bit(tmp_path / "step-0000000002.pt")
    assert_loads(checkpoints, 1)


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    checkpoints = saved(tmp_path, 1, keep=1)
    checkpoints.save(1, state_at(8), own_at(8), identity="run")
    assert names(tmp_path) == ["step-0000000001.pt"]
    assert digest(checkpoints.load(identity="run").shared) == digest(state_at(8))


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    saved(tmp_path, 1, 2)
    flip_bit(tmp_path / "step-0000000002.pt")
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2)
    assert_loads(checkpoints, 1)
    save(checkpoints, 3)
    assert names(tmp_path) == [f"step-000000000{step}.pt" for step in (1, 2, 3)]
    save(checkpoints, 4)
    assert names(tmp_path) == ["step-0000000003.pt", "step-0000000004.pt"]


# ---- damaged, foreign and hostile files ------------------------------------------------------------------------------


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def punch_hole(path):
    data = bytearray(path.read_bytes())
    start = len(data) // 2 // 4096 * 4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


DAMAGES = {
    "bit flip": flip_bit,
    "hole": punch_hole,
    **{
        f"cut at {part}": lambda path, part=part: os.truncate(path, int(path.stat().st_size * part))
        for part in (0, 0.9)
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_the_one_before_is_taken(tmp_path, capsys, damage):
    checkpoints = saved(tmp_path, 1, 2)
    path = tmp_path / "step-0000000002.pt"
    DAMAGES[damage](path)
    [(name, reason)] = assert_loads(checkpoints, 1).rejected
    assert name == path.name and f"{path.name} is damaged" in reason
    assert f"checkpoint {path.name} is not used: {path.name} is damaged" in capsys.readouterr().err

    (tmp_path / "step-0000000001.pt").unlink()  # nothing left: the run does not start again without a message
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* can be used .{path.name}: {path.name} is damaged"):
        checkpoints.load(identity="run")


def test_whichever_bit_is_flipped_no_other_state_is_loaded(tmp_path):
    """Bits that say nothing, as those of a time, may be flipped; all others are noticed."""
    state = {"model": torch.arange(40.0), "steps": [1, 2.5, "text"]}
    content = {"format": 3, "identity": "run", "step": 7, "shared": state, "own": [own_at(7)]}
    path = tmp_path / "step-0000000007.pt"
    checkpoint_files.write(path, content)
    whole, expected = path.read_bytes(), digest(content)
    noticed = 0
    for place in range(0, 8 * len(whole), 61):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert digest(checkpoint_files.read(path)) == expected, place
        except ValueError as error:
            noticed += 1
            assert path.name in str(error)
    assert noticed > 8 * len(whole) / 61 / 2


def forge(path, **changes):
    """Writes a checkpoint with other contents in the place of one."""
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def test_another_format_is_named(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    forge(tmp_path / "step-0000000002.pt", format=99)
    text = "step-0000000002.pt has format 99, and this program reads format 3"
    assert assert_loads(checkpoints, 1).rejected == [("step-0000000002.pt", text)]


def test_another_identity_is_no_silent_new_start(tmp_path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"saved by another run \(identity 'run', not 'other'\)"):
        checkpoints.load(identity="other")
    checkpoints.save(2, state_at(2), own_at(2), identity="other")
    assert_loads(checkpoints, 1)
    assert_loads(checkpoints, 2, identity="other")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_file_is_refused_and_not_executed(tmp_path):
    marker, folder = tmp_path / "executed", tmp_path / "checkpoints"
    checkpoints = saved(folder, 1)
    contents = {
        "argparse.Namespace": {"shared": [argparse.Namespace(a=1)]},
        "posix.system": {"shared": [Malicious(marker)]},
        "something else": {"weights": torch.zeros(3)},
        "something else than a checkpoint": {"own": 3},
    }
    path = folder / "step-0000000002.pt"
    for text, content in contents.items():
        save(checkpoints, 2)
        forge(path, **content)
        assert text in assert_loads(checkpoints, 1).rejected[0][1]
    path.write_bytes(pickle.dumps(Malicious(marker)))
    assert "refused" in assert_loads(checkpoints, 1).rejected[0][1]
    assert not marker.exists()
    os.system(f"touch {marker}")  # the marker shows that it was executed
    assert marker.exists()


# ---- writers that are killed, and disks that fail --------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes that start quickly, from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch.distributed.tensor", "experiments.runs.checkpoint"])
    return context


def exit_code(processes, function, *arguments):
    process = processes.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def save_and_die(folder, point, step):
    def die(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    meet_points(die)
    saved(folder, step, keep=1)


@pytest.mark.parametrize("point", [*POINTS, "nowhere"])
def test_a_writer_killed_at_any_point_leaves_a_whole_checkpoint(tmp_path, processes, point):
    checkpoints = saved(tmp_path, 1, keep=1)
    code = exit_code(processes, save_and_die, tmp_path, point, 2)
    assert code == (0 if point == "nowhere" else -signal.SIGKILL)
    is_old = POINTS.index("before replace") >= (POINTS.index(point) if code else len(POINTS))
    assert assert_loads(checkpoints, 1 if is_old else 2).rejected == []
    save(checkpoints, 3)
    assert names(tmp_path) == ["step-0000000003.pt"]  # what the dead one left behind is gone


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "2m") as disk:
        checkpoints = saved(disk, 1)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(2, {"model": torch.zeros(3_000_000)}, {}, identity="run")
        text = str(caught.value)
        assert "step 2" in text and str(disk) in text and "No space left on device" in text
        assert 12_000_000 <= int(text.split("it needs ")[1].split()[0]) <= 12_001_000
        assert capsys.readouterr().err.count("warning: the checkpoint of step 2 failed") == 1
        assert names(disk) == ["step-0000000001.pt"]
        assert_loads(checkpoints, 1)
        save(checkpoints, 3)
        assert_loads(checkpoints, 3)


def save_beyond_the_limit(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints = Checkpoints(folder, Ranks())
    with pytest.raises(CheckpointError, match="File too large"):
        checkpoints.save(2, {"model": torch.zeros(1_000_000)}, {}, identity="run")
    assert names(folder) == ["step-0000000001.pt"]


def test_a_limit_on_files_leaves_the_checkpoint_before(tmp_path, processes):
    checkpoints = saved(tmp_path, 1)
    assert exit_code(processes, save_beyond_the_limit, tmp_path) == 0
    assert_loads(checkpoints, 1)


@contextlib.contextmanager
def failing(monkeypatch, name, code, times):
    """A function of `os` fails that many times."""
    original, left = getattr(os, name), [times]

    def fail(*arguments, **options):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(os, name, fail)
        yield left


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_transient_error_costs_one_warning(tmp_path, monkeypatch, capsys, name):
    checkpoints = saved(tmp_path, 1)
    with failing(monkeypatch, name, errno.EIO, 1) as left:
        save(checkpoints, 2)
    assert left == [0]
    assert capsys.readouterr().err.count("warning") == 1
    assert_loads(checkpoints, 2)
    assert names(tmp_path) == ["step-0000000001.pt", "step-0000000002.pt"]


@pytest.mark.parametrize(("code", "attempts"), [(errno.EIO, 2), (errno.EACCES, 1)])
def test_a_lasting_error_is_raised(tmp_path, monkeypatch, capsys, code, attempts):
    checkpoints = saved(tmp_path, 1)
    with (
        failing(monkeypatch, "fsync", code, 100) as left,
        pytest.raises(CheckpointError, match=f"step 2 cannot be written to {tmp_path}: .*{os.strerror(code)}"),
    ):
        save(checkpoints, 2)
    assert left == [100 - attempts]
    assert capsys.readouterr().err.count("warning") == attempts - 1
    assert names(tmp_path) == ["step-0000000001.pt"]
    assert_loads(checkpoints, 1)


def test_old_checkpoints_that_cannot_be_removed_are_no_error(tmp_path, monkeypatch, capsys):
    checkpoints = saved(tmp_path, 1, keep=1)
    with failing(monkeypatch, "unlink", errno.EIO, 1):
        save(checkpoints, 2)
    assert "old checkpoints in" in capsys.readouterr().err
    assert_loads(checkpoints, 2)


def test_ctrl_c_ends_the_writing(tmp_path, monkeypatch):
    """No other thread goes on with it after the folder was given back."""
    threads = []

    def interrupted(*_):
        threads.append(threading.current_thread())
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(Checkpoints(tmp_path, Ranks()), 1)
    assert threads == [threading.main_thread()]
