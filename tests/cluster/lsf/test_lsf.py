"""Jobs under a fake LSF (fake_lsf.py): scripts with a stand-in, and small experiments end to end; jsrun and mpirun."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import fake_lsf
import pytest
import stand_in
import torch
import yaml
from every_experiment import check_against_one_process, run_plainly, write_config
from suite_cases import table_lines

from jobs import site as sites
from jobs import submit

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
CONFIG = "experiments/configs/graduate_admissions/laptop.yaml"


class Lsf:
    """An LSF system in a folder, and what a user types at it."""

    def __init__(self, folder, mode):
        self.folder, self.results = folder / "lsf", folder / "my results"
        fake_lsf.install(self.folder, mode)
        # Not the data that a process takes without AADL_DATA_DIR.
        data = folder / "data"
        data.mkdir()
        (data / "graduate_admissions.csv").write_text("\n".join(table_lines(500, seed=1)))
        self.env = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        self.env |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "FAKE_LSF": str(self.folder), "USER": "me"}
        self.env["AADL_DATA_DIR"] = str(data)
        self.site = self._site(folder, "summit" if mode == "summit" else "generic-lsf")

    def _site(self, folder, name):
        """The site of the suite, without what only the real machine has."""
        raw = yaml.safe_load((sites.FOLDER / f"{name}.yaml").read_text())
        for key in ("modules", "setup", "environment"):
            raw.pop(key, None)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw | {"python": sys.executable, "max_restarts": 2}))
        return path

    def submit(self, *options, config=CONFIG):
        """The ids of submitted jobs."""
        return self.tell(*options, config=config).split()

    def tell(self, *options, config=CONFIG):
        """What `python -m jobs.submit` prints."""
        printed = io.StringIO()
        arguments = [str(config), "--site", str(self.site), "--results", str(self.results), "--time", "2:00:00"]
        account = ["--account", "ABC123"] if self.site.stem == "summit" else []
        with patch.dict(os.environ, self.env, clear=True), contextlib.redirect_stdout(printed):
            assert submit.main([*arguments, *account, *options]) == 0
        return printed.getvalue()

    def type(self, *command, code=0):
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def status(self, job):
        return fake_lsf.status(self.folder / job)

    def wait_for_end(self, job, seconds=60):
        wait_until(lambda: self.status(job) in ("DONE", "EXIT"), seconds, lambda: self.log(job))
        return int((self.folder / job / "code").read_text())

    def log(self, job):
        return "".join(path.read_text() for path in (self.results / "jobs").glob(f"*-{job}.out"))

    def end(self):
        for path in self.folder.glob("[0-9]*"):
            for _ in range(100):
                if fake_lsf.status(path) in ("DONE", "EXIT"):
                    break
                (path / "requeue").unlink(missing_ok=True)
                fake_lsf.kill_job(self.folder, path.name)
                time.sleep(0.05)


def wait_until(condition, seconds=60, log=lambda: ""):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing within {seconds} s: {log()}"
        time.sleep(0.05)


@pytest.fixture(params=["summit", "generic"])
def lsf(tmp_path, request):
    """One LSF system, of either kind."""
    yield from running(tmp_path, request.param)


@pytest.fixture
def summit(tmp_path):
    yield from running(tmp_path, "summit")


@pytest.fixture
def generic(tmp_path):
    yield from running(tmp_path, "generic")


def running(tmp_path, mode):
    system = Lsf(tmp_path, mode)
    try:
        yield system
    finally:
        system.end()


def wait_for_ranks(tmp_path, job, number, count=0, log=lambda: ""):
    wait_until(lambda: len(stand_in.started(tmp_path, job, count)) == number, 60, log)


def test_signals_reach_the_ranks_where_the_launcher_passes_them_on(lsf, tmp_path):
    """Stop, requeue with the same id, resume; the restarts are counted, because LSF counts none."""
    lsf.env["FAKE_LSF_FORWARDS"] = "1"
    [job] = lsf.submit("--nodes", "2", "--ranks-per-node", "2", "--python", stand_in.make(tmp_path))
    wait_for_ranks(tmp_path, job, 4, 0, lambda: lsf.log(job))
    lsf.type("bkill", "-s", "USR2", job)
    wait_for_ranks(tmp_path, job, 4, 1, lambda: lsf.log(job))
    assert lsf.wait_for_end(job) == 0
    log = lsf.log(job)
    assert log.index("start 1,") < log.index("requeued (start 1 of at most 3)") < log.index("start 2,")
    assert not list((lsf.results / "jobs").glob(".st*"))


def test_a_signal_that_the_launcher_does_not_pass_on_does_no_harm(lsf, tmp_path):
    """-wa signals the launcher too; the ranks know the end of the job and stop by themselves."""
    before = int(time.time())
    [job] = lsf.submit("--nodes", "1", "--ranks-per-node", "2", "--python", stand_in.make(tmp_path))
    wait_for_ranks(tmp_path, job, 2)
    lsf.type("bkill", "-s", "USR2", job)
    time.sleep(0.5)
    assert lsf.status(job) == "RUN"
    end = int(re.search(r"ends (\d+)", lsf.log(job))[1])
    assert before + 7200 <= end <= time.time() + 7201  # two hours after some moment in between, rounded
    (tmp_path / "go").touch()
    assert lsf.wait_for_end(job) == 0


def test_restarts_are_capped(lsf, tmp_path):
    lsf.env["FAKE_LSF_FORWARDS"] = "1"
    (tmp_path / "stubborn").touch()
    [job] = lsf.submit("--nodes", "1", "--ranks-per-node", "1", "--python", stand_in.make(tmp_path))
    for count in range(3):
        wait_for_ranks(tmp_path, job, 1, count)
        lsf.type("bkill", "-s", "USR1", job)
    assert lsf.wait_for_end(job) == 75
    assert "bsub with this script, goes on" in lsf.log(job)


def test_a_killed_job_stays_dead(lsf, tmp_path):
    """Its ranks save on SIGTERM and exit with 75, which must not bring it back."""
    lsf.env["FAKE_LSF_FORWARDS"] = "1"
    [job] = lsf.submit("--nodes", "1", "--ranks-per-node", "2", "--python", stand_in.make(tmp_path))
    wait_for_ranks(tmp_path, job, 2)
    lsf.type("bkill", job)
    assert lsf.wait_for_end(job) == 75
    assert "state saved" in lsf.log(job) and not stand_in.started(tmp_path, job, 1)


@pytest.mark.smoke
def test_a_failing_rank_ends_the_job(lsf, tmp_path):
    [job] = lsf.submit("--nodes", "2", "--ranks-per-node", "2", "--python", stand_in.make(tmp_path))
    wait_for_ranks(tmp_path, job, 4)
    os.kill(stand_in.started(tmp_path, job)[3], 9)
    assert lsf.wait_for_end(job, 20) == 137
    assert not stand_in.started(tmp_path, job, 1)


def test_elements_of_an_array_have_a_seed_each_and_are_requeued_alone(lsf, tmp_path):
    lsf.env["FAKE_LSF_FORWARDS"] = "1"
    shape = ["--nodes", "1", "--ranks-per-node", "1", "--python", stand_in.make(tmp_path)]
    [job] = lsf.submit(*shape, "--array", "seeds=3,5")
    for index in (1, 2):
        wait_for_ranks(tmp_path, f"{job}.{index}", 1)
    lsf.type("bkill", "-s", "USR1", f"{job}[2]")
    wait_for_ranks(tmp_path, f"{job}.2", 1, 1)
    (tmp_path / "go").touch()
    assert [lsf.wait_for_end(f"{job}.{index}") for index in (1, 2)] == [0, 0]
    assert [re.findall(r"seeds=(\d+)", lsf.log(f"{job}.{index}"))[0] for index in (1, 2)] == ["3", "5"]
    assert not stand_in.started(tmp_path, f"{job}.1", 1)


def test_a_chain_waits_for_its_links(lsf, tmp_path):
    program = stand_in.make(tmp_path)
    first, second = lsf.submit("--nodes", "1", "--ranks-per-node", "1", "--chain", "2", "--python", program)
    wait_for_ranks(tmp_path, first, 1)
    assert lsf.status(second) == "PEND"
    (tmp_path / "go").touch()
    assert [lsf.wait_for_end(first), lsf.wait_for_end(second)] == [0, 0]


def test_many_nodes_whose_list_of_hosts_is_dropped(summit, tmp_path):
    (tmp_path / "go").touch()
    [job] = summit.submit("--nodes", "20", "--ranks-per-node", "1", "--python", stand_in.make(tmp_path))
    assert summit.wait_for_end(job) == 0
    assert len(stand_in.started(tmp_path, job)) == 20
    job_of = json.loads((summit.folder / job / "job.json").read_text())
    with patch.dict(os.environ, summit.env, clear=True):
        env = fake_lsf.job_environment(summit.folder, job, job_of, 0)
        few = fake_lsf.job_environment(summit.folder, job, job_of | {"-nnodes": "2"}, 0)
    assert "LSB_HOSTS" not in env and few["LSB_HOSTS"].startswith("batch4 ")
    names = env["LSB_MCPU_HOSTS"].split()[2::2]
    assert len(names) == 20 and names != sorted(names)


@pytest.mark.parametrize(
    ("old", "new", "printed"),
    [
        ("#BSUB -W 2:00", "#BSUB -W 2:00:00", "Illegal time"),
        ("-a 6 -c 42", "-a 6 -c 49", "exceed 42 cores"),
        ("-g 6", "-g 3", "two ranks would share a GPU"),
        ("-r 1", "-r 2", "are not 2 on each of 2 hosts"),
        ("packed:7", "packed:9", "exceed the 42 cores of a resource set"),
    ],
)
def test_the_fake_refuses_what_the_machine_would(summit, tmp_path, old, new, printed):
    """Otherwise the tests above could not fail."""
    (tmp_path / "go").touch()
    script = tmp_path / "script.sh"
    program = stand_in.make(tmp_path)
    text = "".join(summit.tell("--nodes", "2", "--python", program, "--dry-run"))
    assert old in text
    (summit.results / "jobs").mkdir(parents=True)
    script.write_text(text.replace(old, new))
    if "#BSUB" in old:
        assert printed in summit.type("bsub", str(script), code=255)
        return
    job = re.search(r"<(\d+)>", summit.type("bsub", str(script)))[1]
    assert summit.wait_for_end(job) != 0
    assert printed in summit.log(job) and not stand_in.started(tmp_path, job)


def test_the_wrong_way_to_hand_in_a_script_is_refused(lsf):
    command, printed = {
        "summit": (["bsub"], "use bsub script"),
        "generic-lsf": (["bsub", "job.sh"], "lines are not read"),
    }[lsf.site.stem]
    assert printed in lsf.type(*command, code=255)


def test_an_experiment_gives_the_numbers_of_a_plain_run(lsf, tmp_path, monkeypatch):
    monkeypatch.setenv("AADL_DATA_DIR", lsf.env["AADL_DATA_DIR"])
    config = write_config("graduate_admissions", tmp_path)
    [job] = lsf.submit("--nodes", "2", "--ranks-per-node", "2", config=config)
    run_plainly(config, tmp_path / "plain")
    assert lsf.wait_for_end(job, 240) == 0, lsf.log(job)
    launcher = "jsrun" if lsf.site.stem == "summit" else "openmpi"
    check_against_one_process(lsf.results, tmp_path / "plain", launcher=launcher, world_size=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which the job would see")
def test_a_job_that_asked_for_gpus_and_sees_none_stops(generic):
    [job] = generic.submit("--nodes", "1", "--gpus-per-node", "2")
    assert generic.wait_for_end(job) != 0
    assert re.search(r"LSB_EFFECTIVE_RSRCREQ=.*ngpus_physical=2.* gives the job GPUs, but rank 0", generic.log(job))
