"""Experiments under a real Slurm, by the path of a user: `python -m jobs.submit`, then sbatch, srun and the records."""

import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from cluster import wait_until
from every_experiment import EXPERIMENTS, TOLERANCE, check_against_one_process, run_plainly, write_config
from suite_cases import RAW

from experiments import __main__ as suite
from experiments.records.reading import read_run, read_weights

PLAIN, ACCELERATED = "sgd", "sgd_aadl"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Graduate admissions, small: two variants, one seed, a few epochs."""
    return write_config("graduate_admissions", tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def long_config(tmp_path_factory):
    """The same, with enough steps to be interrupted."""
    path = tmp_path_factory.mktemp("config") / "long.yaml"
    variants = {name: RAW["variants"][name] for name in (ACCELERATED,)}
    changes = {"training": {"epochs": 200, "batch_size": 80}, "variants": variants, "save": {"weights": True}}
    changes["launch"] = {"device": "cpu"}
    path.write_text(yaml.safe_dump(RAW | {"seeds": 0} | changes))
    return path


def record(results, variant=PLAIN, seed=0):
    return read_run(results / "graduate_admissions" / "test" / variant / f"seed-{seed}.h5")


def log_of(results, job):
    """What the job has written so far."""
    return "".join(path.read_text() for path in (results / "jobs").glob(f"*-{job}.out"))


def succeed(cluster, results, job, seconds=300):
    assert cluster.wait_for_end(job, seconds) == "COMPLETED", log_of(results, job)


def wait_for_training(results, job):
    """Waits until the ranks train."""
    wait_until(lambda: "runs to do" in log_of(results, job), 180, "no training", lambda: log_of(results, job))
    time.sleep(1)


def ranks_of(cluster, job):
    """Process ids of the Python processes of a job's ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            pairs = [entry.partition(b"=") for entry in (folder / "environ").read_bytes().split(b"\0")]
        except OSError:
            continue
        env = {name.decode(): value.decode(errors="replace") for name, _, value in pairs}
        here = (env.get("SLURM_CONF"), env.get("SLURM_JOB_ID")) == (cluster.env["SLURM_CONF"], job)
        if here and "SLURM_STEP_ID" in env and command[:4] == [sys.executable.encode(), b"-m", b"experiments", b"run"]:
            found[int(env["SLURM_PROCID"])] = int(folder.name)
    return found


def same_numbers(first, second):
    """Every series of the training, bit for bit; clocks are no part of it."""
    names = [name for name in first.series if not name.startswith("timing/")]
    assert first.series.keys() == second.series.keys() and {"metrics/train/loss", "metrics/validation/loss"} <= {*names}
    assert first.attributes["num_steps"] == second.attributes["num_steps"]
    return all(np.array_equal(first.series[name], second.series[name], equal_nan=True) for name in names)


def edited(cluster, results, config, old, new, nodes=2):
    """Submits a script as a user does who edits it by hand; the id of the job."""
    _, text, _ = cluster.type(config, results, "--nodes", str(nodes), "--dry-run")
    changed = re.sub(old, new, text)
    assert changed != text
    (results / "jobs").mkdir(parents=True)
    (results / "jobs" / "by_hand.sh").write_text(changed)
    return cluster.run("sbatch", "--parsable", str(results / "jobs" / "by_hand.sh")).strip()


@pytest.mark.smoke
def test_two_nodes_give_the_numbers_and_the_figure_of_a_plain_run(cluster, config, tmp_path):
    command = [sys.executable, "-m", "jobs.submit", str(config), "--site", str(cluster.site), "--nodes", "2"]
    printed = cluster.run(*command, "--time", "0:10:00", "--results", str(tmp_path / "slurm"))
    assert printed.strip().isdigit()
    run_plainly(config, tmp_path / "plain")
    succeed(cluster, tmp_path / "slurm", printed.strip())
    check_against_one_process(tmp_path / "slurm", tmp_path / "plain", launcher="srun", world_size=4)
    for folder in ("slurm", "plain"):
        assert suite.main(["figures", "--results", str(tmp_path / folder)]) == 0
    figures = [
        tmp_path / folder / "graduate_admissions" / "test" / "figures" / "loss.png" for folder in ("slurm", "plain")
    ]
    pictures = [matplotlib.image.imread(path) for path in figures]
    assert pictures[0].shape == pictures[1].shape
    # All but the line below the figure, which names the number of ranks.
    above = int(0.94 * len(pictures[0]))
    assert np.abs(pictures[0][:above] - pictures[1][:above]).mean() < 1e-3


@pytest.mark.parametrize("experiment", EXPERIMENTS[1:])
def test_srun_runs_the_other_experiments(cluster, tmp_path, experiment):
    config = write_config(experiment, tmp_path)
    [job] = cluster.submit(config, tmp_path / "slurm", "--nodes", "2")
    run_plainly(config, tmp_path / "plain")
    succeed(cluster, tmp_path / "slurm", job)
    check_against_one_process(tmp_path / "slurm", tmp_path / "plain", launcher="srun", world_size=4)


def test_an_array_makes_one_seed_each(cluster, config, tmp_path):
    [job] = cluster.submit(config, tmp_path, "--array", "seeds=0,2", "--nodes", "1", "--set", f"variants={PLAIN}")
    for index in range(2):
        succeed(cluster, tmp_path, f"{job}_{index}")
    records = [record(tmp_path, seed=seed) for seed in (0, 2)]
    assert [entry.attributes["seed"] for entry in records] == [0, 2]
    assert not same_numbers(*records)


def test_steps_smaller_than_the_job_and_uneven_ones(cluster, config, tmp_path):
    """One job with two steps: one of two ranks on the last node alone, one of four ranks on three nodes."""
    small, uneven = tmp_path / "small", tmp_path / "uneven"
    step = r"srun (?P<options>--nodes.*) \\\n    (?P<rank>bash .*) --results \S+ &"
    last = "--nodelist=$(scontrol show hostnames | tail -1)"
    lines = (
        rf"srun --nodes=1 --ntasks=2 {last} \g<rank> --results {small} "
        rf"&& srun --nodes=3 --ntasks=4 \g<rank> --results {uneven} &"
    )
    job = edited(cluster, tmp_path / "results", config, step, lines, nodes=3)
    succeed(cluster, tmp_path / "results", job)
    assert record(small).attributes["world_size"] == 2 and record(uneven).attributes["world_size"] == 4
    np.testing.assert_allclose(
        record(small).series["metrics/train/loss"], record(uneven).series["metrics/train/loss"], rtol=TOLERANCE
    )


def test_a_batch_shell_without_srun_is_refused(cluster, config, tmp_path):
    job = edited(cluster, tmp_path, config, r"srun --nodes.* \\\n", "")
    assert cluster.wait_for_end(job) == "FAILED"
    log = log_of(tmp_path, job)
    assert re.search(r"error: this is the batch shell of Slurm job \d+.*start with `srun -N 2 -n 4", log), log
    assert "Traceback" not in log and not list(tmp_path.rglob("*.h5"))


def test_a_job_that_has_lost_its_gpus_is_refused(cluster, config, tmp_path):
    """Slurm hands out GPUs that torch does not see; the configuration does not ask for the CPU."""
    promised = tmp_path / "promised.yaml"
    promised.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"launch": {}}))
    [job] = cluster.submit(promised, tmp_path, "--nodes", "2")
    assert cluster.wait_for_end(job) == "FAILED"
    log = log_of(tmp_path, job)
    printed = r"error: rank 0 on node\d+: SLURM_\w*GPU\w*=\S+ gives the job GPUs, but rank 0 .* set launch.device: cpu"
    assert re.search(printed, log), log
    assert "Traceback" not in log and not list(tmp_path.rglob("*.h5"))


def test_a_killed_rank_ends_the_job_in_seconds(cluster, long_config, tmp_path):
    [job] = cluster.submit(long_config, tmp_path, "--nodes", "2")
    wait_for_training(tmp_path, job)
    processes = ranks_of(cluster, job)
    assert sorted(processes) == [0, 1, 2, 3]
    os.kill(processes[2], signal.SIGKILL)
    assert cluster.wait_for_end(job, seconds=30) == "FAILED"
    assert cluster.job(job)["Restarts"] == "0"  # a crash is not repeated
    assert re.search(r"task 2: (Killed|Exited with exit code 137)", log_of(tmp_path, job))
    wait_until(lambda: not ranks_of(cluster, job), 30, "ranks are left")


def test_a_requeued_job_avoids_a_drained_node_and_resumes(cluster, long_config, tmp_path):
    [job] = cluster.submit(long_config, tmp_path, "--nodes", "2")
    wait_for_training(tmp_path, job)
    drained = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[0]
    cluster.run("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=test")
    try:
        assert cluster.state(job) == "RUNNING"  # draining lets it run
        cluster.run("scontrol", "requeue", job)
        cluster.wait_for(job, "RUNNING")
        assert drained not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
        succeed(cluster, tmp_path, job)
    finally:
        cluster.run("scontrol", "update", f"NodeName={drained}", "State=RESUME")
    assert cluster.job(job)["Restarts"] == "1"
    resumed = record(tmp_path, ACCELERATED).attributes
    assert resumed["complete"] and resumed["world_size"] == 4
    assert resumed["restart_count"] == 1  # taken up where it was saved, not begun again


def test_a_run_that_was_interrupted_equals_one_that_was_not(cluster, long_config, tmp_path):
    """USR1 as before a time limit, checkpoint, exit 75, requeue by the script, resume: the same record and the same
    weights bit for bit.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    [reference] = cluster.submit(long_config, whole, "--nodes", "2")
    [job] = cluster.submit(long_config, parts, "--nodes", "2")
    wait_for_training(parts, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    succeed(cluster, parts, job)
    succeed(cluster, whole, reference)
    log = log_of(parts, job)
    assert cluster.job(job)["Restarts"] == "1" and "requeued (start 1 of at most 3)" in log
    assert same_numbers(record(parts, ACCELERATED), record(whole, ACCELERATED))
    ours, expected = (read_weights(record(results, ACCELERATED).path) for results in (parts, whole))
    assert expected and ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert record(parts, ACCELERATED).attributes["restart_count"] == 1
    assert record(whole, ACCELERATED).attributes["restart_count"] == 0


def test_the_signal_before_a_real_time_limit(cluster, long_config, tmp_path):
    """Slurm itself sends USR2 (--signal=B:USR2@75) 75 to 105 seconds before the limit of two minutes.

    That is before the ranks would stop by themselves, 60 seconds before the end. The work is made to last longer than
    the 45 seconds until then, so the test takes about two minutes.
    """
    run_plainly(long_config, tmp_path / "plain")
    settings = yaml.safe_load(long_config.read_text())
    seconds = record(tmp_path / "plain", ACCELERATED).series["timing/training_seconds"][-1]
    settings["training"]["epochs"] = math.ceil(settings["training"]["epochs"] * 55 / seconds)
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(settings))
    site = yaml.safe_load(cluster.site.read_text()) | {"warning": {"signal": "USR2", "seconds": 75}, "max_restarts": 20}
    (tmp_path / "warned.yaml").write_text(yaml.safe_dump(site))
    options = ["--site", str(tmp_path / "warned.yaml"), "--time", "0:02:00", "--ranks-per-node", "1"]
    [job] = cluster.submit(tmp_path / "longer.yaml", tmp_path / "results", "--nodes", "1", *options)
    wait_until(lambda: "requeued" in log_of(tmp_path / "results", job), 120, "no requeue")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # for the rest, or it took several signals more
    succeed(cluster, tmp_path / "results", job)
    log = log_of(tmp_path / "results", job)
    stops = re.findall(r"stopped by (.*) after step (\d+); the state is saved", log)
    assert stops[0][0] == "SIGUSR2" and int(stops[0][1]) > 0, log
    run = record(tmp_path / "results", ACCELERATED).attributes
    assert run["complete"] and run["num_steps"] > int(stops[0][1])
    assert run["restart_count"] == len(stops) == int(cluster.job(job)["Restarts"])


def test_the_scheduler_itself_takes_what_was_rendered(cluster, config, tmp_path):
    """sbatch --test-only of a script, and the refusal of one that is too large for the cluster."""
    code, text, _ = cluster.type(config, tmp_path, "--nodes", "4", "--array", "seeds=0-3", "--dry-run")
    (tmp_path / "script.sh").write_text(text)
    cluster.run("sbatch", "--test-only", str(tmp_path / "script.sh"))
    too_many = (tmp_path / "script.sh").read_text().replace("--nodes=4", "--nodes=5")
    (tmp_path / "script.sh").write_text(too_many)
    with pytest.raises(AssertionError, match="node configuration is not available"):
        cluster.run("sbatch", "--test-only", str(tmp_path / "script.sh"))
    code, _, printed = cluster.type(config, tmp_path, "--nodes", "5")
    assert code == 2 and printed.startswith("error: --nodes must be at most 4")
