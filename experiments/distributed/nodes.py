"""What the variables of a job say: numbers, nodes and tasks in the notations of Slurm and LSF, its batch shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import product

# Slurm's numbers for steps that no srun of the user started: batch script, interactive shell, external processes.
SHELL_STEPS = {str(2**32 - number) for number in range(1, 16)}
LOGIN_OR_LAUNCH = re.compile(r"(batch|login|launch)\d*$")
MAX_NODES = 1_000_000


def first(env: Mapping[str, str], names: Sequence[str], minimum: int, default: int | None) -> int:
    """Returns the first of these variables that is set, or the default; ValueError if there is neither."""
    for name in names:
        if name in env:
            return integer(env, name, minimum)
    if default is None:
        raise ValueError(
            f"environment variable {' or '.join(names)} is missing, so the rank within its node is unknown"
        )
    return default


def integer(env: Mapping[str, str], name: str, minimum: int) -> int:
    """Returns a variable as an integer; ValueError if it is no integer or too small."""
    text = env[name]
    if re.fullmatch(r"\s*\d+\s*", text, re.ASCII) is None or int(text) < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {text!r}")
    return int(text)


def port_of(env: Mapping[str, str], name: str) -> int:
    """Returns a variable as a port; ValueError if it is not a port."""
    port = integer(env, name, 1)
    if port > 65535:
        raise ValueError(f"{name} must be an integer in [1, 65535], got {port}")
    return port


def lsf_hosts(env: Mapping[str, str]) -> tuple[dict[str, int], bool]:
    """Returns slots by host without the launch node, and whether there is one; LSB_HOSTS is lost beyond 4096 bytes."""
    words = env.get("LSB_MCPU_HOSTS", "").split()
    hosts: dict[str, int] = {}
    if words and len(words) % 2 == 0 and all(word.isdigit() for word in words[1::2]):
        hosts = {host: int(slots) for host, slots in zip(words[::2], words[1::2], strict=True)}
    else:
        for host in env.get("LSB_HOSTS", "").split():
            hosts[host] = hosts.get(host, 0) + 1
    first = next(iter(hosts), "")
    launch_node = len(hosts) > 1 and hosts[first] == 1 and LOGIN_OR_LAUNCH.match(first.split(".")[0]) is not None
    if launch_node:
        del hosts[first]
    if not hosts and env.get("LSB_DJOB_NUMPROC", "").isdigit():
        hosts = {"": int(env["LSB_DJOB_NUMPROC"])}
    return hosts, launch_node


def tasks_per_node(text: str, name: str) -> list[int]:
    """Returns [4, 1, 1] from Slurm's "4,1(x2)"; ValueError for anything else."""
    counts: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        repeats = int(match[2] or 1) if match else 0
        if match is None or int(match[1]) < 1 or not 0 < repeats <= MAX_NODES:
            raise ValueError(f"{name} must be counts such as 4,1(x2), got {text!r}")
        counts += [int(match[1])] * repeats
    return counts


def expand_nodelist(text: str) -> list[str]:
    """Returns the names in Slurm's list of nodes, as "r1n[01-02],gpu7" or "p[1-2]q[3-4]"; ValueError for no numbers."""
    nodes: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        parts = [_expand_range(part) if part.startswith("[") else [part] for part in re.split(r"(\[.*?\])", word)]
        nodes += ["".join(pieces) for pieces in product(*parts)]
    return nodes


def _expand_range(part: str) -> list[str]:
    """Returns ["01", "02", "7"] from "[01-02,7]"."""
    names: list[str] = []
    for piece in part[1:-1].split(","):
        first, _, last = piece.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not 0 < len(numbers) <= MAX_NODES:
            raise ValueError(f"{part} must be a range of at most {MAX_NODES} nodes")
        names += [f"{number:0{len(first)}}" for number in numbers]
    return names


def refuse_batch_shell(env: Mapping[str, str], command: Sequence[str], name: str) -> None:
    """Raises ValueError, with the line to type, in a job's own shell, where one process would run as all tasks."""
    typed = shlex.join(command)
    where, line = "", ""
    if "SLURM_JOB_ID" in env and env.get("SLURM_STEP_ID", "4294967291") in SHELL_STEPS:
        tasks = first(env, ("SLURM_NTASKS", "SLURM_NPROCS"), 1, 1)
        nodes = first(env, ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), 1, 1)
        if tasks > 1 or nodes > 1:
            where = f"Slurm job {env['SLURM_JOB_ID']} ({max(tasks, nodes)} tasks on {nodes} nodes)"
            threads = f" -c {env['SLURM_CPUS_PER_TASK']}" if env.get("SLURM_CPUS_PER_TASK") else ""
            line = f"srun -N {nodes} -n {max(tasks, nodes)}{threads} --kill-on-bad-exit=1 {typed}"
    elif "LSB_JOBID" in env:
        hosts, launch_node = lsf_hosts(env)
        slots = sum(hosts.values())
        if slots > 1:
            where = f"LSF job {env['LSB_JOBID']} ({slots} slots on {len(hosts)} hosts)"
            line = f"mpiexec -n {slots} {typed}"
            if launch_node:
                cores = min(hosts.values())
                each = next(number for number in (6, 4, 2, 1) if cores % number == 0)  # ranks, and GPUs, of a node
                shape = f"-n {len(hosts)} -r 1 -a {each} -c {cores} -g {each} -b packed:{cores // each} -d packed"
                line = f"jsrun {shape} {typed}"
    if where:
        raise ValueError(
            f"this is the batch shell of {where}, not one of its tasks: start with `{line}`, or set "
            + ("AADL_LAUNCHER=single for one process" if name == "single" else "AADL_LAUNCHER=env to trust RANK")
        )
