"""Processes that become ranks as under a launcher: its variables, a log of their own, and what they are to do.

The processes come from a server that has imported torch already, so that each one starts within milliseconds.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from experiments.distributed.departure import end_on_failure, leave, stop_process_group
from experiments.distributed.devices import binding
from experiments.distributed.process_group import start_process_group
from experiments.distributed.ranks import ranks_from_environment
from experiments.settings.launch_settings import LaunchSettings

CONTEXT = multiprocessing.get_context("forkserver")
LAUNCHERS = ("SLURM", "OMPI", "PMI", "MPI_", "JSM", "LSB", "TORCH", "AADL", "MASTER", "NCCL", "GLOO", "MV2", "PRTE")


def clean_environment():
    """The environment of this process without the variables of any launcher, one thread a process."""
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS) and key not in alone}
    return kept | {"OMP_NUM_THREADS": "1"}


def srun_variables(rank, world_size, *, job=7, step=0, nodes="node[01-99]", layout=None):
    """What a task of srun gets; `layout` has the number of tasks by node, one node if None."""
    layout = layout or [world_size]
    node = next(index for index in range(len(layout)) if rank < sum(layout[: index + 1]))
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": str(step),
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_LOCALID": str(rank - sum(layout[:node])),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, layout)),
        "SLURM_STEP_NODELIST": nodes,
    }


def start(function, variables, log, *args):
    """A process with these variables of its launcher that calls function(*args), with its output in the file `log`."""
    start_server("launched")
    process = CONTEXT.Process(target=_run, args=(function, variables, str(log), args))
    process.start()
    return process


@cache
def start_server(*modules):
    """The server that processes are forked from, with modules imported; it finds them by PYTHONPATH alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    CONTEXT.set_forkserver_preload([*modules])
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def finish(processes, seconds=300):
    """The exit codes; a process that does not end in time is killed, as its code shows."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _run(function, variables, log, args):
    environment = clean_environment()
    os.environ.clear()
    os.environ.update(environment | variables)
    begin(log)
    torch.set_num_threads(1)
    function(*args)


def begin(log):
    """Call first in a process of the server: it hears all signals, as a program does, and writes to the end of a file.

    The server may have been started while signals were blocked, which its processes inherit.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def job(folder, fail="", failing_rank=1, *, start_seconds=30.0, rendezvous="auto", groups=1):
    """Joins the ranks of the environment, adds up over them, and fails on one of them in the way asked for."""
    ranks = ranks_from_environment(os.environ)
    settings = LaunchSettings(start_seconds=start_seconds, rendezvous=rendezvous, collective_seconds=60)
    with end_on_failure(ranks):
        for _ in range(groups):
            start_process_group(ranks, settings, None if folder is None else Path(folder))
            try:
                total = torch.tensor([float(ranks.rank)])
                dist.all_reduce(total)
                assert total.item() == ranks.world_size * (ranks.world_size - 1) / 2
                if ranks.rank == failing_rank:
                    _fail(fail, ranks)
                elif fail in ("alone", "killed alone"):
                    time.sleep(300)  # far from any collective
                if fail and fail != "afterwards":
                    dist.all_reduce(total)
            finally:
                stop_process_group(ranks)
        if fail == "afterwards" and ranks.rank == failing_rank:
            raise KeyError("no such thing")
    # One write each: the lines of several ranks on one pipe would mix.
    sys.stdout.write(f"rank {ranks.rank} of {ranks.world_size} by {ranks.launcher} summed\n")
    leave(0)


def _fail(how, ranks):
    if how in ("raises", "alone"):
        raise KeyError("no such thing")
    if how == "mistake":
        raise ValueError("the batch has 3 rows")
    if how in ("killed", "killed alone"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "first attempt" and ranks.restart_count == 0:
        raise KeyError("the first attempt fails")


def work_after_the_group(folder):
    """Rank 0 has something left to write when the others leave; two process groups before that."""
    ranks = ranks_from_environment(os.environ)
    for _ in range(2):
        start_process_group(ranks, LaunchSettings(start_seconds=30.0), Path(folder))
        dist.barrier()
        stop_process_group(ranks)
    if ranks.rank == 0:
        time.sleep(1.0)
        (Path(folder) / "written").write_text("")
    leave(75)


def gather_binding(folder):
    """Writes the binding of all ranks as each rank sees it."""
    ranks = ranks_from_environment(os.environ)
    start_process_group(ranks, LaunchSettings(start_seconds=30.0), Path(folder))
    places = binding(ranks)
    (Path(folder) / f"binding-{ranks.rank}").write_text(repr(places))
    stop_process_group(ranks)
    leave(0)


if __name__ == "__main__":
    job(sys.argv[1] or None, *sys.argv[2:3], rendezvous=sys.argv[3] if len(sys.argv) > 3 else "auto")
