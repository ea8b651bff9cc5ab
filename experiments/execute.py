"""From configurations to records: one run, and the list of all runs over worker processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import aadl
from experiments import collocation_problem, graduate_admissions
from experiments.checks import Component, accelerate, make_optimizer, needs_residuals
from experiments.config import ExperimentConfig, GraduateAdmissionsConfig, PinnTrainingConfig, RunConfig, expand_runs
from experiments.launch import Ranks, start_process_group, stop_process_group
from experiments.published import PublishedScheme
from experiments.record import git_state, note_place, read_run, run_path, state_of, write_run
from experiments.train import Description, Problem, Stage, progress, train


def describe(config: Any) -> Description:
    """What is known of the data of a problem before any run."""
    if isinstance(config, GraduateAdmissionsConfig):
        return graduate_admissions.describe(config)
    return collocation_problem.describe(config)


def build(config: RunConfig, ranks: Ranks) -> Problem:
    """The problem of a run."""
    if isinstance(config.problem, GraduateAdmissionsConfig):
        return graduate_admissions.build(config, ranks)
    return collocation_problem.build(config, ranks)


def execute_run(config: RunConfig, ranks: Ranks, results: Path, *, show_progress: bool = False) -> Path:
    """Builds, accelerates, trains and records one run.

    Args:
        config: the run.
        ranks: this process; rank 0 writes the record.
        results: folder of all results.
        show_progress: progress by epoch.

    Returns:
        The record's path.

    Raises:
        RuntimeError: training or recording failed; the cause is attached.
    """
    path = run_path(results, config)
    if isinstance(config.training, PinnTrainingConfig):
        torch.set_num_threads(config.training.num_threads)
    problem = build(config, ranks)
    start = datetime.now(timezone.utc)
    variant = config.variant
    try:
        first = _stage(problem, variant.optimizer, variant.acceleration, 0)
        if variant.published is not None:
            scheme = PublishedScheme(first.optimizer, variant.published)
            first = replace(first, statistics=lambda: scheme.statistics)
        then = None
        if variant.then is not None:
            then = _stage(problem, variant.then.optimizer, variant.then.acceleration, variant.then.after)
        result = train(
            problem,
            first.optimizer,
            config.training,
            ranks,
            ema_decay=variant.ema_decay,
            statistics=first.statistics,
            then=then,
            show_progress=show_progress and ranks.rank == 0,
        )
        if ranks.rank == 0:
            write_run(path, config, problem, result, ranks, start, datetime.now(timezone.utc))
    except Exception as error:
        raise RuntimeError(f"run {config.name}, seed {config.seed} failed: {type(error).__name__}: {error}") from error
    return path


def _stage(problem: Problem, optimizer: Component, acceleration: Mapping[str, Any] | None, after: int) -> Stage:
    """An optimizer of the problem, accelerated if so wanted."""
    made = make_optimizer(optimizer, problem.model.parameters())
    if acceleration is None:
        return Stage(made, after=after)
    accelerate(made, acceleration)
    accelerator = aadl.accelerator_of(made)
    return Stage(made, lambda: accelerator.statistics, after)


def execute_experiment(
    config: ExperimentConfig, ranks: Ranks, results: Path, *, num_jobs: int, force: bool = False
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

    Returns:
        The number of runs made.

    Raises:
        ValueError: the data is not as it must be.
        OSError: a file cannot be read or written; a folder that cannot is told before any training.
        RuntimeError: a run failed.
    """
    _check_single_process(config, ranks)
    described = describe(config.problem)
    runs = expand_runs(config, num_rows=described.num_rows)
    problems = {repr(run.problem): run.problem for run in runs}  # variants may have problems of their own
    descriptions = {key: describe(problem) for key, problem in problems.items()}
    if ranks.rank == 0:
        _probe(results / config.experiment / config.scale)
    start_process_group(ranks)
    try:
        torch.set_num_threads(1)  # the networks are small: threads cost more than they bring, and disturb the clock
        pending = _pending(runs, results, descriptions, ranks.world_size, force) if ranks.rank == 0 else []
        if ranks.world_size > 1:
            box = [pending]
            dist.broadcast_object_list(box, src=0)
            pending = box[0]
        if ranks.rank == 0:
            data_text = f"data: {described.source}" + (
                " (no CSV file found)" if described.source == "surrogate" else ""
            )
            _say(f"{config.experiment}/{config.scale}: {len(pending)} of {len(runs)} runs to do, {data_text}")
            for note in dict.fromkeys(description.note for description in descriptions.values() if description.note):
                _say(note)
        if ranks.world_size > 1 or num_jobs == 1 or len(pending) <= 1:
            alone = len(pending) == 1
            finished: Iterator[Any] = (execute_run(run, ranks, results, show_progress=alone) for run in pending)
            for _ in progress(finished, len(pending), "runs", ranks.rank == 0 and not alone):
                pass
        else:
            threads = max(getattr(run.training, "num_threads", 1) for run in pending)
            _execute_parallel(pending, ranks, results, max(1, num_jobs // threads))
    finally:
        stop_process_group(ranks)
    if ranks.rank == 0:
        _report_diverged(runs, results)
    return len(pending)


def _check_single_process(config: ExperimentConfig, ranks: Ranks) -> None:
    """Refuses, on several ranks, what runs in a single process.

    Raises:
        ValueError: a variant with the published scheme, or with an optimizer that needs all residuals.
    """
    if ranks.world_size == 1:
        return
    for name, variant in config.variants.items():
        stages = [variant.optimizer, *([variant.then.optimizer] if variant.then is not None else [])]
        single = [f"the optimizer {stage.name}" for stage in stages if needs_residuals(stage.name)]
        if variant.published is not None:
            single.append("the published scheme")
        if single:
            raise ValueError(
                f"variants.{name}: {single[0]} runs in a single process, not on {ranks.world_size} ranks: name the "
                "other variants with --set variants=..."
            )


def _probe(folder: Path) -> None:
    """Makes a folder of records and writes to it, so that a mistake shows before the training and not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"the results folder {folder} cannot be written: {error.strerror or error}") from None


def _start_worker() -> None:
    """One thread of torch, and one that ends the worker with its parent: a killed parent tells its workers nothing."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _execute_parallel(pending: list[RunConfig], ranks: Ranks, results: Path, num_jobs: int) -> None:
    # Workers inherit the environment before torch is imported in them; spawn, for a forked torch may hang.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(
        min(num_jobs, len(pending)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    ) as pool:
        futures = [pool.submit(execute_run, run, ranks, results) for run in pending]
        try:
            for future in progress(as_completed(futures), len(futures), "runs"):
                future.result()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):  # SIGTERM reaches this process alone, so it is passed on
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)  # wait=False would forget the cancelation on exit
            raise


def _pending(
    runs: list[RunConfig], results: Path, descriptions: Mapping[str, Description], world_size: int, force: bool
) -> list[RunConfig]:
    """The runs to make; says what is reused and what is made again, and why."""
    if force:
        return runs
    states = {
        id(run): state_of(run_path(results, run), run, descriptions[repr(run.problem)].digest, world_size)
        for run in runs
    }
    counts = Counter(states.values())
    if counts["unreadable"]:
        _say(f"{counts['unreadable']} records are unreadable or incomplete: these runs are made again")
    if counts["changed"]:
        _say(
            f"{counts['changed']} records have other settings, other data or another number of ranks: "
            "these runs are made again"
        )
    for run in runs:
        if states[id(run)] == "finished":
            note_place(run_path(results, run), run)
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


def _report_diverged(runs: list[RunConfig], results: Path) -> None:
    diverged: dict[str, list[str]] = {}
    for run in runs:
        record = read_run(run_path(results, run))
        if record.diverged:
            place = f" at iteration {record.diverged_iteration}" if record.diverged_iteration is not None else ""
            diverged.setdefault(run.name, []).append(f"seed {run.seed}{place}")
    if diverged:
        told = (f"{name} ({len(seeds)} seeds: {', '.join(seeds)})" for name, seeds in diverged.items())
        _say("diverged: " + ", ".join(told))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
