"""A program that keeps the contract between job scripts and ranks, without torch: quick to start, easy to steer.

`make(folder)` gives its path, which goes into a job script as the interpreter. Every rank writes `enter-<pid>` into the
folder, then `start-<job>-<count>-<rank>`, and waits for USR1, USR2 or TERM, on which it exits with 75 as an interrupted
run does. A file `go` in the folder ends it with 0. So does its second start, unless there is a file `stubborn`.
"""

import sys

PROGRAM = """#!{python} -S
import os, signal, sys, time
from pathlib import Path

folder = Path({folder!r})
env = os.environ
(folder / f"enter-{{os.getpid()}}").touch()
time.sleep(float(env.get("STAND_IN_DELAY", 0)))  # stands for the import of torch
reasons = []
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: reasons.append(number))
rank = next(int(env[name]) for name in ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK") if name in env)
job = env.get("SLURM_JOB_ID") or env["LSB_JOBID"] + ("." + env["LSB_JOBINDEX"] if env["LSB_JOBINDEX"] != "0" else "")
count = int(env.get("AADL_RESTART_COUNT") or env.get("SLURM_RESTART_COUNT") or 0)
arguments = " ".join(sys.argv[1:])
print(f"rank {{rank}} start {{count}} of job {{job}} ends {{env['AADL_END_TIME']}}: {{arguments}}", flush=True)
(folder / f"start-{{job}}-{{count}}-{{rank}}").write_text(str(os.getpid()))
again = count > 0 and not (folder / "stubborn").exists()
while not (reasons or again or (folder / "go").exists()):
    time.sleep(0.01)
time.sleep(0.03 * rank)  # the ranks do not leave at the same time
os._exit(75 if reasons else 0)
"""


def make(folder):
    """Writes the program into a folder and returns its path as text."""
    path = folder / "stand_in"
    path.write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
    path.chmod(0o755)
    return str(path)


def started(folder, job, count=0):
    """Process ids of the ranks that started, by rank."""
    found = folder.glob(f"start-{job}-{count}-*")
    return {int(path.name.rpartition("-")[2]): int(path.read_text() or 0) for path in found}
