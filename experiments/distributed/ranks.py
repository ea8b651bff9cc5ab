"""Who this process is among its ranks, read from the variables of whoever started it.

The process that spawned this one decides, not the scheduler: a Slurm batch shell has SLURM_PROCID=0 and SLURM_NTASKS=6,
but is not rank 0 of 6. Inner spawners come first: torchrun, variables set by hand, jsrun, srun, mpiexec. Variables of
the suite itself win over all:

    AADL_LAUNCHER        torchrun, env, jsrun, srun, openmpi, mpich, mvapich, pmix, mpi4py or single: no guessing
    AADL_MASTER_ADDRESS  host of rank 0, AADL_MASTER_PORT its port, for launchers that tell neither
    AADL_JOB_ID          one text for all ranks of a job, where no scheduler gives one
    AADL_RESTART_COUNT   attempts before this one, where the scheduler does not count them
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

# What torchrun sets in every process. A lone RANK or WORLD_SIZE is a half-made environment, which is an error.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_LAUNCHERS = ("openmpi", "mpich", "mvapich", "pmix", "mpi4py")
# Slurm's numbers for steps that are no srun of the user: the batch script, an interactive shell, external processes.
SHELL_STEPS = {str(2**32 - number) for number in range(1, 16)}
LOGIN_OR_LAUNCH = re.compile(r"(batch|login|launch)\d*$")
MAX_NODES = 1_000_000


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the job.

    `local_size` is 0 and `node_rank` -1 where the launcher does not tell; `master_port` is 0 where rank 0 picks one and
    announces it. `hosts` has the expected host of each rank, as a hint for messages, or is empty. `agent_store` says
    that torchrun's agent holds the store at the master's address.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_address: str = ""
    master_port: int = 0
    launcher: str = "single process"
    local_size: int = 1
    node_rank: int = 0
    host: str = ""
    restart_count: int = 0
    scheduler: str = "none"
    job_id: str = ""
    step_id: str = ""
    hosts: tuple[str, ...] = ()
    agent_store: bool = False


# (rank, world size, local rank, local size) from the MPI library itself.
MpiNumbers = Callable[[], tuple[int, int, int, int]]


def read_ranks(env: Mapping[str, str], *, command: Sequence[str], mpi: MpiNumbers) -> Ranks:
    """Reads the ranks from the variables that the launcher set.

    Args:
        env: environment variables.
        command: what was typed, for the message that says what to type instead.
        mpi: asks the MPI library; called only where MPI spawned this process without telling the number of ranks, or
            where AADL_LAUNCHER=mpi4py wants it.

    Raises:
        ValueError: a variable is missing, is no integer, or contradicts another one; or this is the batch shell of a
            job with several tasks.
    """
    wanted = env.get("AADL_LAUNCHER", "")
    if wanted and wanted not in READERS:
        raise ValueError(f"AADL_LAUNCHER must be one of {', '.join(READERS)}, got {wanted!r}")
    name = wanted or _spawner(env)
    if not wanted and name in ("single", "env"):
        _refuse_batch_shell(env, command, name)
    ranks = _with_job(READERS[name](env, mpi), env)
    if not wanted:
        _compare(name, ranks, env)
    return _with_master(_checked(ranks), env)


def _spawner(env: Mapping[str, str]) -> str:
    """The innermost launcher whose variables are there."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return "torchrun" if "TORCHELASTIC_RUN_ID" in env else "env"
    if "JSM_NAMESPACE_RANK" in env and "JSM_NAMESPACE_SIZE" in env:
        return "jsrun"
    mpi = next((name for name in ("openmpi", "mpich", "mvapich") if _numbers(name, env)), "")
    # mpiexec starts its daemons on the other nodes by srun, and their children inherit the numbers of that step. Such
    # children carry a mark; besides, a step of one task, such as an interactive shell, did not spawn several ranks.
    inside_step = mpi and (any(mark in env for mark in DAEMON_MARKS) or _numbers("srun", env)[1:] == (1,))
    if _is_step(env) and not inside_step:
        return "srun"
    if mpi:
        return mpi
    return "pmix" if "PMIX_RANK" in env else "single"


DAEMON_MARKS = ("PRTE_LAUNCHED", "OMPI_MCA_orte_hnp_uri", "MPI_LOCALRANKID")

# Rank and number of ranks as each launcher calls them.
NUMBERS = {
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpich": ("PMI_RANK", "PMI_SIZE"),
    "mvapich": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
}
LOCAL_RANKS = {
    "jsrun": ("JSM_NAMESPACE_LOCAL_RANK",),
    "openmpi": ("OMPI_COMM_WORLD_LOCAL_RANK",),
    "mpich": ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
    "mvapich": ("MV2_COMM_WORLD_LOCAL_RANK",),
}
LOCAL_SIZES = {
    "jsrun": ("JSM_NAMESPACE_LOCAL_SIZE",),
    "openmpi": ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    "mpich": ("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    "mvapich": ("MV2_COMM_WORLD_LOCAL_SIZE",),
}


def _is_step(env: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "4294967291") not in SHELL_STEPS


def _numbers(name: str, env: Mapping[str, str]) -> tuple[int, ...]:
    """(rank, world size) by this launcher's variables; () where it set none."""
    names = NUMBERS[name]
    if name == "srun":
        if not _is_step(env):
            return ()
        names = (names[0], names[1] if names[1] in env else "SLURM_NTASKS")
    if not all(variable in env for variable in names):
        return ()
    return _integer(env, names[0], 0), _integer(env, names[1], 1)


def _compare(name: str, ranks: Ranks, env: Mapping[str, str]) -> None:
    """Refuses launchers that contradict each other; an agent of torchrun or mpiexec is itself a task of another one."""
    if name in ("torchrun", "single", "pmix"):
        return
    own = NUMBERS.get(name, ("RANK", "WORLD_SIZE"))
    for other, variables in NUMBERS.items():
        numbers = _numbers(other, env)
        outer = other == "srun" and name in MPI_LAUNCHERS
        if other == name or not numbers or outer or (name == "env" and numbers[1] == 1):
            continue
        for variable, value, mine, what in zip(variables, numbers, own, (ranks.rank, ranks.world_size), strict=True):
            if value != what:
                hint = (
                    "a batch script that exports RANK gives all tasks the same, so set it inside the task or not at all"
                    if name == "env"
                    else "unset the variables that were inherited"
                )
                raise ValueError(
                    f"{mine}={what} and {variable}={value} contradict each other: {hint}, or choose with "
                    f"AADL_LAUNCHER={name} or AADL_LAUNCHER={other}"
                )
    if name in ("jsrun", "srun", "openmpi") and env.get("PMIX_RANK", str(ranks.rank)) != str(ranks.rank):
        if name == "srun" and _numbers("srun", env)[1:] == (1,):
            return
        raise ValueError(
            f"{own[0]}={ranks.rank} and PMIX_RANK={env['PMIX_RANK']} contradict each other: unset the variables that "
            f"were inherited, or choose with AADL_LAUNCHER={name} or AADL_LAUNCHER=pmix"
        )


def _read_torchrun(env: Mapping[str, str], mpi: MpiNumbers) -> Ranks:
    missing = [name for name in TORCHRUN_VARIABLES if name not in env]
    if missing == ["LOCAL_RANK"] and (local := _local_rank_of_others(env)) is not None:
        env, missing = {**env, "LOCAL_RANK": str(local)}, []
    if missing:
        given = " and ".join(name for name in ("RANK", "WORLD_SIZE") if name in env)
        raise ValueError(
            f"environment variable {', '.join(missing)} is missing"
            + (f" although {given} is set" if given else "")
            + f"; torchrun sets all of {', '.join(TORCHRUN_VARIABLES)}: start with torchrun, or unset them for a "
            "single process"
        )
    elastic = "TORCHELASTIC_RUN_ID" in env
    if not env["MASTER_ADDR"]:
        raise ValueError("MASTER_ADDR must name the host of rank 0, got an empty text")
    return Ranks(
        _integer(env, "RANK", 0),
        _integer(env, "WORLD_SIZE", 1),
        _integer(env, "LOCAL_RANK", 0),
        env["MASTER_ADDR"],
        _port(env, "MASTER_PORT"),
        "torchrun" if elastic else "env",
        local_size=_integer(env, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in env else 0,
        node_rank=_first(env, ("GROUP_RANK", "NODE_RANK"), 0, -1),
        restart_count=_integer(env, "TORCHELASTIC_RESTART_COUNT", 0) if "TORCHELASTIC_RESTART_COUNT" in env else 0,
        job_id=env.get("TORCHELASTIC_RUN_ID", ""),
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _local_rank_of_others(env: Mapping[str, str]) -> int | None:
    if _is_step(env) and "SLURM_LOCALID" in env:
        return _integer(env, "SLURM_LOCALID", 0)
    for names in LOCAL_RANKS.values():
        for name in names:
            if name in env:
                return _integer(env, name, 0)
    return None


def _read_srun(env: Mapping[str, str], mpi: MpiNumbers) -> Ranks:
    numbers = _numbers("srun", env)
    if not numbers:
        raise ValueError(
            "AADL_LAUNCHER=srun needs SLURM_STEP_ID, SLURM_PROCID and SLURM_STEP_NUM_TASKS, which srun sets"
        )
    rank, world_size = numbers
    node = _first(env, ("SLURM_NODEID",), 0, 0)
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), "SLURM_STEP_TASKS_PER_NODE")
    if counts and sum(counts) != world_size:
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']} counts {sum(counts)} tasks, but "
            f"SLURM_STEP_NUM_TASKS={world_size}"
        )
    if counts and node >= len(counts):
        raise ValueError(f"SLURM_NODEID={node} must be below the {len(counts)} nodes of SLURM_STEP_TASKS_PER_NODE")
    return Ranks(
        rank,
        world_size,
        _first(env, ("SLURM_LOCALID",), 0, 0),
        launcher="srun",
        local_size=counts[node] if counts else 0,
        node_rank=node,
        step_id=env.get("SLURM_STEP_ID", ""),
        hosts=_slurm_hosts(env, counts, world_size),
    )


def _slurm_hosts(env: Mapping[str, str], counts: Sequence[int], world_size: int) -> tuple[str, ...]:
    """The expected host of each rank, for messages only: other distributions than by blocks are not followed."""
    blocks = env.get("SLURM_DISTRIBUTION", "block").split(":")[0] == "block"
    try:
        nodes = expand_nodelist(env.get("SLURM_STEP_NODELIST", ""))
    except ValueError:
        return ()
    if not blocks or len(nodes) != len(counts):
        return (nodes[0],) * world_size if len(nodes) == 1 else ()
    return tuple(node for node, count in zip(nodes, counts, strict=True) for _ in range(count))


def _reader_of_mpi(name: str) -> Callable[[Mapping[str, str], MpiNumbers], Ranks]:
    def read(env: Mapping[str, str], mpi: MpiNumbers) -> Ranks:
        numbers = _numbers(name, env)
        if not numbers:
            raise ValueError(f"AADL_LAUNCHER={name} needs {' and '.join(NUMBERS[name])}, which are not set")
        alone = numbers[1] == 1
        return Ranks(
            numbers[0],
            numbers[1],
            _first(env, LOCAL_RANKS[name], 0, 0 if alone else None),
            launcher=name,
            local_size=_first(env, LOCAL_SIZES[name], 1, 1 if alone else 0),
            node_rank=-1,
            step_id=env.get("PMIX_NAMESPACE", ""),
        )

    return read


def _read_mpi_library(env: Mapping[str, str], mpi: MpiNumbers) -> Ranks:
    rank, world_size, local_rank, local_size = mpi()
    launcher = "mpi4py" if env.get("AADL_LAUNCHER") == "mpi4py" else "pmix"
    if launcher == "pmix" and env.get("PMIX_RANK", str(rank)) != str(rank):
        raise ValueError(
            f"PMIX_RANK={env['PMIX_RANK']} but MPI.COMM_WORLD has rank {rank} of {world_size}: mpi4py uses another MPI "
            "library than the launcher"
        )
    step = env.get("PMIX_NAMESPACE", "")
    return Ranks(rank, world_size, local_rank, launcher=launcher, local_size=local_size, node_rank=-1, step_id=step)


READERS: dict[str, Callable[[Mapping[str, str], MpiNumbers], Ranks]] = {
    "torchrun": _read_torchrun,
    "env": _read_torchrun,
    "srun": _read_srun,
    **{name: _reader_of_mpi(name) for name in ("jsrun", "openmpi", "mpich", "mvapich")},
    "pmix": _read_mpi_library,
    "mpi4py": _read_mpi_library,
    "single": lambda env, mpi: Ranks(),
}


def _with_job(ranks: Ranks, env: Mapping[str, str]) -> Ranks:
    scheduler, job_id, restart_count = "none", ranks.job_id, ranks.restart_count
    if "SLURM_JOB_ID" in env:
        scheduler, job_id = "slurm", env["SLURM_JOB_ID"]
        restart_count += _first(env, ("SLURM_RESTART_COUNT",), 0, 0)
    elif "LSB_JOBID" in env:
        element = env.get("LSB_JOBINDEX", "0")
        scheduler, job_id = "lsf", env["LSB_JOBID"] + ("" if element in ("", "0") else f"_{element}")
    elif "PBS_JOBID" in env:
        scheduler, job_id = "pbs", env["PBS_JOBID"]
    if "AADL_RESTART_COUNT" in env:
        restart_count = _integer(env, "AADL_RESTART_COUNT", 0)
    return replace(
        ranks,
        scheduler=scheduler,
        job_id=env.get("AADL_JOB_ID") or job_id,
        restart_count=restart_count,
        host=env.get("SLURMD_NODENAME", "") if scheduler == "slurm" else "",
    )


def _with_master(ranks: Ranks, env: Mapping[str, str]) -> Ranks:
    if ranks.world_size == 1 or ranks.launcher == "torchrun":  # one process needs none, and torchrun's is its agent's
        return ranks
    if env.get("AADL_MASTER_ADDRESS"):
        ranks = replace(ranks, master_address=env["AADL_MASTER_ADDRESS"])
    if "AADL_MASTER_PORT" in env:
        ranks = replace(ranks, master_port=_port(env, "AADL_MASTER_PORT"))
    return ranks


def _checked(ranks: Ranks) -> Ranks:
    names = {"torchrun": ("RANK", "WORLD_SIZE"), "env": ("RANK", "WORLD_SIZE"), **NUMBERS}
    own, size = names.get(ranks.launcher, ("rank", "world size"))
    local = {"torchrun": "LOCAL_RANK", "env": "LOCAL_RANK", "srun": "SLURM_LOCALID"}.get(
        ranks.launcher, LOCAL_RANKS.get(ranks.launcher, ("local rank",))[0]
    )
    if ranks.rank >= ranks.world_size:
        raise ValueError(f"{own}={ranks.rank} must be below {size}={ranks.world_size}")
    if ranks.local_rank > ranks.rank:
        raise ValueError(f"{local}={ranks.local_rank} must not exceed {own}={ranks.rank}")
    if ranks.local_size and ranks.local_rank >= ranks.local_size:
        raise ValueError(f"{local}={ranks.local_rank} must be below the {ranks.local_size} ranks of this node")
    if ranks.local_size > ranks.world_size:
        raise ValueError(f"the {ranks.local_size} ranks of this node must not exceed {size}={ranks.world_size}")
    return ranks


def _refuse_batch_shell(env: Mapping[str, str], command: Sequence[str], name: str) -> None:
    """Refuses a job's own shell, where one process would run as if it were all tasks, and RANK is the same for all.

    Raises:
        ValueError: with the line to type instead.
    """
    typed = shlex.join(command)
    where, line = "", ""
    if "SLURM_JOB_ID" in env and env.get("SLURM_STEP_ID", "4294967291") in SHELL_STEPS:
        tasks = _first(env, ("SLURM_NTASKS", "SLURM_NPROCS"), 1, 1)
        nodes = _first(env, ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), 1, 1)
        if tasks > 1 or nodes > 1:
            where = f"Slurm job {env['SLURM_JOB_ID']} ({max(tasks, nodes)} tasks on {nodes} nodes)"
            threads = f" -c {env['SLURM_CPUS_PER_TASK']}" if env.get("SLURM_CPUS_PER_TASK") else ""
            line = f"srun -N {nodes} -n {max(tasks, nodes)}{threads} --kill-on-bad-exit=1 {typed}"
    elif "LSB_JOBID" in env:
        hosts, launch_node = _lsf_hosts(env)
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


def _lsf_hosts(env: Mapping[str, str]) -> tuple[dict[str, int], bool]:
    """Slots by host without the launch node, and whether there is one; LSB_HOSTS is dropped beyond 4096 bytes."""
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
    """Slurm's "4,1(x2)" as [4, 1, 1].

    Raises:
        ValueError: other texts.
    """
    counts: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        repeats = int(match[2] or 1) if match else 0
        if match is None or int(match[1]) < 1 or not 0 < repeats <= MAX_NODES:
            raise ValueError(f"{name} must be counts such as 4,1(x2), got {text!r}")
        counts += [int(match[1])] * repeats
    return counts


def expand_nodelist(text: str) -> list[str]:
    """Slurm's compressed list of nodes, such as "r1n[01-02],gpu7" or "p[1-2]q[3-4]", as names in order.

    Raises:
        ValueError: the text follows another grammar, or names more than a million nodes.
    """
    nodes: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        parts = [_expand_range(part, text) if part.startswith("[") else [part] for part in re.split(r"(\[.*?\])", word)]
        number = 1
        for part in parts:
            number *= len(part)
        if number + len(nodes) > MAX_NODES:
            raise ValueError(f"the list of nodes {text!r} names more than {MAX_NODES} nodes")
        nodes += ["".join(pieces) for pieces in product(*parts)]
    if text.count("[") != text.count("]") or re.search(r"\][^,\[]*\]|^,|,,|,$|\[[^\]]*\[", text):
        raise ValueError(f"{text!r} is no list of nodes")
    return nodes


def _expand_range(part: str, text: str) -> list[str]:
    names: list[str] = []
    for piece in part[1:-1].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece, re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(
                f"{text!r} is no list of nodes: {part} must hold numbers and ranges such as [1-3,5,008-010]"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= MAX_NODES:
            raise ValueError(f"the list of nodes {text!r} names more than {MAX_NODES} nodes")
        names += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return names


def _first(env: Mapping[str, str], names: Sequence[str], minimum: int, default: int | None) -> int:
    for name in names:
        if name in env:
            return _integer(env, name, minimum)
    if default is None:
        raise ValueError(
            f"environment variable {' or '.join(names)} is missing, so the rank within its node is unknown"
        )
    return default


def _integer(env: Mapping[str, str], name: str, minimum: int) -> int:
    text = env[name]
    if re.fullmatch(r"\s*\d+\s*", text, re.ASCII) is None or int(text) < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {text!r}")
    return int(text)


def _port(env: Mapping[str, str], name: str) -> int:
    port = _integer(env, name, 1)
    if port > 65535:
        raise ValueError(f"{name} must be an integer in [1, 65535], got {port}")
    return port
