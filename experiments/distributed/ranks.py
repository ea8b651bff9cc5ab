"""Who this process is among its ranks, read from the variables of the launcher that started it.

The process that spawned this one decides, not the scheduler: a Slurm batch shell has SLURM_PROCID=0 and SLURM_NTASKS=6,
but is not rank 0 of 6. LAUNCHERS is the table of launchers and their variables. Inner spawners come first: torchrun,
variables set by hand, jsrun, srun, mpiexec. Variables of the suite itself win over all of them:

    AADL_LAUNCHER        torchrun, env, jsrun, srun, openmpi, mpich, mvapich, pmix, mpi4py or single
    AADL_MASTER_ADDRESS  host of rank 0, and AADL_MASTER_PORT its port, for launchers that give neither
    AADL_JOB_ID          one text for all ranks of a job, where no scheduler gives one
    AADL_RESTART_COUNT   attempts before this one, where the scheduler does not count them
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.distributed.nodes import (
    SHELL_STEPS,
    expand_nodelist,
    first,
    integer,
    port_of,
    refuse_batch_shell,
    tasks_per_node,
)


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the job.

    `local_size` is 0 and `node_rank` -1 where the launcher does not give them; `master_port` is 0 where rank 0 picks a
    port and announces it. `hosts` has the expected host of each rank, as a hint for messages, or is empty.
    `agent_store` is True if torchrun's agent holds the store at the master's address. `device` is "auto", "cpu" or
    "cuda", as the configuration has it. `restart_count` counts the attempts of torchrun and the restarts of the
    scheduler's job; `job_restarts` the latter alone.
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
    device: str = "auto"
    job_restarts: int = 0


@dataclass(frozen=True)
class Launcher:
    """The variables in which one launcher gives its numbers; where there are several names, the first that is set."""

    rank: str
    size: str
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    node: tuple[str, ...] = ()


BY_HAND = Launcher("RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",), ("GROUP_RANK", "NODE_RANK"))
LAUNCHERS = {
    "torchrun": BY_HAND,
    "env": BY_HAND,
    "jsrun": Launcher(
        "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", ("JSM_NAMESPACE_LOCAL_RANK",), ("JSM_NAMESPACE_LOCAL_SIZE",)
    ),
    "srun": Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), (), ("SLURM_NODEID",)),
    "openmpi": Launcher(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "mpich": Launcher(
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    ),
    "mvapich": Launcher(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
}
NAMES = ("torchrun", "env", "srun", "jsrun", "openmpi", "mpich", "mvapich", "pmix", "mpi4py", "single")
MPI_LAUNCHERS = ("openmpi", "mpich", "mvapich", "pmix", "mpi4py")
OF_MPI = ("jsrun", "openmpi", "mpich", "mvapich")  # jsrun starts Spectrum MPI
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all of them
# mpiexec starts its daemons on the other nodes by srun, and their children inherit the numbers of that step. These
# variables tell such children.
DAEMON_MARKS = ("PRTE_LAUNCHED", "OMPI_MCA_orte_hnp_uri", "MPI_LOCALRANKID")

# (rank, world size, local rank, local size) from the MPI library itself.
MpiNumbers = Callable[[], tuple[int, int, int, int]]


def ranks_from_environment(
    env: Mapping[str, str], *, command: Sequence[str] | None = None, mpi: MpiNumbers | None = None
) -> Ranks:
    """Reads the ranks from the variables that the launcher set.

    Args:
        env: environment variables.
        command: what was typed, for the message that says what to type instead; None for the command of this process.
        mpi: asks the MPI library, None for `mpi.numbers_of_mpi`; called only where MPI spawned this process without
            giving the number of ranks, or where AADL_LAUNCHER=mpi4py asks for it.

    Raises:
        ValueError: a variable is missing, is no integer, or contradicts another one; or this is a job's batch shell.
    """
    wanted = env.get("AADL_LAUNCHER", "")
    if wanted and wanted not in NAMES:
        raise ValueError(f"AADL_LAUNCHER must be one of {', '.join(NAMES)}, got {wanted!r}")
    name = wanted or launcher_of(env)
    if not wanted and name in ("single", "env"):
        refuse_batch_shell(env, sys.orig_argv if command is None else command, name)
    ranks = _with_job(_read(name, env, mpi), env)
    if not wanted:
        _refuse_contradictions(name, ranks, env)
    if name in LAUNCHERS:
        _check(ranks, LAUNCHERS[name])
    return _with_master(ranks, env)


def launcher_of(env: Mapping[str, str]) -> str:
    """Returns the innermost launcher that has set variables."""
    mpi = next((name for name in ("openmpi", "mvapich", "mpich") if _numbers(name, env)), "")
    others = mpi or "JSM_NAMESPACE_RANK" in env or _is_step(env)
    # A lone WORLD_SIZE is an export of a job script, whose tasks have the numbers of srun or mpiexec.
    if "RANK" in env or ("WORLD_SIZE" in env and not others):
        return "torchrun" if "TORCHELASTIC_RUN_ID" in env else "env"
    if _numbers("jsrun", env):
        return "jsrun"
    # A step of one task, such as an interactive shell, did not spawn several ranks.
    inside_step = mpi and (any(mark in env for mark in DAEMON_MARKS) or _numbers("srun", env)[1:] == (1,))
    if _is_step(env) and not inside_step:
        return "srun"
    return mpi or ("pmix" if "PMIX_RANK" in env else "single")


def _is_step(env: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "4294967291") not in SHELL_STEPS


def _numbers(name: str, env: Mapping[str, str]) -> tuple[int, ...]:
    """Returns (rank, world size) by this launcher's variables; () if it has set none."""
    rank, size = LAUNCHERS[name].rank, LAUNCHERS[name].size
    if name == "srun":
        if not _is_step(env):
            return ()
        size = size if size in env else "SLURM_NTASKS"
    if rank not in env or size not in env:
        return ()
    return integer(env, rank, 0), integer(env, size, 1)


# --- one reader for all launchers, and what some of them add


def _read(name: str, env: Mapping[str, str], mpi: MpiNumbers | None) -> Ranks:
    if name == "single":
        return Ranks()
    if name in ("pmix", "mpi4py"):
        return _ask_mpi(name, env, mpi)
    if name in ("torchrun", "env"):
        env = _with_given(env)
    numbers, launcher = _numbers(name, env), LAUNCHERS[name]
    if not numbers:
        step = "SLURM_STEP_ID, " if name == "srun" else ""
        raise ValueError(f"AADL_LAUNCHER={name} needs {step}{launcher.rank} and {launcher.size}, which are not set")
    alone = numbers[1] == 1
    ranks = Ranks(
        numbers[0],
        numbers[1],
        first(env, launcher.local_rank, 0, 0 if alone or name == "srun" else None),
        launcher=name,
        local_size=first(env, launcher.local_size, 1, 1 if alone and name in OF_MPI else 0),
        node_rank=first(env, launcher.node, 0, -1),
        step_id=env.get("PMIX_NAMESPACE", "") if name in OF_MPI else "",
    )
    if name == "srun":
        return _with_step(ranks, env)
    if name in ("torchrun", "env"):
        return replace(
            ranks,
            launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "env",
            master_address=env["MASTER_ADDR"],
            master_port=port_of(env, "MASTER_PORT"),
            restart_count=first(env, ("TORCHELASTIC_RESTART_COUNT",), 0, 0),
            job_id=env.get("TORCHELASTIC_RUN_ID", ""),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    return ranks


def _with_given(env: Mapping[str, str]) -> Mapping[str, str]:
    """Returns the variables of torchrun, all of which must be there; LOCAL_RANK may come from another launcher."""
    missing = [name for name in GIVEN if name not in env]
    if missing == ["LOCAL_RANK"]:
        names = [name for key in OF_MPI for name in LAUNCHERS[key].local_rank]
        names = [*(["SLURM_LOCALID"] if _is_step(env) else []), *names]
        local = next((env[name] for name in names if name in env), None)
        if local is not None:
            return {**env, "LOCAL_RANK": local}
    if missing:
        given = [name for name in ("RANK", "WORLD_SIZE") if name in env]
        launcher = next((name for name in ("srun", *OF_MPI) if _numbers(name, env)), "")
        cure = (
            f"unset {' and '.join(given)}, because {launcher} gives each process its numbers"
            if launcher
            else f"torchrun sets all of {', '.join(GIVEN)}: start with torchrun, or unset them for a single process"
        )
        lack = f"variable {missing[0]} is" if len(missing) == 1 else f"variables {', '.join(missing)} are"
        although = f" although {' and '.join(given)} {'is' if len(given) == 1 else 'are'} set" if given else ""
        raise ValueError(f"environment {lack} missing{although}; {cure}")
    if not env["MASTER_ADDR"]:
        raise ValueError("MASTER_ADDR must name the host of rank 0, got an empty text")
    return env


def _with_step(ranks: Ranks, env: Mapping[str, str]) -> Ranks:
    """Adds what srun gives for a whole step: tasks on each node, and the expected host of each rank."""
    node, text = max(ranks.node_rank, 0), env.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = tasks_per_node(text, "SLURM_STEP_TASKS_PER_NODE")
    if counts and sum(counts) != ranks.world_size:
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE={text} counts {sum(counts)} tasks, but SLURM_STEP_NUM_TASKS={ranks.world_size}"
        )
    if counts and node >= len(counts):
        raise ValueError(f"SLURM_NODEID={node} must be below the {len(counts)} nodes of SLURM_STEP_TASKS_PER_NODE")
    local_size = counts[node] if counts else 0
    hosts = _slurm_hosts(env, counts, ranks.world_size)
    return replace(ranks, node_rank=node, local_size=local_size, step_id=env.get("SLURM_STEP_ID", ""), hosts=hosts)


def _slurm_hosts(env: Mapping[str, str], counts: Sequence[int], world_size: int) -> tuple[str, ...]:
    """Returns the expected host of each rank, for messages only, if tasks are distributed by blocks."""
    blocks = env.get("SLURM_DISTRIBUTION", "block").split(":")[0] == "block"
    try:
        nodes = expand_nodelist(env.get("SLURM_STEP_NODELIST", ""))
    except ValueError:
        return ()
    if not blocks or len(nodes) != len(counts):
        return (nodes[0],) * world_size if len(nodes) == 1 else ()
    return tuple(node for node, count in zip(nodes, counts, strict=True) for _ in range(count))


def _ask_mpi(name: str, env: Mapping[str, str], mpi: MpiNumbers | None) -> Ranks:
    from experiments.distributed.mpi import numbers_of_mpi  # here, because it needs the types of this module

    rank, world_size, local_rank, local_size = (mpi or numbers_of_mpi)()
    if name == "pmix" and env.get("PMIX_RANK", str(rank)) != str(rank):
        raise ValueError(
            f"PMIX_RANK={env['PMIX_RANK']} but MPI.COMM_WORLD has rank {rank} of {world_size}: mpi4py uses another MPI "
            "library than the launcher"
        )
    step = env.get("PMIX_NAMESPACE", "")
    return Ranks(rank, world_size, local_rank, launcher=name, local_size=local_size, node_rank=-1, step_id=step)


def _with_job(ranks: Ranks, env: Mapping[str, str]) -> Ranks:
    scheduler, job_id, job_restarts = "none", ranks.job_id, 0
    if "SLURM_JOB_ID" in env:
        scheduler, job_id = "slurm", env["SLURM_JOB_ID"]
        job_restarts = first(env, ("SLURM_RESTART_COUNT",), 0, 0)
    elif "LSB_JOBID" in env:
        element = env.get("LSB_JOBINDEX", "0")
        scheduler, job_id = "lsf", env["LSB_JOBID"] + ("" if element in ("", "0") else f"_{element}")
    elif "PBS_JOBID" in env:
        scheduler, job_id = "pbs", env["PBS_JOBID"]
    return replace(
        ranks,
        scheduler=scheduler,
        job_id=env.get("AADL_JOB_ID") or job_id,
        restart_count=first(env, ("AADL_RESTART_COUNT",), 0, ranks.restart_count + job_restarts),
        job_restarts=first(env, ("AADL_RESTART_COUNT",), 0, job_restarts),
        host=env.get("SLURMD_NODENAME", "") if scheduler == "slurm" else "",
    )


def _with_master(ranks: Ranks, env: Mapping[str, str]) -> Ranks:
    if ranks.world_size == 1 or ranks.launcher == "torchrun":  # one process needs none, and torchrun's is its agent's
        return ranks
    address = env.get("AADL_MASTER_ADDRESS") or ranks.master_address
    port = port_of(env, "AADL_MASTER_PORT") if "AADL_MASTER_PORT" in env else ranks.master_port
    return replace(ranks, master_address=address, master_port=port)


# --- what is refused


def _refuse_contradictions(name: str, ranks: Ranks, env: Mapping[str, str]) -> None:
    """Refuses numbers of other launchers that contradict the ranks, unless an outer launcher left them behind.

    An agent of torchrun or mpiexec is itself a task of another launcher. Open MPI and MVAPICH set no PMI variables, so
    those of a process that lacks the marks of MPICH's mpiexec were left by an outer srun. An outer srun of one task is
    an interactive shell, whose PMI_SIZE=1 says nothing about a step that was started in it.
    """
    if name in ("torchrun", "single", "pmix"):
        return
    own = LAUNCHERS[name]
    by_hydra = any(variable in env for variable in LAUNCHERS["mpich"].local_rank)
    for other, variables in LAUNCHERS.items():
        numbers = _numbers(other, env) if other not in ("torchrun", "env") else ()
        if other == name or not numbers or (name == "env" and numbers[1] == 1):
            continue
        if other == "srun" and name in MPI_LAUNCHERS and (ranks.world_size > 1 or numbers[1] == 1):
            continue
        if other == "mpich" and not by_hydra and (name in MPI_LAUNCHERS or numbers[1] == 1):
            continue
        for variable, value, mine, what in (
            (variables.rank, numbers[0], own.rank, ranks.rank),
            (variables.size, numbers[1], own.size, ranks.world_size),
        ):
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
    if name != "env" and env.get("WORLD_SIZE", str(ranks.world_size)).strip() != str(ranks.world_size):
        raise ValueError(
            f"WORLD_SIZE={env['WORLD_SIZE']} and {own.size}={ranks.world_size} contradict each other: unset "
            f"WORLD_SIZE, because {name} counts the ranks"
        )
    shell = name == "srun" and ranks.world_size == 1
    if name in ("jsrun", "srun", "openmpi") and env.get("PMIX_RANK", str(ranks.rank)) != str(ranks.rank) and not shell:
        raise ValueError(
            f"{own.rank}={ranks.rank} and PMIX_RANK={env['PMIX_RANK']} contradict each other: unset the variables that "
            f"were inherited, or choose with AADL_LAUNCHER={name} or AADL_LAUNCHER=pmix"
        )


def _check(ranks: Ranks, own: Launcher) -> None:
    local = own.local_rank[0]
    if ranks.rank >= ranks.world_size:
        raise ValueError(f"{own.rank}={ranks.rank} must be below {own.size}={ranks.world_size}")
    if ranks.local_rank > ranks.rank:
        raise ValueError(f"{local}={ranks.local_rank} must not exceed {own.rank}={ranks.rank}")
    if ranks.local_size and ranks.local_rank >= ranks.local_size:
        raise ValueError(f"{local}={ranks.local_rank} must be below the {ranks.local_size} ranks of this node")
    if ranks.local_size > ranks.world_size:
        raise ValueError(f"the {ranks.local_size} ranks of this node must not exceed {own.size}={ranks.world_size}")
