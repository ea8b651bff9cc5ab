import argparse
import contextlib
import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, filesystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from experiments import checkpoint_files, checkpoint_folder, departure
from experiments import state as experiment_state
from experiments.checkpoint import CheckpointError, Checkpoints, digest, rng_state, set_rng_state, verify_folder
from experiments.interruption import Agreement, Word
from experiments.launch import Ranks
from experiments.state import encode

POINTS = (
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
    assert (tmp_path / "step-0000000001" / "shared.pt").stat().st_size < 1_000_000


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
    assert names(tmp_path) == ["step-0000000001"]


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
    (tmp_path / ".tmp-step-0000000009-abc").mkdir()  # leftovers and other files are none
    (tmp_path / "results.h5").touch()
    assert Checkpoints(tmp_path, Ranks()).load() is None


def test_last_ones_and_the_best_one_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2)
    for step in range(6):
        checkpoints.save(step, state_at(step), own_at(step), best=step in (0, 2), identity="run")
    assert names(tmp_path) == ["step-0000000002", "step-0000000004", "step-0000000005"]
    assert_loads(checkpoints, 5)


def test_a_step_saved_again_replaces_the_old_one_at_the_end(tmp_path):
    checkpoints = saved(tmp_path, 1, keep=1)
    checkpoints.save(1, state_at(8), own_at(8), identity="run")
    assert names(tmp_path) == ["step-0000000001.1"]
    assert digest(checkpoints.load(identity="run").shared) == digest(state_at(8))
    checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert names(tmp_path) == ["step-0000000002"]


def test_leftovers_of_dead_attempts_are_removed_by_the_next_save(tmp_path):
    checkpoints = saved(tmp_path, 1)
    for name in (".tmp-step-0000000009-abcd", ".old-step-0000000000-abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared.pt").write_bytes(b"half")
    assert [finding.problem for finding in verify_folder(tmp_path)] == [
        "",
        *["left behind by a process that was killed"] * 2,
    ]
    checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert names(tmp_path) == ["step-0000000001", "step-0000000002"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    saved(tmp_path, 1, 2)
    flip_bit(tmp_path / "step-0000000002" / "shared.pt", 0.5)
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2)
    assert_loads(checkpoints, 1)
    checkpoints.save(3, state_at(3), own_at(3), identity="run")
    assert names(tmp_path) == [f"step-000000000{step}" for step in (1, 2, 3)]
    checkpoints.save(4, state_at(4), own_at(4), identity="run")
    assert names(tmp_path) == ["step-0000000003", "step-0000000004"]


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
    **{f"bit flip at {place}": lambda path, place=place: flip_bit(path, place) for place in (0, 0.1, 0.5, 0.9, 1)},
    **{f"cut at {share}": lambda path, share=share: cut(path, share) for share in (0, 0.1, 0.5, 0.99)},
    "hole": punch_hole,
    "missing": os.remove,
}


@pytest.mark.parametrize("file", ["shared.pt", "rank-00000.pt", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_the_one_before_is_taken(tmp_path, capsys, file, damage):
    checkpoints = saved(tmp_path, 1, 2)
    before = (tmp_path / "step-0000000002" / file).read_bytes()
    DAMAGES[damage](tmp_path / "step-0000000002" / file)
    if damage != "missing":
        assert (tmp_path / "step-0000000002" / file).read_bytes() != before
    loaded = assert_loads(checkpoints, 1)
    [(name, reason)] = loaded.rejected
    assert name == "step-0000000002" and file in reason
    assert f"checkpoint step-0000000002 is not used: {file}" in capsys.readouterr().err
    findings = verify_folder(tmp_path)
    assert [(finding.step, finding.problem == "") for finding in findings] == [(2, False), (1, True)]
    assert file in findings[0].problem

    shutil.rmtree(tmp_path / "step-0000000001")  # nothing left: no silent new start
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* can be used .*step-0000000002: {file}"):
        checkpoints.load(identity="run")


@pytest.mark.parametrize("section", ["weight", "momentum", "rows"])
def test_a_flipped_bit_in_any_tensor_is_found(tmp_path, section):
    """torch.load takes each of these files."""
    checkpoints = saved(tmp_path, 1, 2)
    state = state_at(2)
    tensor = {**state["model"], **state["optimizer"]["state"][0], **state["history"]}[section]
    path = tmp_path / "step-0000000002" / "shared.pt"
    data = bytearray(path.read_bytes())
    place = data.index(tensor.numpy().tobytes())
    data[place + 400] ^= 4
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    assert_loads(checkpoints, 1)


def edit_manifest(folder, **changes):
    """Changes what the manifest says, and its checksum with it."""
    manifest = {**checkpoint_folder.read_manifest(folder), **changes}
    manifest["checksum"] = checkpoint_folder.checksum_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge(folder, file, data):
    """Replaces a file and makes the manifest fit."""
    (folder / file).write_bytes(data)
    entries = {
        **checkpoint_folder.read_manifest(folder)["files"],
        file: checkpoint_files.entry_of(folder / file)._asdict(),
    }
    edit_manifest(folder, files=entries)


def test_another_format_is_named(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    edit_manifest(tmp_path / "step-0000000002", format=99)
    loaded = assert_loads(checkpoints, 1)
    assert loaded.rejected == [("step-0000000002", "it has format 99, and this program reads format 1")]


def test_another_identity_is_no_silent_new_start(tmp_path):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"saved by another run \(identity 'run', not 'other'\)"):
        checkpoints.load(identity="other")
    checkpoints.save(2, state_at(2), own_at(2), identity="other")
    assert_loads(checkpoints, 1)
    assert_loads(checkpoints, 2, identity="other")


def test_another_architecture_is_named(tmp_path):
    checkpoints = saved(tmp_path, 1)
    assert checkpoints.load(identity="run", template={"model": state_at(9)["model"]}).step == 1
    model = state_at(1)["model"]
    wrong = [
        ({**model, "weight": torch.zeros(2)}, r"shared\['model'\]\['weight'\] has shape \(3000,\) .* and shape \(2,\)"),
        ({**model, "weight": model["weight"].double()}, "torch.float32 in it, and shape .* torch.float64 here"),
        ({**model, "bias": torch.zeros(2)}, r"shared\['model'\]\['bias'\] is missing in it"),
        ({"weight": model["weight"]}, r"it has shared\['model'\]\['steps'\], which is missing here"),
    ]
    for template, text in wrong:
        with pytest.raises(CheckpointError, match=f"another architecture: .*{text}"):
            checkpoints.load(identity="run", template={"model": template})


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
        "argparse.Namespace": {"tree": "null", "tensors": [argparse.Namespace(a=1)]},
        "posix.system": {"tree": "null", "tensors": [Malicious(marker)]},
        "something else": {"weights": torch.zeros(3)},
        "tensors": {"tree": "null", "tensors": [3]},
        "tree": {"tree": "{", "tensors": []},
        "wrong entry": {"tree": '{"tensor": 5}', "tensors": []},
    }
    for text, content in contents.items():
        for file in ("shared.pt", "rank-00000.pt"):
            checkpoints.save(2, state_at(2), own_at(2), identity="run")
            doomed = folder / "step-0000000002"
            torch.save(content, tmp_path / "forged")
            forge(doomed, file, (tmp_path / "forged").read_bytes())
            assert text in assert_loads(checkpoints, 1).rejected[0][1]
            assert text in verify_folder(folder)[0].problem
            shutil.rmtree(doomed)
    checkpoints.save(2, state_at(2), own_at(2), identity="run")
    forge(folder / "step-0000000002", "shared.pt", pickle.dumps(Malicious(marker)))
    assert "refused" in assert_loads(checkpoints, 1).rejected[0][1]
    assert not marker.exists()
    os.system(f"touch {marker}")  # the marker tells an execution
    assert marker.exists()


def test_a_malicious_manifest_names_no_other_files(tmp_path):
    checkpoints = saved(tmp_path / "run", 1, 2)
    (tmp_path / "secret").write_bytes(b"secret")
    edit_manifest(tmp_path / "run" / "step-0000000002", files={"../../secret": {"num_bytes": 6, "crc32": 0}})
    assert "'../../secret', which no checkpoint has" in assert_loads(checkpoints, 1).rejected[0][1]


def save_and_die(folder, point, step):
    def die(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    checkpoint_files.kill_point = die
    checkpoints = Checkpoints(folder, Ranks(), keep=1)
    checkpoints.save(step, state_at(step), own_at(step), identity="run")


@pytest.fixture(scope="module")
def processes():
    """Processes that start quickly, from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch.distributed.tensor", "experiments.checkpoint"])
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
    is_new = point in ("renamed", "published", "pruning", "pruned")
    assert_loads(checkpoints, 2 if is_new else 1)
    assert all(finding.problem == "" for finding in verify_folder(tmp_path) if finding.step is not None)
    checkpoints.save(3, state_at(3), own_at(3), identity="run")
    assert names(tmp_path) == ["step-0000000003"]


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
    assert names(small_disk) == ["step-0000000001"]
    assert_loads(checkpoints, 1)
    checkpoints.save(3, state_at(3), own_at(3), identity="run")
    assert_loads(checkpoints, 3)


def save_beyond_the_limit(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints = Checkpoints(folder, Ranks())
    with pytest.raises(CheckpointError, match="File too large"):
        checkpoints.save(2, {"model": torch.zeros(1_000_000)}, {}, identity="run")
    assert names(folder) == ["step-0000000001"]


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


@pytest.mark.parametrize("name", ["fsync", "rename"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_transient_error_costs_one_warning(tmp_path, monkeypatch, capsys, name, code):
    checkpoints = saved(tmp_path, 1)
    with failing(monkeypatch, os, name, code, 1) as left:
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert left == [0]
    assert capsys.readouterr().err.count("warning") == 1
    assert_loads(checkpoints, 2)
    assert names(tmp_path) == ["step-0000000001", "step-0000000002"]


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
    assert names(tmp_path) == ["step-0000000001"]
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
    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
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
    gate = multiprocessing.get_context("spawn").Event()
    monkeypatch.setattr(checkpoint_files, "kill_point", lambda name: gate.wait())
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
    assert names(tmp_path) == ["step-0000000001"]


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


def test_strange_files_are_found_by_the_audit(tmp_path):
    saved(tmp_path, 1)
    assert verify_folder(tmp_path) == [("step-0000000001", 1, "")]
    (tmp_path / "step-0000000001" / "more.pt").touch()
    assert verify_folder(tmp_path)[0].problem == "more.pt is not in manifest.json"
    assert verify_folder(tmp_path / "missing") == []


# Several ranks


def two_ranks(rank, world_size, folder):
    ranks = Ranks(rank, world_size)
    checkpoints = Checkpoints(folder, ranks)
    told = {"none": checkpoints.load() is None}
    for step in (1, 2):
        checkpoints.save(step, state_at(step), own_at(step, rank), identity="run")
    told["files"] = names(folder / "step-0000000002")
    told["loaded"] = outcome(checkpoints, rank)

    if rank == 1:
        flip_bit(folder / "step-0000000002" / "rank-00001.pt", 0.5)
    dist.barrier()
    told["one rank is damaged"] = outcome(checkpoints, rank)

    original = checkpoint_files.write_state
    if rank == 1:  # a full disk on one rank only
        checkpoint_files.write_state = no_space
    told["one rank fails"] = error_of(lambda: checkpoints.save(3, state_at(3), own_at(3, rank), identity="run"))
    checkpoint_files.write_state = original
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


def test_ranks_save_load_and_fail_together(spawn_ranks, tmp_path):
    first, second = spawn_ranks(two_ranks, 2, tmp_path / "run")
    assert first["none"] and second["none"]
    size = sum((tmp_path / "run" / "step-0000000004" / name).stat().st_size for name in first["files"][1:])
    needed = int(first["one rank fails"][1].split("it needs ")[1].split()[0])
    assert 0.9 * size < needed < size  # what rank 0 alone writes counts once
    assert first["files"] == ["manifest.json", "rank-00000.pt", "rank-00001.pt", "shared.pt"]
    assert first["loaded"] == second["loaded"] == (2, 2, [])
    assert first["one rank is damaged"] == second["one rank is damaged"]
    step, _, [(name, reason)] = first["one rank is damaged"]
    assert (step, name) == (1, "step-0000000002") and "rank-00001.pt is damaged" in reason and "(rank 1)" in reason
    for told in (first, second):
        kind, text = told["one rank fails"]
        assert kind == "CheckpointError" and "No space left on device (rank 1); it needs" in text
        assert told["after a failure"] == ["step-0000000001", "step-0000000002"]
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
    flip_bit(tmp_path / "run" / "step-0000000004" / "rank-00001.pt", 0.5)  # which nobody needs now
    assert Checkpoints(tmp_path / "run", Ranks()).load(identity="run").step == 1


FULL = torch.arange(70, dtype=torch.float32).reshape(7, 10)


def sharded_ranks(rank, world_size, folder, asynchronous):
    mesh = init_device_mesh("cpu", (world_size,))
    ranks = Ranks(rank, world_size)
    told = {}
    if not asynchronous:  # more ranks than saved it
        own = Checkpoints(folder, ranks).load().own
        told["own"] = None if own is None else own["rank"]
    checkpoints = Checkpoints(folder, ranks, asynchronous=asynchronous)
    state = {
        "weight": distribute_tensor(FULL, mesh, [Shard(0)]),
        "copy": distribute_tensor(FULL + 1, mesh, [Replicate()]),
        "plain": torch.ones(3),
    }
    checkpoints.save(1, state, own_at(1, rank))
    state["weight"].to_local().mul_(-1)
    checkpoints.save(2, state, own_at(2, rank))
    state["weight"].to_local().zero_()
    template = {
        "weight": distribute_tensor(torch.zeros(7, 10), mesh, [Shard(1)]),
        "copy": distribute_tensor(torch.zeros(7, 10), mesh, [Shard(0)]),
        "plain": torch.zeros(3),
    }
    loaded = checkpoints.load(template=template).shared
    told["placements"] = str(loaded["weight"].placements), str(loaded["copy"].placements)
    told["equal"] = bool(
        (loaded["weight"].full_tensor() == -FULL).all() and (loaded["copy"].full_tensor() == FULL + 1).all()
    )
    told["untouched"] = bool((template["weight"].full_tensor() == 0).all())
    told["whole"] = bool((checkpoints.load().shared["weight"] == -FULL).all())
    if rank == 0:
        part = sorted(path for path in (folder / "step-0000000002" / "sharded").iterdir() if path.name != ".metadata")[
            -1
        ]
        flip_bit(part, 0.5)
    dist.barrier()
    damaged = checkpoints.load(template=template)
    is_equal = bool((damaged.shared["weight"].full_tensor() == FULL).all())
    told["damaged"] = damaged.step, damaged.rejected[0][1], is_equal
    checkpoints.save(3, state, own_at(3, rank))
    checkpoints.wait()
    if rank == 0:
        forge(folder / "step-0000000003", "sharded/.metadata", pickle.dumps(Malicious(folder / "executed")))
    dist.barrier()
    told["forged"] = checkpoints.load(template=template).rejected[0]

    class NoSpace(FileSystemWriter):
        def write_data(self, plan, planner):
            no_space()

    original = filesystem.FileSystemWriter
    if rank == 1:
        filesystem.FileSystemWriter = NoSpace
    told["failed"] = error_of(lambda: (checkpoints.save(4, state, own_at(4, rank)), checkpoints.wait()))
    filesystem.FileSystemWriter = original
    told["names"] = names(folder)
    return told


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sharded_tensors_are_cut_anew(spawn_ranks, tmp_path, asynchronous):
    if not asynchronous:
        Checkpoints(tmp_path / "run", Ranks()).save(0, {}, own_at(0))
    first, second = spawn_ranks(sharded_ranks, 2, tmp_path / "run", asynchronous)
    if not asynchronous:
        assert (first.pop("own"), second.pop("own")) == (0, None)
    for told in (first, second):
        kind, text = told.pop("failed")
        assert kind == "CheckpointError" and "step 4 cannot be written" in text
        assert "No space left on device (rank 1); it needs" in text
    assert first == second
    assert first["placements"] == ("(Shard(dim=1),)", "(Shard(dim=0),)")
    assert first["equal"] and first["untouched"] and first["whole"]
    step, reason, equal = first["damaged"]
    assert step == 1 and "sharded/__" in reason and "is damaged" in reason and equal
    name, reason = first["forged"]
    assert name == "step-0000000003" and "sharded/.metadata is refused (it asks for posix.system)" in reason
    assert not (tmp_path / "run" / "executed").exists()
    assert first["names"] == ["step-0000000001", "step-0000000002", "step-0000000003"]

    # One process without any process group loads the whole tensors.
    loaded = Checkpoints(tmp_path / "run", Ranks()).load()
    assert loaded.step == 1 and torch.equal(loaded.shared["weight"], FULL)
    assert torch.equal(loaded.shared["plain"], torch.ones(3))


def test_the_metadata_of_shards_is_read_without_executing_it(tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "sharded").mkdir()
    path = tmp_path / "sharded" / ".metadata"
    for content, text in ((Malicious(marker), "posix.system"), (argparse.Namespace(a=1), "argparse.Namespace")):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"sharded/.metadata is refused .it asks for {text}"):
            checkpoint_files.read_metadata(tmp_path, [])
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="holds something else than metadata"):
        checkpoint_files.read_metadata(tmp_path, [])
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="refused"):
        checkpoint_files.read_metadata(tmp_path, [])
    assert not marker.exists()


def agree_while_saving(rank, world_size, folder):
    """The thread of rank 0 hangs behind while the main threads go on: no order of both is the same on all ranks."""
    departure.PATIENCE_SECONDS = 20.0  # of a group, if both should use one
    ranks = Ranks(rank, world_size)
    checkpoints, agreement = Checkpoints(folder, ranks, asynchronous=True), Agreement(ranks, timeout_seconds=20)
    goes_on = threading.Event()
    if rank == 0:
        checkpoint_files.kill_point = lambda name: goes_on.wait()
    checkpoints.save(1, state_at(1), own_at(1, rank), identity="run")
    words = [agreement.agree_now(step, step == 3 and rank == 1, True) for step in range(5)]
    if rank == 0:  # the other one may look when this one has gone on
        assert names_of(folder) == []
    goes_on.set()
    checkpoints.close()
    return words, outcome(checkpoints, rank), names_of(folder)


def names_of(folder):
    return names(folder) if folder.exists() else []


def test_ranks_agree_while_a_checkpoint_is_written(spawn_ranks, tmp_path):
    first, second = spawn_ranks(agree_while_saving, 2, tmp_path / "run")
    assert first == second
    words, loaded, files = first
    assert words == [Word(step, step == 3, True) for step in range(5)]
    assert loaded == (1, 2, []) and files == ["step-0000000001"]


def save_and_lose_a_rank(rank, world_size, folder, point, doomed):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent ends the others as soon as it sees a death
    checkpoints = Checkpoints(folder, Ranks(rank, world_size), keep=1)
    checkpoints.save(1, state_at(1), own_at(1, rank), identity="run")

    def die(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == doomed:
        checkpoint_files.kill_point = die
    told = error_of(lambda: checkpoints.save(2, state_at(2), own_at(2, rank), identity="run"))
    (folder / "told").write_text(" ".join(told))
    os._exit(0)


@pytest.mark.parametrize(
    ("point", "doomed"),
    [("file written", 1), pytest.param("manifest synced", 0, marks=pytest.mark.slow)],
)
def test_a_rank_killed_while_saving_is_noticed_by_the_others(spawn_ranks, tmp_path, point, doomed):
    folder = tmp_path / "run"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        spawn_ranks(save_and_lose_a_rank, 2, folder, point, doomed)  # which gives the others 30 s
    told = (folder / "told").read_text()
    assert told.startswith(f"CheckpointError a rank was lost among the checkpoints in {folder}")
    assert_loads(Checkpoints(folder, Ranks()), 1)


def test_encode_counts_bytes():
    assert 4000 <= encode({"a": torch.zeros(1000)}, "x").num_bytes < 4100


def test_a_rank_that_writes_only_shards_copies_nothing_else(monkeypatch):
    state = {**state_at(1), "list": [torch.zeros(10)[2:5], torch.zeros(3), 0.5]}
    whole = encode(state, "shared", copy=True)
    monkeypatch.setattr(experiment_state, "_on_cpu", lambda *_: pytest.fail("a copy"))
    names_only = encode(state, "shared", copy=True, shards_only=True)
    assert names_only.layouts == whole.layouts and len(whole.layouts) == 6
    assert names_only.tensors == [] and names_only.tree is None and names_only.num_bytes == 0
    with pytest.raises(TypeError, match=r"shared\['a'\] is a set"):
        encode({"a": {1}}, "shared", shards_only=True)


def bytes_read():
    """Bytes that this process has read from files so far."""
    [line] = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="needs /proc/self/io")
def test_a_file_is_read_once(tmp_path):
    state = {"model": torch.randn(2_000_000)}
    checkpoints = Checkpoints(tmp_path, Ranks())
    checkpoints.save(1, state, own_at(1))
    for read in (checkpoints.load, lambda: verify_folder(tmp_path)):
        before = bytes_read()
        assert read()
        assert 8_000_000 < bytes_read() - before < 12_000_000


def test_a_short_file_is_noticed_by_the_one_that_wrote_it(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)
    monkeypatch.setattr(
        os, "fsync", lambda handle: os.truncate(handle, 100) if os.fstat(handle).st_size > 5000 else None
    )
    with pytest.raises(CheckpointError, match=r"shared\.pt has 100 bytes after \d+ were written"):
        checkpoints.save(2, state_at(2), own_at(2), identity="run")
    assert_loads(checkpoints, 1)
