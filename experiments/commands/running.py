"""What `run` and `reproduce` share: a configuration is executed in this process, or on the ranks that it asks for."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from data_loaders.workers import num_cores
from experiments.distributed.departure import Interrupted, end_on_failure
from experiments.distributed.devices import with_device
from experiments.distributed.interruption import EXIT_RESUME, STOPPED_FILE, Interruption, write_stopped_file
from experiments.distributed.ranks import Ranks
from experiments.records.reading import say
from experiments.runs.execute import execute_experiment
from experiments.settings.run_config import ExperimentConfig


def resumable(command: Callable[[], int | None]) -> int:
    """Runs a command; where a signal or a time limit stops it, says so and returns the exit code that asks for more."""
    try:
        return command() or 0
    except Interrupted as error:
        if error.is_said_here:
            print(f"{error}: the same command goes on", file=sys.stderr)
        return EXIT_RESUME


def execute(
    path: Path, config: ExperimentConfig, ranks: Ranks, options: argparse.Namespace, notes: Sequence[str] = ()
) -> None:
    """Makes the runs of a configuration; torchrun starts the ranks that it asks for, unless a launcher has done so.

    Rank 0 prints the notes.
    """
    if config.num_ranks == 1 or ranks.launcher != "single process":
        for note in notes if ranks.rank == 0 else ():
            say(note)
        execute_here(config, ranks, options)
    else:
        _execute_by_torchrun(path, config, options)


def execute_here(config: ExperimentConfig, ranks: Ranks, options: argparse.Namespace) -> None:
    """Makes the runs in this process and its like; a rank that fails ends the others."""
    interrupted: Interrupted | None = None
    # From now on a signal ends in exit code 75, also while the ranks meet and the data is read.
    with end_on_failure(ranks), Interruption() as interruption:
        ranks = with_device(ranks, config.launch)
        how = {"num_jobs": _num_jobs(options), "force": options.force, "interruption": interruption}
        try:
            execute_experiment(config, ranks, options.results, **how)
        except Interrupted as error:
            interrupted = error
    if interrupted is not None:
        interrupted.is_said_here = ranks.rank == 0
        if ranks.rank == 0:
            write_stopped_file()
        raise interrupted


def _num_jobs(options: argparse.Namespace) -> int:
    """The number of worker processes, by default one a core."""
    if options.jobs is None:
        return num_cores()
    if options.jobs < 1:
        raise ValueError(f"--jobs must be an integer >= 1, got {options.jobs}")
    return int(options.jobs)


def _execute_by_torchrun(path: Path, config: ExperimentConfig, options: argparse.Namespace) -> None:
    """Starts `run` on the ranks that the configuration asks for, and hands signals on to them."""
    arguments = ["run", str(path), "--results", str(options.results), *(["--force"] if options.force else [])]
    for text in getattr(options, "set", []):
        arguments += ["--set", text]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.num_ranks}"]
    with tempfile.TemporaryDirectory() as folder, Interruption() as interruption:
        stopped = Path(folder) / "stopped"  # torchrun itself has one exit code for everything
        environment = os.environ | {STOPPED_FILE: str(stopped)}
        with subprocess.Popen([*command, "-m", "experiments", *arguments], env=environment) as launcher:
            code, handed_on = None, False
            while code is None:
                try:
                    code = launcher.wait(timeout=1.0)
                except subprocess.TimeoutExpired:
                    if interruption.reason and not handed_on:
                        handed_on = True
                        launcher.terminate()  # torchrun passes it on, and the ranks save
                except BaseException:
                    launcher.terminate()
                    launcher.wait()
                    raise
        if stopped.exists():
            raise Interrupted(f"{config.experiment} was stopped on its {config.num_ranks} ranks")
    if code != 0:
        raise RuntimeError(f"{config.experiment} failed on {config.num_ranks} ranks, see above")
