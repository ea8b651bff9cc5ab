import argparse
import errno
import os
import re
from pathlib import Path

import h5py
import launched
import pytest
import yaml

from experiments.__main__ import main
from experiments.commands import doctor
from experiments.commands.arguments import add_doctor_arguments
from experiments.distributed.departure import leave
from experiments.distributed.doctor import placement, site, storage
from experiments.distributed.doctor.facts import Finding, print_report

pytestmark = pytest.mark.smoke
SITE = {
    "title": "a site",
    "scheduler": "slurm",
    "launcher": "srun",
    "ranks": {"per_node": 4, "cores": 10_000, "gpus_per_node": 4},
    "environment": {"AADL_TEST_OF_SITE": "1", "PATH": "x"},
}


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_doctor_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture
def single(monkeypatch):
    """The variables of a single process."""
    for name in os.environ.keys() - launched.clean_environment().keys():
        monkeypatch.delenv(name)


@pytest.fixture
def sites(monkeypatch, tmp_path):
    """The folder of sites, with one in it."""
    folder = tmp_path / "sites"
    folder.mkdir()
    (folder / "mine.yaml").write_text(yaml.safe_dump(SITE))
    monkeypatch.setattr(site, "SITES", folder)
    return folder


def test_one_process(single, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("the network"))
    assert doctor.main(options("--results", tmp_path / "new")) == 0
    printed = capsys.readouterr().out
    for name in ("python", "torch", "h5py", "HDF5", "launcher", "rank 0", "threads", "HDF5 files", "free space"):
        assert f"\n   {name}  " in f"\n{printed}", name
    assert "a second writer is refused" in printed and "nothing to change" in printed
    assert not list((tmp_path / "new").iterdir())


def test_the_start_method_of_workers_is_printed(single, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("experiments.distributed.doctor.facts.safe_start_method", lambda: "a safe one")
    doctor.main(options("--results", tmp_path))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "start method of workers" in line]
    assert line.endswith("  a safe one")


def test_launchers_in_disorder_are_a_finding(single, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_NTASKS", "6")
    assert doctor.main(options("--results", tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "!! launcher" in printed and "must change: launcher: this is the batch shell of Slurm job 41" in printed
    assert "srun -N 1 -n 6" in printed and "torch" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--site", "other"], "--site must be one of mine, or a file that ends in .yaml, got 'other'"),
        (["--start-seconds", "0"], "--start-seconds must be positive, got 0.0"),
    ],
)
def test_a_mistake_is_named(single, sites, arguments, message):
    with pytest.raises(ValueError, match=message):
        doctor.main(options(*arguments))


def test_a_folder_that_cannot_be_written_is_named(single, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the results folder .*file/results cannot be written"):
        doctor.main(options("--results", tmp_path / "file" / "results"))


def test_a_site_of_ones_own_is_a_file(single, sites, monkeypatch, tmp_path, capsys):
    (tmp_path / "my-cluster.yaml").write_text(yaml.safe_dump(SITE | {"ranks": {"per_node": 7}}))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    arguments = ["--results", tmp_path / "results", "--site", tmp_path / "my-cluster.yaml"]
    assert doctor.main(options(*arguments)) == 0
    assert "the site file has 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--site FILE cannot be read: No such file or directory"),
        ("a: [", "FILE is not valid YAML: while parsing"),
        ("- a", "FILE must hold a mapping of settings, got ['a']"),
        ("experiment: graduate_admissions", "FILE must be the file of a site, with scheduler and launcher"),
        ("{scheduler: slurm, launcher: srun, ranks: 4}", "FILE: ranks must be a mapping of settings, got 4"),
    ],
)
def test_a_file_that_is_no_site_is_one_sentence(single, tmp_path, capsys, text, message):
    """By the command line, with the reader of YAML files that it uses."""
    path, results = tmp_path / "my-cluster.yaml", tmp_path / "results"
    if text is not None:
        path.write_text(text)
    assert main(["doctor", "--site", str(path), "--results", str(results)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message.replace('FILE', str(path))}") and printed.count("\n") == 1
    assert not results.exists()


def test_a_site_is_compared(single, sites, monkeypatch, tmp_path, capsys):
    assert doctor.main(options("--results", tmp_path, "--site", "mine")) == 0
    assert "was not compared" in capsys.readouterr().out  # outside of a job
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert doctor.main(options("--results", tmp_path, "--site", "mine")) == 1
    printed = capsys.readouterr().out
    assert "ranks a node" in printed and "the site file has 4" in printed and "the site file has 10000" in printed
    assert re.search(r"AADL_TEST_OF_SITE +not set on rank 0", printed)
    assert not re.search(r" PATH +not set", printed)


def examine(folder):
    leave(doctor.main(options("--results", Path(folder) / "results")))


def test_several_ranks(tmp_path):
    processes = [
        launched.start(examine, launched.srun_variables(rank, 2), tmp_path / f"log-{rank}", tmp_path)
        for rank in range(2)
    ]
    assert launched.finish(processes) == [0, 0], (tmp_path / "log-1").read_text()
    printed = (tmp_path / "log-0").read_text()
    for text in ("srun, 2 ranks on 1 hosts", "slurm 7, step 0", "rank 1", "all ranks read in", "all_reduce"):
        assert text in printed
    assert (tmp_path / "log-1").read_text() == ""  # rank 0 alone prints
    assert not list((tmp_path / "results").iterdir())


# --- what each row would say elsewhere


def facts(**different):
    known = {
        "versions": {"torch": "2.13", "NCCL": "2.27"},
        "host": "n1",
        "gpus": 0,
        "cores": 4,
        "interfaces": {"lo": "127.0.0.1", "hsn0": "10.0.0.1"},
        "environment": {},
        "all_environment": [],
        "open ssh": False,
        "local_size": 2,
        "start method": "fork",
    }
    return known | different


def only(findings):
    return {entry.what: entry for entry in findings if entry.cure}


@pytest.mark.parametrize(
    ("name", "second", "bad"),
    [
        ("TMPDIR under LSF", facts(environment={"LSB_JOBID": "1", "TMPDIR": "x"}), False),
        ("~/.ssh/config under LSF", facts(**{"environment": {"LSB_JOBID": "1"}, "open ssh": True}), False),
        ("cores of a task", facts(environment={"SLURM_CPUS_PER_TASK": "7"}), True),
        ("NCCL_SOCKET_IFNAME", facts(environment={"NCCL_SOCKET_IFNAME": "ib0"}), True),
        ("GLOO_SOCKET_IFNAME", facts(environment={"GLOO_SOCKET_IFNAME": "ib0,ib1"}), True),
    ],
)
def test_traps(name, second, bad):
    found = only(site.traps([facts(), second]))
    assert list(found) == [name] and found[name].bad == bad and "rank 1" in found[name].found


def test_no_traps():
    fine = {"SLURM_CPUS_PER_TASK": "4", "TMPDIR": "x", "NCCL_SOCKET_IFNAME": "hsn", "GLOO_SOCKET_IFNAME": "^docker0"}
    assert not site.traps([facts(environment=fine), facts(host="n2")])


def test_different_versions():
    newer = {"versions": {"torch": "2.14", "NCCL": "2.27"}}
    found = only(placement.versions([facts(), facts(**newer)]))
    assert list(found) == ["torch"] and found["torch"].found == "2.13 on rank 0, 2.14 on rank 1" and found["torch"].bad


def place(rank, **different):
    known = {"rank": rank, "local_rank": rank, "host": "n1", "cores": "0-3", "threads": 1, "device": "cpu"}
    return known | {"device_id": "", "interface": ""} | different


@pytest.mark.parametrize(
    ("places", "cores", "what"),
    [
        ([place(0), place(1)], 4, []),
        ([place(0, cores="0"), place(1, cores="0")], 1, ["binding"]),
        ([place(0, cores="0"), place(1, cores="1")], 1, []),
        ([place(0, cores="0"), place(1, cores="0", host="n2")], 1, []),
        ([place(0, threads=32), place(1)], 4, ["threads"]),
        ([place(0, device_id="GPU-a"), place(1, device_id="GPU-a")], 4, ["GPU"]),
        ([place(0, device_id="GPU-a"), place(1, device_id="GPU-b")], 4, []),
    ],
)
def test_places(places, cores, what):
    assert list(only(placement.binding_of(places, [facts(cores=cores)] * 2))) == what


@pytest.mark.parametrize(
    ("error", "fails_without_locks", "cure"),
    [
        (OSError(errno.ENOLCK, "unable to lock file, errno = 37"), True, "export HDF5_USE_FILE_LOCKING=FALSE"),
        (OSError("unable to lock file, errno = 524, error message = 'x'"), False, "export HDF5_USE_FILE_LOCKING=FALSE"),
        (OSError(errno.ENOSPC, "full"), True, "choose another folder with --results"),
    ],
)
def test_an_hdf5_file_that_cannot_be_written(monkeypatch, tmp_path, error, fails_without_locks, cure):
    class File(h5py.File):
        def __init__(self, *arguments, locking=None, **options):
            if locking is None or fails_without_locks:
                raise error
            super().__init__(*arguments, **options)

    monkeypatch.setattr(storage.h5py, "File", File)
    printed = storage.storage(tmp_path)[0]
    assert printed.bad == fails_without_locks and cure in printed.cure


def test_little_space(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: argparse.Namespace(free=10))
    assert storage.storage(tmp_path)[1].bad


def test_the_report(capsys):
    assert print_report([Finding("a", "1"), Finding("long name", "2", "do this")]) == 0
    assert print_report([Finding("a", "1", "do that", bad=True)]) == 1
    printed = capsys.readouterr().out
    assert "may change: long name: do this" in printed and "must change: a: do that" in printed
