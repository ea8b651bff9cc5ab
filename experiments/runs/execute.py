"""From configurations to records: one run, and the list of all runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from experiments.distributed.departure import Interrupted, stop_process_group
from experiments.distributed.devices import binding
from experiments.distributed.interruption import OF_ANOTHER_RANK, Interruption
from experiments.distributed.process_group import start_process_group
from experiments.distributed.ranks import Ranks
from experiments.distributed.step_vote import StepVote
from experiments.distributed.together import by_first, check_same
from experiments.records.reading import read_run, say
from experiments.records.status import is_finished, run_folder, run_path, tensorboard_folder
from experiments.records.tensorboard import TensorBoard
from experiments.records.writing import write_run
from experiments.runs.closing import closing_lines
from experiments.runs.lock import FolderInUse
from experiments.runs.pool import execute_at_a_time
from experiments.runs.progress import RunsBar
from experiments.runs.runs_to_make import runs_to_make, single_process_variants
from experiments.runs.session import OtherRun, RunSession
from experiments.settings.launch_settings import LaunchSettings
from experiments.settings.run_config import ExperimentConfig, RunConfig, SaveConfig
from experiments.training.progress import reported_to
from experiments.training.result import Result
from experiments.training.stage import make_stages
from experiments.training.train import Training, train


def execute_run(
    config: RunConfig,
    ranks: Ranks,
    results: Path,
    *,
    save: SaveConfig | None = None,
    interruption: Interruption | None = None,
    from_start: bool = False,
    timeout_seconds: float = LaunchSettings().collective_seconds,
    show_progress: bool = False,
) -> Path:
    """Builds, accelerates, trains and records one run; goes on where it was stopped. Returns the record's path.

    Args:
        config: the run.
        ranks: this process; rank 0 writes the record.
        results: folder of all results.
        save: what is saved of it, and when.
        interruption: whether to stop; None for signals and the time limit of the environment, during this run.
        from_start: whether to remove its checkpoints first.
        timeout_seconds: how long the ranks wait for each other.
        show_progress: progress by epoch.

    Raises:
        Interrupted: the run had to stop, and is saved.
        OSError: another job makes this very run.
        ValueError: the ranks see different data.
        OtherRun: its checkpoints are of a run with other settings or data.
        RuntimeError: training or recording failed; the cause is attached.
    """
    save = save or SaveConfig()
    path = run_path(results, config)
    variant = config.variant
    torch.set_num_threads(config.kind.num_threads(config.training))
    with (
        warnings.catch_warnings(),
        _given_or_own(interruption) as stopper,
        closing(config.kind.build(config, ranks)) as problem,
    ):
        # The library's advice to its users; `idle_lines` names such variants once, when all runs are done.
        warnings.filterwarnings("ignore", "aadl has accepted no candidate")
        # Nodes may see other files, or an environment without AADL_DATA_DIR.
        check_same(ranks, f"{problem.data_source} ({problem.data_digest})", "the data", timeout_seconds)
        places = binding(ranks) if ranks.world_size > 1 else []

        def write(result: Result, complete: bool = False) -> None:
            if not complete and is_finished(path, config, problem.data_digest, ranks.world_size):
                return  # it is made again, and the old record is worth more than a part of the new one
            write_run(
                path,
                config,
                problem,
                result,
                ranks,
                session.start,
                datetime.now(timezone.utc),
                complete=complete,
                restart_count=session.num_restores,
                places=places,
            )

        session = RunSession(
            run_folder(path),
            config,
            ranks,
            problem.data_digest,
            save,
            stopper,
            write,
            from_start=from_start,
            timeout_seconds=timeout_seconds,
        )
        board = TensorBoard(tensorboard_folder(path), enabled=save.tensorboard and ranks.rank == 0)
        with closing(board), session, _failures_named(config):
            run = Training(
                problem,
                make_stages(problem, variant),
                ranks,
                ema_decay=variant.ema_decay,
                mean_epochs=variant.mean_epochs,
                show_progress=show_progress and ranks.rank == 0,
                trace_attempts=save.attempts,
                watch=board,
            )
            result = train(run, session, save_weights=save.weights)
            if ranks.rank == 0:
                session.check_lock()
                write(result, complete=True)
    return path


def _given_or_own(interruption: Interruption | None) -> AbstractContextManager[Interruption]:
    """The caller's interruption, which goes on after the block, or one for the block alone."""
    return Interruption() if interruption is None else nullcontext(interruption)


@contextmanager
def _failures_named(config: RunConfig) -> Iterator[None]:
    """Names the run that failed, except where the message does so."""
    try:
        yield
    except (Interrupted, FolderInUse, OtherRun):
        raise
    except Exception as error:
        reason = " ".join(str(error).partition("Traceback (most recent call last)")[0].split())  # of a data loader
        raise RuntimeError(f"run {config.name}, seed {config.seed} failed: {type(error).__name__}: {reason}") from error


def execute_experiment(
    config: ExperimentConfig,
    ranks: Ranks,
    results: Path,
    *,
    num_jobs: int,
    force: bool = False,
    interruption: Interruption | None = None,
) -> int:
    """Makes every run of an experiment that is not finished yet, or all with `force`; returns the number of runs made.

    With one rank the runs go to `num_jobs` worker processes of one thread each; with several ranks they follow each
    other and every rank takes part in each. None for `interruption` stands for signals and the time limit from now on.

    Raises:
        ValueError: the data is not as it must be.
        OSError: a file cannot be read or written; a folder is tried before any training.
        Interrupted: a run had to stop, and is saved.
        RuntimeError: a run failed.
    """
    from_start = force and ranks.restart_count == 0
    if force and not from_start:
        say("--force counted for the first start of this job: now its runs go on")
    left_out = single_process_variants(config) if ranks.world_size > 1 else []
    with _given_or_own(interruption) as stopper:
        start_process_group(ranks, config.launch, results)
        try:
            seconds = config.kind.data_seconds(config.problem) or config.launch.collective_seconds
            plan = partial(runs_to_make, config, ranks, results, left_out, from_start=from_start)
            runs, pending = by_first(ranks, plan, "reading the data", seconds)
            execute = partial(execute_run, ranks=ranks, results=results, save=config.save, from_start=from_start)
            # Runs in parallel would share a GPU, or a machine of which each uses all.
            shares_a_device = torch.cuda.is_available() or config.kind.runs_in_turn
            if ranks.world_size > 1 or num_jobs == 1 or len(pending) <= 1 or shares_a_device:
                execute = partial(execute, timeout_seconds=config.launch.collective_seconds)
                _execute_in_turn(execute, pending, ranks, config, stopper)
            else:
                threads = max(config.kind.num_threads(run.training) for run in pending)
                execute_at_a_time(execute, pending, min(max(1, num_jobs // threads), len(pending)), stopper)
        finally:
            stop_process_group(ranks)
    if ranks.rank == 0 and runs:
        for line in closing_lines(config.kind, [read_run(run_path(results, run)) for run in runs], results):
            say(line)
    return len(pending)


def _execute_in_turn(
    execute: partial[Path],
    pending: Sequence[RunConfig],
    ranks: Ranks,
    config: ExperimentConfig,
    interruption: Interruption,
) -> None:
    vote = StepVote(ranks, timeout_seconds=config.launch.collective_seconds)
    has_own_bar = len(pending) == 1 or config.kind.runs_in_turn
    with RunsBar(len(pending), enabled=ranks.rank == 0 and not has_own_bar) as bar:
        for number, run in enumerate(pending):
            if vote.vote_now(number, bool(interruption.reason), True).stop:
                reason = interruption.reason or OF_ANOTHER_RANK
                raise Interrupted(f"stopped by {reason} before run {run.name}, seed {run.seed}")
            if has_own_bar and ranks.rank == 0 and len(pending) > 1:
                say(f"run {number + 1} of {len(pending)}: {run.name}, seed {run.seed}")
            with reported_to(partial(bar.report, number)):
                execute(run, interruption=interruption, show_progress=has_own_bar)
            bar.finish(number)
