"""A Slurm cluster on this host: munged, slurmctld and several slurmd, in a temporary folder and on free ports."""

import contextlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from paths import ROOT

from jobs import submit

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NUM_NODES = 4
GPUS_PER_NODE = 2
PACKAGES = "slurmctld slurmd slurm-client munge"

CONFIG = """
ClusterName=aadl
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
GresTypes=gpu
JobRequeue=1
KillWait=5
MinJobAge=600
ReturnToService=2
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 State=UP
"""
# cred_expire: a requeued job waits until its old credential has expired, two minutes by default.

SITE = """
title: A Slurm cluster on this host
verified: {{by: never}}
sources: [tests/cluster/slurm/cluster.py]
scheduler: slurm
launcher: srun
account: optional
node: {{cores: 8, gpus: {gpus}}}
ranks: {{per_node: 2, cores: 1, gpus_per_node: {gpus}}}
gpu_directives: ["--gpus-per-node={{gpus_per_node}}"]
gpu_launch_options: ["--gpus-per-node={{gpus_per_node}}"]
python: {python}
node_local: {{path: "{folder}/local-$SLURM_JOB_ID"}}
max_restarts: 2
warning: {{signal: USR2, seconds: 60}}
queues: {{batch: {{directives: ["--partition=batch"], limits: [{{nodes: {nodes}, minutes: 60}}]}}}}
"""


def missing():
    """What is missing to run a cluster here, "" for nothing."""
    if os.geteuid() != 0:
        return "needs root, to run Slurm's daemons"
    absent = [name for name in PROGRAMS if find(name) is None]
    return f"needs {', '.join(absent)}: apt-get install {PACKAGES}" if absent else ""


def find(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count):
    """Ports that no process uses, below those that the system hands out: nobody takes one before its daemon starts."""
    found = []
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as entry, contextlib.suppress(OSError):
            entry.bind(("127.0.0.1", port))
            found.append(port)
    return found[:count]


class Cluster:
    """Daemons of one cluster, by name, and what a user types at it."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="aadl-slurm-"))
        self.processes = {}
        # The environment of a user, without what a surrounding job or test has set.
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "AADL_DATA_DIR") if name in os.environ}
        self.env = inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "USER": "root"}
        self.site = self.folder / "emulated.yaml"

    def start(self):
        self._configure()
        self._spawn("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
                    f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
                    f"--seed-file={self.folder}/munged.seed", f"--log-file={self.folder}/munged.log")  # fmt: skip
        wait_until(lambda: (self.folder / "munge.socket").exists(), 20, "munged did not start")
        self._spawn("slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self.idle_nodes() == self.nodes, 60, "the nodes did not become idle", self.logs)

    def start_node(self, node):
        self._spawn("slurmd", "-D", "-N", node, key=node)

    def _configure(self):
        self.nodes = [f"node{number:02}" for number in range(1, NUM_NODES + 1)]
        controller, *ports = free_ports(1 + NUM_NODES)
        lines = []
        for node, port in zip(self.nodes, ports, strict=True):
            (self.folder / node).mkdir()
            lines.append(f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 Sockets=1 "
                         f"CoresPerSocket=8 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:{GPUS_PER_NODE}")  # fmt: skip
        (self.folder / "state").mkdir()
        text = CONFIG.format(folder=self.folder, port=controller, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(text)
        # Any two devices pass for GPUs: Slurm only hands out their numbers.
        devices = "".join(f"NodeName={node} Name=gpu File=/dev/null,/dev/zero\n" for node in self.nodes)
        (self.folder / "gres.conf").write_text(devices)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        self.site.write_text(
            SITE.format(python=sys.executable, gpus=GPUS_PER_NODE, folder=self.folder, nodes=NUM_NODES)
        )

    def _spawn(self, program, *arguments, key=None):
        with open(self.folder / f"{key or program}.out", "ab") as log:
            self.processes[key or program] = subprocess.Popen(
                [find(program), *arguments], env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self):
        if find("scancel") and "slurmctld" in self.processes:
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            wait_until(lambda: not self.run("squeue", "-h", check=False), 10, None)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._kill_steps()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_steps(self):
        """Ends what outlived its daemon: step daemons and ranks carry the cluster's folder in their environment."""
        mark = f"SLURM_CONF={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes() and int(path.parent.name) != os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue

    def run(self, *command, check=True, cwd=ROOT):
        """A command's standard output."""
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
        return done.stdout

    def idle_nodes(self):
        printed = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).split("\n")
        return sorted({line.split()[0] for line in printed if line.endswith(" idle")})

    def type(self, config, results, *options):
        """`python -m jobs.submit` in this process, for importing torch takes long: (exit code, stdout, stderr)."""
        printed, errors = io.StringIO(), io.StringIO()
        arguments = [str(config), "--site", str(self.site), "--results", str(results), "--time", "0:10:00", *options]
        with (
            patch.dict(os.environ, self.env, clear=True),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(errors),
        ):
            code = submit.main(arguments)
        return code, printed.getvalue(), errors.getvalue()

    def submit(self, config, results, *options):
        """The ids of submitted jobs."""
        code, printed, errors = self.type(config, results, *options)
        assert code == 0, errors
        return printed.split()

    def job(self, number):
        """The fields of a job, of the first element of an array."""
        printed = self.run("scontrol", "-o", "show", "job", str(number)).split("\n")[0]
        return dict(field.split("=", 1) for field in printed.split() if "=" in field)

    def state(self, number):
        return self.job(number)["JobState"]

    def wait_for(self, number, *states, seconds=90):
        """Waits for a state of a job, and returns it."""
        wait_until(lambda: self.state(number) in states, seconds, f"job {number} is {self.state(number)}, not {states}")
        return self.state(number)

    def wait_for_end(self, number, seconds=90):
        """Waits for the end of a job and returns its state: COMPLETED, FAILED ..."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait_for(number, *ends, seconds=seconds)

    def logs(self):
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))


def wait_until(condition, seconds, message, more=lambda: ""):
    """Waits until the condition holds; otherwise fails with the message, or returns False without one."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            assert message is None, f"{message} within {seconds} s {more()}"
            return False
        time.sleep(0.1)
    return True
