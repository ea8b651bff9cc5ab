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
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from digests import digest
from system_calls import POINTS, meet_points
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from experiments.distributed import departure
from experiments.distributed.ranks import Ranks
from experiments.distributed.step_vote import StepVote, Tally
from experiments.runs import checkpoint, checkpoint_files
from experiments.runs import state as experiment_state
from experiments.runs.checkpoint import CheckpointError, Checkpoints
from experiments.runs.state import num_bytes_of, on_cpu, rng_state, set_rng_state


def state_at(step, size=3000):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(size, generator=generator), "steps": torch.tensor(step)},
        "optimizer": {"state": {0: {"momentum": torch.randn(size, generator=generator)}}, "lr": 0.1 / (step + 1)},
        "history": {"rows": torch.randn(3, size, generator=generator), "count": step},
    }


def own_at(step, rank=0):
    return {"rng": torch.full((500,), 10 * step + rank), "rank": rank}


def saved(folder, *steps, **options):
    """The checkpoints of a single process with these steps."""
    checkpoints = Checkpoints(folder, Ranks(), **options)
    for step in steps:
        checkpoints.save(step, state_at(step), own_at(step), identity="run")
    return checkpoints


def assert_loads(checkpoints, step, identity="run"):
    loaded = checkpoints.load(identity=identity)
    assert loaded is not None and loaded.step == step
    assert digest(loaded.shared) == digest(state_at(step))
    assert digest(loaded.own) == digest(own_at(step))
    return loaded


def names(folder):
    return sorted(os.listdir(folder))


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
    assert loaded["tensors"][7] is loaded["tensors"][8]
    assert [tensor.dtype for tensor in loaded["tensors"]] == [tensor.dtype for tensor in state["tensors"]]


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    checkpoints = Checkpoints(tmp_path, Ranks())
    checkpoints.save(1, {"row": torch.zeros(100, 100_000)[3]}, {})
    assert (tmp_path / "step-0000000001.pt").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({1, 2}, "is a set"),
        (np.float64(1.0), "is a numpy.float64"),
        (np.zeros(2), "is a numpy.ndarray"),
        (argparse.Namespace(a=1), "is a argparse.Namespace"),
        (len, "is a builtin_function_or_method"),
        (torch.zeros(3).to_sparse(), "of layout torch.sparse_coo"),
        (torch.zeros(3, device="meta"), "without data"),
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


@pytest.mark.parametrize("keep", [0, -1, True, 1.0])
def test_keep_must_be_positive(tmp_path, keep):
    with pytest.raises(ValueError, match=r"keep must be an integer >= 1, got"):
        Checkpoints(tmp_path, Ranks(), keep=keep)


@pytest.mark.parametrize("step", [-1, True, 1.0, 10**15])
def test_step_must_be_a_count(tmp_path, step):
    with pytest.raises(ValueError, match="step must be an integer"):
        Checkpoints(tmp_path, Ranks()).save(step, {}, {})


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "missing", Ranks()).load() is None
    assert Checkpoints(tmp_path, Ranks()).load() is None
    (tmp_path / ".tmp-step-0000000009.pt-abc").touch()  # leftovers and other files are none
    (tmp_path / "results.h5").touch()
    assert Checkpoints(tmp_path, Ranks()).load() is None


def test_last_ones_and_the_best_one_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2)
    for step in range(6):
        checkpoints.save(step, state_at(step), own_at(step), best=step in (0, 2), identity="run")
    assert names(tmp_path) == ["step-0000000002-best.pt", "step-0000000004.pt", "step-0000000005.pt"]
    assert_loads(checkpoints, 5)


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    checkpoints = saved(tmp_path, 1, keep=1)
    checkpoints.save(1, state_at(8), own_at(8), identity="run")
    assert names(tmp_path) == ["step-0000000001.pt"]
    assert digest(checkpoints.load(identity="run").shared) == digest(state_at(8))
    checkpoints.save(1, state_at(9), own_at(9), best=True, identity="run")
    assert names(tmp_path) == ["step-0000000001-best.pt"]
    assert digest(checkpoints.load(identity="run").shared) == digest(state_at(9))
    checkpoints.save(2, state_at(2), own_at(2), best=True, identity="run")
    assert names(tmp_path) == ["step-0000000002-best.pt"]


def test_leftovers_of_dead_attempts_are_removed_by_the_next_save(tmp_path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / ".tmp-step-0000000009.pt-abcd").write_bytes(b"half")
    assert_loads(checkpoints, 1)
    checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert names(tmp_path) == ["step-0000000001.pt", "step-0000000002.pt"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    saved(tmp_path, 1, 2)
    flip_bit(tmp_path / "step-0000000002.pt", 0.5)
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2)
    assert_loads(checkpoints, 1)
    checkpoints.save(3, state_at(3), own_at(3), identity="run")
    assert names(tmp_path) == [f"step-000000000{step}.pt" for step in (1, 2, 3)]
    checkpoints.save(4, state_at(4), own_at(4), identity="run")
    assert names(tmp_path) == ["step-0000000003.pt", "step-0000000004.pt"]


def flip_bit(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def punch_hole(path):
    data = bytearray(path.read_bytes())
    start = len(data) // 2 // 4096 * 4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def cut(path, share):
    os.truncate(path, int(path.stat().st_size * share))


DAMAGES = {
    **{f"bit flip at {place}": lambda path, place=place: flip_bit(path, place) for place in (0.1, 0.5, 0.9)},
    **{f"cut at {share}": lambda path, share=share: cut(path, share) for share in (0, 0.1, 0.5, 0.99)},
    "hole": punch_hole,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_the_one_before_is_taken(tmp_path, capsys, damage):
    checkpoints = saved(tmp_path, 1, 2)
    path = tmp_path / "step-0000000002.pt"
    DAMAGES[damage](path)
    loaded = assert_loads(checkpoints, 1)
    [(name, reason)] = loaded.rejected
    assert name == path.name and f"{path.name} is damaged" in reason
    assert f"checkpoint {path.name} is not used: {path.name} is damaged" in capsys.readouterr().err

    (tmp_path / "step-0000000001.pt").unlink()  # nothing left: the run does not start again in silence
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


@pytest.mark.parametrize("section", ["weight", "momentum", "rows"])
def test_a_flipped_bit_in_any_tensor_is_found(tmp_path, section):
    """torch.load takes each of these files."""
    checkpoints = saved(tmp_path, 1, 2)
    state = state_at(2)
    tensor = {**state["model"], **state["optimizer"]["state"][0], **state["history"]}[section]
    path = tmp_path / "step-0000000002.pt"
    data = bytearray(path.read_bytes())
    place = data.index(tensor.numpy().tobytes())
    data[place + 400] ^= 4
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    assert_loads(checkpoints, 1)


def forge(path, **changes):
    """Writes a checkpoint with other contents in the place of one."""
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def test_another_format_is_named(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    forge(tmp_path / "step-0000000002.pt", format=99)
    loaded = assert_loads(checkpoints, 1)
    text = "step-0000000002.pt has format 99, and this program reads format 3"
    assert loaded.rejected == [("step-0000000002.pt", text)]


def test_folders_of_a_former_version_are_no_silent_new_start(tmp_path):
    for name in ("step-0000000003", "step-0000000003.1", ".old-step-0000000002-ab", ".tmp-step-0000000004-cd"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"as step-0000000003\S*, are folders, which a former version wrote"):
        Checkpoints(tmp_path, Ranks()).load(identity="run")
    checkpoint_files.remove_checkpoints(tmp_path)
    assert names(tmp_path) == []


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
    marker = tmp_path / "executed"
    folder = tmp_path / "checkpoints"
    checkpoints = saved(folder, 1)
    contents = {
        "argparse.Namespace": {"shared": [argparse.Namespace(a=1)]},
        "posix.system": {"shared": [Malicious(marker)]},
        "something else": {"weights": torch.zeros(3)},
        "something else than a checkpoint": {"own": 3},
    }
    path = folder / "step-0000000002.pt"
    for text, content in contents.items():
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
        forge(path, **content)
        assert text in assert_loads(checkpoints, 1).rejected[0][1]
    path.write_bytes(pickle.dumps(Malicious(marker)))
    assert "refused" in assert_loads(checkpoints, 1).rejected[0][1]
    assert not marker.exists()
    os.system(f"touch {marker}")  # the marker tells an execution
    assert marker.exists()


def save_and_die(folder, point, step):
    def die(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    meet_points(die)
    checkpoints = Checkpoints(folder, Ranks(), keep=1)
    checkpoints.save(step, state_at(step), own_at(step), identity="run")


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


@pytest.mark.parametrize("point", POINTS)
def test_a_writer_killed_at_any_point_leaves_a_whole_checkpoint(tmp_path, processes, point):
    checkpoints = saved(tmp_path, 1, keep=1)
    assert exit_code(processes, save_and_die, tmp_path, point, 2) == -signal.SIGKILL
    is_new = POINTS.index(point) > POINTS.index("before replace")
    assert assert_loads(checkpoints, 2 if is_new else 1).rejected == []
    checkpoints.save(3, state_at(3), own_at(3), identity="run")
    assert names(tmp_path) == ["step-0000000003.pt"]


def test_without_a_kill_the_same_process_saves(tmp_path, processes):
    assert exit_code(processes, save_and_die, tmp_path, "nowhere", 2) == 0
    assert_loads(Checkpoints(tmp_path, Ranks()), 2)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"mount: {error}")
    if done.returncode != 0:
        pytest.skip(f"a tmpfs needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(small_disk, capsys):
    checkpoints = saved(small_disk, 1)
    large = {"model": torch.zeros(3_000_000)}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, large, {}, identity="run")
    text = str(caught.value)
    assert "step 2" in text and str(small_disk) in text and "No space left on device" in text
    needed = int(text.split("it needs ")[1].split()[0])
    assert 12_000_000 <= needed <= 12_001_000
    assert capsys.readouterr().err.count("warning: the checkpoint of step 2 failed") == 1
    assert names(small_disk) == ["step-0000000001.pt"]
    assert_loads(checkpoints, 1)
    checkpoints.save(3, state_at(3), own_at(3), identity="run")
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
def failing(monkeypatch, module, name, code, times):
    """A function of the system fails that many times."""
    original, left = getattr(module, name), [times]

    def fail(*arguments, **options):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(module, name, fail)
        yield left


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_transient_error_costs_one_warning(tmp_path, monkeypatch, capsys, name, code):
    checkpoints = saved(tmp_path, 1)
    with failing(monkeypatch, os, name, code, 1) as left:
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert left == [0]
    assert capsys.readouterr().err.count("warning") == 1
    assert_loads(checkpoints, 2)
    assert names(tmp_path) == ["step-0000000001.pt", "step-0000000002.pt"]


@pytest.mark.parametrize(("code", "attempts"), [(errno.EIO, 2), (errno.EACCES, 1), (errno.EROFS, 1)])
def test_a_lasting_error_is_raised(tmp_path, monkeypatch, capsys, code, attempts):
    checkpoints = saved(tmp_path, 1)
    with (
        failing(monkeypatch, os, "fsync", code, 100) as left,
        pytest.raises(CheckpointError, match=f"step 2 cannot be written to {tmp_path}: .*{os.strerror(code)}"),
    ):
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert left == [100 - attempts]
    assert capsys.readouterr().err.count("warning") == attempts - 1
    assert names(tmp_path) == ["step-0000000001.pt"]
    assert_loads(checkpoints, 1)


def save_without_permission(folder):
    if os.getuid() == 0:
        os.setuid(65534)
    checkpoints = Checkpoints(folder, Ranks())
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert_loads(checkpoints, 1)


def test_a_lost_permission_leaves_the_checkpoint_before(processes):
    with tempfile.TemporaryDirectory() as parent:  # that of pytest is closed to others
        os.chmod(parent, 0o755)
        folder = Path(parent) / "run"
        checkpoints = saved(folder, 1)
        os.chmod(folder, 0o555)
        assert exit_code(processes, save_without_permission, folder) == 0
        os.chmod(folder, 0o755)
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
        assert_loads(checkpoints, 2)


def test_old_checkpoints_that_cannot_be_removed_are_no_error(tmp_path, monkeypatch, capsys):
    checkpoints = saved(tmp_path, 1, keep=1)
    monkeypatch.setattr(os, "unlink", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert "old checkpoints in" in capsys.readouterr().err
    assert_loads(checkpoints, 2)


def test_later_changes_do_not_reach_an_asynchronous_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Ranks(), asynchronous=True)
    state, own = state_at(1), own_at(1)
    gate = checkpoints_gate(monkeypatch)
    checkpoints.save(1, state, own, identity="run")
    state["model"]["weight"].zero_()
    own["rng"].zero_()
    state["history"]["count"] = 99
    assert names(tmp_path) == []  # nothing was written yet
    gate.set()
    checkpoints.wait()
    assert_loads(checkpoints, 1)


def checkpoints_gate(monkeypatch):
    """Writers wait for the event that is returned."""
    gate, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: gate.wait() and write(*arguments))
    return gate


def test_an_asynchronous_error_appears_at_the_next_call_and_once(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, asynchronous=True)
    checkpoints.wait()
    for call in (checkpoints.wait, lambda: checkpoints.save(3, state_at(3), own_at(3)), checkpoints.load):
        with failing(monkeypatch, os, "fsync", errno.EACCES, 100):
            checkpoints.save(2, state_at(2), own_at(2), identity="run")
            checkpoints._thread.join()
        with pytest.raises(CheckpointError, match="step 2"):
            call()
        checkpoints.close()
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


def test_digest_tells_states_apart():
    state = {"a": torch.tensor([1.0, 2.0]), "b": [1, (2.0, None)], 3: "x"}
    same = {3: "x", "b": [1, (2.0, None)], "a": torch.tensor([1.0, 2.0])}
    assert digest(state) == digest(same)
    others = [
        {**state, "a": torch.tensor([1.0, -2.0])},
        {**state, "a": torch.tensor([1.0, 2.0]).double()},
        {**state, "a": torch.tensor([[1.0, 2.0]])},
        {**state, "b": [1, [2.0, None]]},
        {**state, "b": [True, (2.0, None)]},
        {**state, "b": [1.0, (2.0, None)]},
        {**state, "c": {}},
        {**state, "c": []},
        {"a": state["a"], "b": state["b"], "3": "x"},
    ]
    digests = [digest(other) for other in [state, *others]]
    assert len(set(digests)) == len(digests)
    assert digest({"x": 0.0}) != digest({"x": -0.0}) and digest({"x": math.nan}) == digest({"x": math.nan})


# Several ranks


def two_ranks(rank, world_size, folder):
    ranks = Ranks(rank, world_size)
    checkpoints = Checkpoints(folder, ranks)
    told = {"none": checkpoints.load() is None}
    for step in (1, 2):
        checkpoints.save(step, state_at(step), own_at(step, rank), identity="run")
    told["loaded"] = outcome(checkpoints, rank)

    read = checkpoint.read
    if rank == 1:
        checkpoint.read = lambda path: unreadable(path) if "2" in path.name else read(path)
    told["one cannot read"] = outcome(checkpoints, rank)
    checkpoint.read = read

    original = checkpoint.write
    checkpoint.write = no_space if rank == 0 else unexpected  # a full disk
    told["the first fails"] = error_of(lambda: checkpoints.save(3, state_at(3), own_at(3, rank), identity="run"))
    checkpoint.write = original
    told["after a failure"] = names(folder)
    told["one rank has a set"] = error_of(lambda: checkpoints.save(3, {}, {"a": {1} if rank == 1 else 1}))
    told["other step"] = error_of(lambda: checkpoints.save(3 + rank, {}, {}))
    told["other tensors"] = error_of(lambda: checkpoints.save(3, {"a": torch.zeros(2 + rank)}, {}))
    told["identity"] = error_of(lambda: checkpoints.load(identity="other"))
    checkpoints.save(4, state_at(4), own_at(4, rank), identity="run")
    told["later"] = outcome(checkpoints, rank)
    return told


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unexpected(*_):
    raise AssertionError("rank 0 alone writes")


def unreadable(path):
    raise ValueError(f"{path.name} cannot be read (Input/output error)")


def outcome(checkpoints, rank):
    loaded = checkpoints.load(identity="run")
    assert digest(loaded.shared) == digest(state_at(loaded.step))
    assert digest(loaded.own) == digest(own_at(loaded.step, rank))
    return loaded.step, loaded.world_size_saved, loaded.rejected


def error_of(action):
    try:
        action()
    except (CheckpointError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.smoke
def test_ranks_save_load_and_fail_together(spawn_ranks, tmp_path):
    first, second = spawn_ranks(two_ranks, 2, tmp_path / "run")
    assert first["none"] and second["none"]
    size = (tmp_path / "run" / "step-0000000004.pt").stat().st_size
    needed = int(first["the first fails"][1].split("it needs ")[1].split()[0])
    assert 0.8 * size < needed < size
    assert first["loaded"] == second["loaded"] == (2, 2, [])
    reason = "step-0000000002.pt cannot be read (Input/output error) (rank 1)"
    assert first["one cannot read"] == second["one cannot read"] == (1, 2, [("step-0000000002.pt", reason)])
    for told in (first, second):
        kind, text = told["the first fails"]
        assert kind == "CheckpointError" and "No space left on device; it needs" in text
        assert told["after a failure"] == ["step-0000000001.pt", "step-0000000002.pt"]
        assert "rank 1 saves step 4, unlike rank 0" in told["other step"][1]
        assert "rank 1 saves tensors of other names or shapes" in told["other tensors"][1]
        assert told["identity"][0] in ("ValueError", "CheckpointError")
        assert told["later"] == (4, 2, [])
    assert first["one rank has a set"] == (
        "CheckpointError",
        "the checkpoint of step 3 was not written: own['a'] is a set: a checkpoint holds dicts (keys str or int), "
        "lists, tuples, tensors, str, int, float, bool and None (rank 1)",
    )
    assert second["one rank has a set"][0] == "TypeError"

    loaded = Checkpoints(tmp_path / "run", Ranks()).load(identity="run")  # by fewer ranks
    assert digest(loaded.shared) == digest(state_at(4)) and digest(loaded.own) == digest(own_at(4, 0))
    assert loaded.world_size_saved == 2


GATHERING = "gathering"
FULL = torch.arange(70, dtype=torch.float32).reshape(7, 10)


def sharded_ranks(rank, world_size, folder, asynchronous):
    mesh = init_device_mesh("cpu", (world_size,))
    checkpoints = Checkpoints(folder, Ranks(rank, world_size), asynchronous=asynchronous)
    told = {"own": checkpoints.load().own}  # of fewer ranks
    state = {
        "weight": distribute_tensor(FULL, mesh, [Shard(0)]),
        "copy": distribute_tensor(FULL + 1, mesh, [Replicate()]),
        "plain": torch.ones(3),
    }
    checkpoints.save(1, state, own_at(1, rank))
    state["weight"].to_local().mul_(-1)
    checkpoints.save(2, state, own_at(2, rank))
    state["weight"].to_local().zero_()
    loaded = checkpoints.load().shared
    told["equal"] = [torch.equal(loaded["weight"], -FULL), torch.equal(loaded["copy"], FULL + 1)]
    told["own of a DTensor"] = error_of(lambda: checkpoints.save(3, {}, state))
    return told


@pytest.mark.parametrize("asynchronous", [False, True])
def test_sharded_tensors_are_saved_whole(spawn_ranks, tmp_path, asynchronous):
    Checkpoints(tmp_path / "run", Ranks()).save(0, {}, own_at(0))
    first, second = spawn_ranks(sharded_ranks, 2, tmp_path / "run", asynchronous)
    assert first.pop("own")["rank"] == 0 and second.pop("own") is None
    text = "own['weight'] is a DTensor, which belongs into the shared state"
    assert first == second == {"equal": [True, True], "own of a DTensor": ("TypeError", text)}
    alone = Checkpoints(tmp_path / "run", Ranks()).load()  # without any process group
    assert alone.step == 2 and torch.equal(alone.shared["weight"], -FULL)


def agree_while_saving(rank, world_size, folder):
    """The thread of rank 0 hangs behind while the main threads go on."""
    departure.PATIENCE_SECONDS = 20.0  # of a group, if the thread should use one
    ranks = Ranks(rank, world_size)
    checkpoints, vote = Checkpoints(folder, ranks, asynchronous=True), StepVote(ranks, timeout_seconds=20)
    goes_on = threading.Event()
    if rank == 0:
        write = checkpoint.write
        checkpoint.write = lambda *arguments: goes_on.wait() and write(*arguments)
    checkpoints.save(1, state_at(1), own_at(1, rank), identity="run")
    tallies = [vote.vote_now(step, step == 3 and rank == 1, True) for step in range(5)]
    if rank == 0:  # the other one may look when this one has gone on
        assert names_of(folder) == []
    goes_on.set()
    checkpoints.close()
    return tallies, outcome(checkpoints, rank), names_of(folder)


def names_of(folder):
    return names(folder) if folder.exists() else []


def test_ranks_agree_while_a_checkpoint_is_written(spawn_ranks, tmp_path):
    first, second = spawn_ranks(agree_while_saving, 2, tmp_path / "run")
    assert first == second
    tallies, loaded, files = first
    assert tallies == [Tally(step, step == 3, True) for step in range(5)]
    assert loaded == (1, 2, []) and files == ["step-0000000001.pt"]


def save_and_lose_a_rank(rank, world_size, folder, point, doomed):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent ends the others as soon as it sees a death
    checkpoints = Checkpoints(folder, Ranks(rank, world_size), keep=1)
    checkpoints.save(1, state_at(1), own_at(1, rank), identity="run")

    def die(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == doomed:
        meet_points(die)
        checkpoint.on_cpu = lambda *_, **__: die(GATHERING)
    told = error_of(lambda: checkpoints.save(2, state_at(2), own_at(2, rank), identity="run"))
    (folder / "told").write_text(" ".join(told))
    os._exit(0)


@pytest.mark.parametrize(
    ("point", "doomed"),
    [(GATHERING, 1), pytest.param("after fsync", 0, marks=pytest.mark.slow)],
)
def test_a_rank_killed_while_saving_is_noticed_by_the_others(spawn_ranks, tmp_path, point, doomed):
    folder = tmp_path / "run"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        spawn_ranks(save_and_lose_a_rank, 2, folder, point, doomed)  # which gives the others 30 s
    told = (folder / "told").read_text()
    assert told.startswith(f"CheckpointError a rank was lost among the checkpoints in {folder}")
    assert_loads(Checkpoints(folder, Ranks()), 1)


def test_bytes_are_counted_once():
    tensor = torch.zeros(1000)
    assert num_bytes_of({"a": tensor, "b": [tensor, 3], "c": tensor.double()}) == 12_000


def test_a_rank_that_writes_nothing_copies_nothing(monkeypatch):
    monkeypatch.setattr(experiment_state, "_plain", lambda *_: pytest.fail("a copy"))
    assert on_cpu({**state_at(1), "list": [torch.zeros(3), 0.5]}, copy=True, keep=False) is None


def test_a_short_file_is_noticed_by_the_one_that_wrote_it(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)
    monkeypatch.setattr(
        os, "fsync", lambda handle: os.truncate(handle, 100) if os.fstat(handle).st_size > 5000 else None
    )
    with pytest.raises(CheckpointError, match=r"step-0000000002\.pt has 100 bytes after \d+ were written"):
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert_loads(checkpoints, 1)
