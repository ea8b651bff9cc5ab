"""From configurations to records: one run, and the list of all runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from experiments.distributed.departure import Interrupted, stop_process_group
from experiments.distributed.devices import binding, describe_device, device_of
from experiments.distributed.interruption import Interruption
from experiments.distributed.launch import start_process_group
from experiments.distributed.ranks import Ranks
from experiments.distributed.together import by_first, check_same
from experiments.records.provenance import git_state
from experiments.records.reading import read_run
from experiments.records.status import is_finished, run_folder, run_path, tensorboard_folder
from experiments.records.tensorboard import TensorBoard
from experiments.records.writing import note_place, probe_folder, write_run
from experiments.runs.closing import closing_lines
from experiments.runs.lock import FolderInUse
from experiments.runs.pool import execute_at_a_time
from experiments.runs.progress import RunsBar
from experiments.runs.session import OtherRun, RunSession, check_checkpoints
from experiments.runs.states import described_runs, states_of_runs
from experiments.settings.launch_settings import LaunchSettings
from experiments.settings.run_config import ExperimentConfig, RunConfig, SaveConfig
from experiments.training.components import needs_residuals
from experiments.training.problem import Description, Problem
from experiments.training.progress import reported_to
from experiments.training.result import Result
from experiments.training.stage import make_stages
from experiments.training.train import train


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
    """Builds, accelerates, trains and records one run; goes on where it was stopped.

    Args:
        config: the run.
        ranks: this process; rank 0 writes the record.
        results: folder of all results.
        save: what is saved of it, and when; None for the defaults.
        interruption: whether to stop; None for signals and the time limit of the environment, during this run.
        from_start: whether to remove its checkpoints first.
        timeout_seconds: how long the ranks wait for each other.
        show_progress: progress by epoch.

    Returns:
        The record's path.

    Raises:
        Interrupted: the run had to stop, and is saved.
        OSError: another job makes this very run.
        OtherRun: its checkpoints are of a run with other settings or data.
        RuntimeError: training or recording failed; the cause is attached.
    """
    if interruption is None:
        with Interruption() as own:
            return execute_run(
                config,
                ranks,
                results,
                save=save,
                interruption=own,
                from_start=from_start,
                timeout_seconds=timeout_seconds,
                show_progress=show_progress,
            )
    save = save or SaveConfig()
    path = run_path(results, config)
    torch.set_num_threads(config.kind.num_threads(config.training))
    problem: Problem = config.kind.build(config, ranks)
    variant = config.variant

    places = binding(ranks) if ranks.world_size > 1 else []
    board = TensorBoard(tensorboard_folder(path), enabled=save.tensorboard and ranks.rank == 0)

    def write(result: Result, complete: bool = False) -> None:
        if not complete and is_finished(path, config, problem.data_digest, ranks.world_size):
            return  # made again, by --force or for its weights: the old record is worth more than a part of the new one
        now, restarts = datetime.now(timezone.utc), session.num_restores
        more = {"complete": complete, "restart_count": restarts, "places": places}
        write_run(path, config, problem, result, ranks, session.start, now, **more)  # type: ignore[arg-type]

    try:
        _check_data(problem, ranks, timeout_seconds)
        session = RunSession(
            run_folder(path),
            config,
            ranks,
            problem.data_digest,
            save,
            interruption,
            write,
            from_start=from_start,
            timeout_seconds=timeout_seconds,
        )
        with session:
            result = train(
                problem,
                make_stages(problem, variant),
                ranks,
                ema_decay=variant.ema_decay,
                mean_epochs=variant.mean_epochs,
                session=session,
                show_progress=show_progress and ranks.rank == 0,
                save_weights=save.weights,
                trace_attempts=save.attempts,
                watch=board,
            )
            if ranks.rank == 0:
                session.check_lock()
                write(result, complete=True)
    except (Interrupted, FolderInUse, OtherRun, OtherData):
        raise
    except Exception as error:
        reason = " ".join(str(error).partition("Traceback (most recent call last)")[0].split())  # of a data loader
        raise RuntimeError(f"run {config.name}, seed {config.seed} failed: {type(error).__name__}: {reason}") from error
    finally:
        problem.close()
        board.close()
    return path


class OtherData(ValueError):
    """The ranks see different data."""


def _check_data(problem: Problem, ranks: Ranks, seconds: float) -> None:
    """Nodes may see other files, or an environment without AADL_DATA_DIR: the ranks would train on different data."""
    try:
        check_same(ranks, f"{problem.data_source} ({problem.data_digest})", "the data", seconds)
    except ValueError as error:
        raise OtherData(str(error)) from None


def execute_experiment(
    config: ExperimentConfig,
    ranks: Ranks,
    results: Path,
    *,
    num_jobs: int,
    force: bool = False,
    interruption: Interruption | None = None,
) -> int:
    """Makes every run of an experiment that is not finished yet.

    With one rank the runs go to `num_jobs` worker processes of one thread each; with several ranks they follow each
    other and every rank takes part in each.

    Args:
        config: the experiment.
        ranks: this process.
        results: folder of all results.
        num_jobs: worker processes, >= 1.
        force: makes finished runs again.
        interruption: whether to stop; None for signals and the time limit of the environment, from now on.

    Returns:
        The number of runs made.

    Raises:
        ValueError: the data is not as it must be.
        OSError: a file cannot be read or written; a folder is tried before any training.
        Interrupted: a run had to stop, and is saved.
        RuntimeError: a run failed.
    """
    if interruption is None:
        with Interruption() as own:
            return execute_experiment(config, ranks, results, num_jobs=num_jobs, force=force, interruption=own)
    left_out = single_process_variants(config) if ranks.world_size > 1 else []
    from_start = force and ranks.restart_count == 0
    if force and not from_start:
        _say("--force counted for the first start of this job: now its runs go on")
    start_process_group(ranks, config.launch, results)
    try:
        seconds = config.kind.data_seconds(config.problem) or config.launch.collective_seconds
        runs, pending = by_first(
            ranks, lambda: _plan(config, ranks, results, from_start, left_out), "reading the data", seconds
        )
        if ranks.world_size > 1 or num_jobs == 1 or len(pending) <= 1 or _shares_a_device(config):
            _execute_in_turn(pending, ranks, results, config, from_start, interruption)
        else:
            threads = max(config.kind.num_threads(run.training) for run in pending)
            execute = partial(execute_run, ranks=ranks, results=results, save=config.save, from_start=from_start)
            execute_at_a_time(execute, pending, min(max(1, num_jobs // threads), len(pending)), interruption)
    finally:
        stop_process_group(ranks)
    if ranks.rank == 0 and runs:
        for line in closing_lines(config.kind, [read_run(run_path(results, run)) for run in runs], results):
            _say(line)
    return len(pending)


def _plan(
    config: ExperimentConfig, ranks: Ranks, results: Path, from_start: bool, left_out: list[str]
) -> tuple[list[RunConfig], list[RunConfig]]:
    """All runs but those of some variants, and those to make; says what is known of them."""
    runs, descriptions = described_runs(config, left_out)
    if left_out:
        _say(f"left out on {ranks.world_size} ranks, because they run in a single process: {', '.join(left_out)}")
    probe_folder(results / config.experiment / config.scale)
    pending = _pending(runs, results, descriptions, ranks, force=from_start, parts=config.save.parts)
    source = config.kind.describe(config.problem).source
    data_text = f"data: {source}" + (" (no CSV file found)" if source == "surrogate" else "")
    _say(f"{config.experiment}/{config.scale}: {len(pending)} of {len(runs)} runs to do, {data_text}")
    _say(describe_device(ranks))
    for note in dict.fromkeys(description.note for description in descriptions.values() if description.note):
        _say(note)
    return runs, pending


def _shares_a_device(config: ExperimentConfig) -> bool:
    """Whether runs in parallel would share a GPU, or a machine of which each uses all."""
    return torch.cuda.is_available() or bool(config.kind.runs_in_turn)


def single_process_variants(config: ExperimentConfig) -> list[str]:
    """The variants whose optimizer needs all residuals, and so a single process.

    Raises:
        ValueError: there are no others.
    """
    names = []
    for name, variant in config.variants.items():
        stages = [variant.optimizer, *([variant.then.optimizer] if variant.then is not None else [])]
        if any(needs_residuals(stage.name) for stage in stages):
            names.append(name)
    if len(names) == len(config.variants):
        raise ValueError(f"{', '.join(names)}: the optimizer runs in a single process, not on several ranks")
    return names


def _execute_in_turn(
    pending: list[RunConfig],
    ranks: Ranks,
    results: Path,
    config: ExperimentConfig,
    from_start: bool,
    interruption: Interruption,
) -> None:
    """One run after the other, in this process."""
    has_own_bar = len(pending) == 1 or config.kind.runs_in_turn
    with RunsBar(len(pending), enabled=ranks.rank == 0 and not has_own_bar) as bar:
        for number, run in enumerate(pending):
            if _is_told_to_stop(interruption, ranks):
                reason = interruption.reason or "a signal to another rank"
                raise Interrupted(f"stopped by {reason} before run {run.name}, seed {run.seed}")
            if has_own_bar and ranks.rank == 0 and len(pending) > 1:
                _say(f"run {number + 1} of {len(pending)}: {run.name}, seed {run.seed}")
            with reported_to(partial(bar.report, number)):
                execute_run(
                    run,
                    ranks,
                    results,
                    save=config.save,
                    interruption=interruption,
                    from_start=from_start,
                    timeout_seconds=config.launch.collective_seconds,
                    show_progress=has_own_bar,
                )
            bar.finish(number)


def _is_told_to_stop(interruption: Interruption, ranks: Ranks) -> bool:
    """Whether any rank shall stop; all ranks ask together, between two runs."""
    stops = torch.tensor(float(bool(interruption.reason)), device=device_of(ranks))
    if ranks.world_size > 1:
        dist.all_reduce(stops, dist.ReduceOp.MAX)
    return bool(stops)


def _pending(
    runs: list[RunConfig],
    results: Path,
    descriptions: Mapping[str, Description],
    ranks: Ranks,
    *,
    force: bool,
    parts: Collection[str],
) -> list[RunConfig]:
    """The runs to make; says what is reused and what is made again, and why."""
    if force:
        return runs
    found = states_of_runs(runs, results, descriptions, ranks.world_size, parts)
    states = {id(run): state for run, state in zip(runs, found, strict=True)}
    counts = Counter(states.values())
    for run in runs:
        if states[id(run)] == "unfinished":
            digest = descriptions[repr(run.problem)].digest
            check_checkpoints(run_folder(run_path(results, run)), run, digest, ranks)
    if counts["unfinished"]:
        _say(f"{counts['unfinished']} runs were stopped on the way: they are taken up again")
    if counts["damaged"]:
        _say(f"{counts['damaged']} records are damaged or incomplete: these runs are made again")
    if counts["changed"]:
        _say(
            f"{counts['changed']} records have other settings, other data or another number of ranks: "
            "these runs are made again"
        )
    for run in runs:
        if states[id(run)] == "finished":
            try:
                note_place(run_path(results, run), run)
            except OSError as error:  # it may belong to a colleague; the numbers are the same
                _say(f"warning: the label in a finished record cannot be brought up to date: {error}")
    if counts["without parts"]:
        _say(f"{counts['without parts']} records have no {' or no '.join(parts)} (save): these runs are made again")
    if counts["finished"]:
        commit, dirty = git_state()
        same = sum(
            read_run(run_path(results, run)).attributes["git_commit"] == commit and not dirty
            for run in runs
            if states[id(run)] == "finished"
        )
        other = counts["finished"] - same
        note = f", {other} of them by other or uncommitted code (--force makes them again)" if other else ""
        _say(f"{counts['finished']} runs are finished already{note}")
    return [run for run in runs if states[id(run)] != "finished"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
