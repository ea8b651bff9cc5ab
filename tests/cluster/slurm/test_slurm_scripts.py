"""Job scripts under a real Slurm, with a program that stands in for the experiment (stand_in.py)."""

import re
import tarfile
from pathlib import Path

import pytest
import stand_in
import yaml
from cluster import find, wait_until

CONFIG = "experiments/configs/graduate_admissions/laptop.yaml"


@pytest.fixture
def submit(cluster, tmp_path):
    """submit(*options): ids of stand-in jobs with results in `tmp_path / "my results"`."""
    program = stand_in.make(tmp_path)
    return lambda *options: cluster.submit(CONFIG, tmp_path / "my results", "--python", program, *options)


def wait_for_ranks(folder, job, number, count=0):
    wait_until(lambda: len(stand_in.started(folder, job, count)) == number, 60, f"job {job}: no {number} ranks")


def environment_of(process):
    entries = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def log_of(folder, job):
    return next((folder / "my results" / "jobs").glob(f"*-{job}.out")).read_text()


def test_a_signal_reaches_all_ranks_and_the_script_requeues(cluster, submit, tmp_path):
    [job] = submit("--nodes", "2")
    wait_for_ranks(tmp_path, job, 4)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert len(stand_in.started(tmp_path, job, 1)) == 4
    log = log_of(tmp_path, job)  # of both starts: the second one appends
    assert log.index("start 1, nodes node") < log.index("requeued (start 1 of at most 3)") < log.index("start 2, nodes")
    assert "error" not in re.sub(r"slurmstepd.*JOB REQUEUE", "", log)
    ends = {int(end) for end in re.findall(r"start 0 of job \d+ ends (\d+)", log)}
    assert len(ends) == 1


def test_a_signal_during_the_start_is_no_death(cluster, submit, tmp_path, monkeypatch):
    monkeypatch.setitem(cluster.env, "STAND_IN_DELAY", "3")
    [job] = submit("--nodes", "2")
    wait_until(lambda: len(list(tmp_path.glob("enter-*"))) == 4, 30, "no ranks")
    assert not stand_in.started(tmp_path, job)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    wait_for_ranks(tmp_path, job, 4)
    (tmp_path / "go").touch()
    assert cluster.wait_for_end(job) == "COMPLETED"


@pytest.mark.parametrize("failures", [2, 1000])
def test_a_controller_that_does_not_answer_costs_no_requeue(cluster, submit, tmp_path, monkeypatch, failures):
    """squeue fails twice, or always; the state of the job is not known then, and it goes on."""
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(
        f"#!/bin/bash\necho asked >>{tmp_path}/asked\n"
        f'[ $(wc -l <{tmp_path}/asked) -gt {failures} ] && exec {find("squeue")} "$@"\n'
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setitem(cluster.env, "PATH", f"{tmp_path / 'bin'}:{cluster.env['PATH']}")
    [job] = submit("--nodes", "1")
    wait_for_ranks(tmp_path, job, 2)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    assert cluster.wait_for_end(job) == "COMPLETED", log_of(tmp_path, job)
    assert cluster.job(job)["Restarts"] == "1"
    assert len((tmp_path / "asked").read_text().split()) == min(failures + 1, 5)


def test_restarts_are_capped(cluster, submit, tmp_path):
    (tmp_path / "stubborn").touch()
    [job] = submit("--nodes", "1")
    for count in range(3):
        wait_for_ranks(tmp_path, job, 2, count)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0" and cluster.job(job)["Restarts"] == "2"
    assert "sbatch with this script, goes on" in log_of(tmp_path, job)


def test_a_canceled_job_stays_canceled(cluster, submit, tmp_path):
    """Its ranks save on SIGTERM and exit with 75, which must not bring it back."""
    [job] = submit("--nodes", "2")
    wait_for_ranks(tmp_path, job, 4)
    cluster.run("scancel", job)
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, check=False), 30, "the job is still there")
    assert cluster.state(job) == "CANCELLED" and cluster.job(job)["Restarts"] == "0"


def test_one_element_of_an_array_is_requeued_alone(cluster, submit, tmp_path):
    """The last element has the id of the whole array as its SLURM_JOB_ID."""
    [job] = submit("--nodes", "1", "--ranks-per-node", "1", "--array", "seeds=3,5-6")
    wait_until(lambda: len(list(tmp_path.glob("start-*"))) == 3, 60, "not all elements started")
    numbers = [cluster.job(f"{job}_{index}")["JobId"] for index in range(3)]
    assert job in numbers
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_{numbers.index(job)}")
    wait_for_ranks(tmp_path, job, 1, 1)
    (tmp_path / "go").touch()
    for index, number in enumerate(numbers):
        assert cluster.wait_for_end(f"{job}_{index}") == "COMPLETED"
        assert cluster.job(f"{job}_{index}")["Restarts"] == ("1" if number == job else "0")
    logs = [log_of(tmp_path, f"{job}_{index}") for index in range(3)]
    assert [re.findall(r"seeds=(\d+)", log)[0] for log in logs] == ["3", "5", "6"]


def test_the_submitting_shell_changes_nothing(cluster, submit, tmp_path, monkeypatch):
    """Its options lose against the command line, and what its own step left reaches no rank."""
    shell = {"SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXPORT": "NONE", "SBATCH_JOB_NAME": "other",
             "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_STEP_ID": "7", "SLURM_NTASKS": "9", "PMI_RANK": "0",
             "PMI_SIZE": "1", "WORLD_SIZE": "9", "CUDA_VISIBLE_DEVICES": "7", "OWN": "kept"}  # fmt: skip
    for name, text in shell.items():
        monkeypatch.setitem(cluster.env, name, text)
    [job] = submit("--nodes", "2", "--name", "mine")
    wait_for_ranks(tmp_path, job, 4)
    printed = cluster.job(job)
    assert (printed["TimeLimit"], printed["Requeue"], printed["JobName"]) == ("00:10:00", "1", "mine")
    process = next(iter(stand_in.started(tmp_path, job).values()))
    environment = environment_of(process)
    assert environment["OWN"] == "kept" and environment["SLURM_NTASKS"] == "4"
    assert not environment.keys() & {"PMI_RANK", "PMI_SIZE", "WORLD_SIZE"}
    assert environment.get("SLURM_CPU_BIND") != shell["SLURM_CPU_BIND"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    (tmp_path / "go").touch()
    assert cluster.wait_for_end(job) == "COMPLETED"


def test_a_script_that_is_submitted_by_hand_loses_what_a_step_left(cluster, submit, tmp_path, monkeypatch):
    for name, text in {"SLURM_CPU_BIND": "none", "PMI_RANK": "0", "PMI_SIZE": "1", "SBATCH_EXPORT": "NONE"}.items():
        monkeypatch.setitem(cluster.env, name, text)
    [first] = submit("--nodes", "1")
    cluster.run("scancel", first)
    script = next((tmp_path / "my results" / "jobs").glob("*.sh"))
    job = cluster.run("sbatch", "--parsable", str(script)).strip()
    wait_for_ranks(tmp_path, job, 2)
    environment = environment_of(next(iter(stand_in.started(tmp_path, job).values())))
    assert not environment.keys() & {"PMI_RANK", "PMI_SIZE"} and "AADL_END_TIME" in environment
    (tmp_path / "go").touch()
    assert cluster.wait_for_end(job) == "COMPLETED"


def test_ranks_see_the_gpus_in_the_order_of_the_site(cluster, submit, tmp_path):
    site = yaml.safe_load(cluster.site.read_text()) | {"gpu_order": [1, 0]}
    (tmp_path / "ordered.yaml").write_text(yaml.safe_dump(site))
    [job] = submit("--nodes", "1", "--site", str(tmp_path / "ordered.yaml"))
    wait_for_ranks(tmp_path, job, 2)
    processes = stand_in.started(tmp_path, job).values()
    assert {environment_of(process)["CUDA_VISIBLE_DEVICES"] for process in processes} == {"1,0"}
    (tmp_path / "go").touch()
    assert cluster.wait_for_end(job) == "COMPLETED"


def test_a_chain_goes_on_without_requeueing(cluster, submit, tmp_path):
    first, second = submit("--nodes", "1", "--chain", "2")
    assert f"afterany:{first}" in cluster.job(second)["Dependency"]
    wait_for_ranks(tmp_path, first, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    assert cluster.wait_for_end(first) == "FAILED" and cluster.job(first)["Restarts"] == "0"
    wait_for_ranks(tmp_path, second, 2)
    (tmp_path / "go").touch()
    assert cluster.wait_for_end(second) == "COMPLETED"


def test_data_and_environment_are_staged_on_each_node(cluster, submit, tmp_path):
    (tmp_path / "go").touch()
    (tmp_path / "some data").mkdir()
    (tmp_path / "some data" / "table.csv").write_text("1,2,3")
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "stand_in", "bin/python")
    packed = ["--stage-environment", str(tmp_path / "packed.tar.gz"), "--stage-data", str(tmp_path / "some data")]
    [job] = submit("--nodes", "2", *packed)
    assert cluster.wait_for_end(job) == "COMPLETED", log_of(tmp_path, job)
    local = cluster.folder / f"local-{job}"
    assert (local / "data" / "table.csv").read_text() == "1,2,3"
    assert (local / "environment" / "bin" / "python").exists() and len(stand_in.started(tmp_path, job)) == 4
    (tmp_path / "packed.tar.gz").write_bytes(b"half a file")
    [job] = submit("--nodes", "2", *packed)
    assert cluster.wait_for_end(job) == "FAILED" and not stand_in.started(tmp_path, job)
