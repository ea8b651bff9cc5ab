"""Which runs a configuration has, and which of them are to be made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from experiments.distributed.devices import describe_device
from experiments.distributed.ranks import Ranks
from experiments.records.provenance import git_state
from experiments.records.reading import read_run, say
from experiments.records.status import run_folder, run_path, state_of
from experiments.records.writing import note_place, probe_folder
from experiments.runs.config import expand_runs
from experiments.runs.session import check_checkpoints
from experiments.settings.run_config import ExperimentConfig, RunConfig
from experiments.training.components import needs_residuals
from experiments.training.problem import Description

MADE = {
    "unfinished": "stopped on the way and taken up again",
    "damaged": "made again, because the record is damaged or incomplete",
    "changed": "made again, because the record has other settings, other data or another number of ranks",
}
"""What is said of the runs in a state, before their number."""


def runs_to_make(
    config: ExperimentConfig, ranks: Ranks, results: Path, left_out: Sequence[str], *, from_start: bool
) -> tuple[list[RunConfig], list[RunConfig]]:
    """All runs but those of the variants left out, and those of them to be made; says why, and on which device.

    Raises:
        ValueError: the data is not as it must be, or the checkpoints of a run belong to another one.
        OSError: the data or a record cannot be read, or nothing can be written to the folder of the results.
    """
    if left_out:
        say(f"left out on {ranks.world_size} ranks, because they run in a single process: {', '.join(left_out)}")
    runs, descriptions = described_runs(config, left_out)
    probe_folder(results / config.experiment / config.scale)
    pending = runs if from_start else _unfinished(runs, results, descriptions, ranks, config.save.parts)
    source = config.kind.describe(config.problem).source
    data_text = f"data: {source}" + (" (no CSV file found)" if source == "surrogate" else "")
    say(f"{config.experiment}/{config.scale}: {len(pending)} of {len(runs)} runs to do, {data_text}")
    say(describe_device(ranks))
    for note in dict.fromkeys(description.note for description in descriptions.values() if description.note):
        say(note)
    return runs, pending


def single_process_variants(config: ExperimentConfig) -> list[str]:
    """The variants whose optimizer needs all residuals, and so a single process; ValueError if all do."""
    names = []
    for name, variant in config.variants.items():
        stages = [variant.optimizer, *([variant.then.optimizer] if variant.then is not None else [])]
        if any(needs_residuals(stage.name) for stage in stages):
            names.append(name)
    if len(names) == len(config.variants):
        raise ValueError(f"{', '.join(names)}: the optimizer runs in a single process, not on several ranks")
    return names


def described_runs(
    config: ExperimentConfig, left_out: Collection[str] = ()
) -> tuple[list[RunConfig], dict[str, Description]]:
    """All runs but those of some variants, and what is known of their data, by the text of their problem."""
    described: Description = config.kind.describe(config.problem)
    runs = [run for run in expand_runs(config, num_rows=described.num_rows) if run.variant_name not in left_out]
    problems = {repr(run.problem): run.problem for run in runs}  # variants may have problems of their own
    return runs, {key: config.kind.describe(problem) for key, problem in problems.items()}


def states_of_runs(
    runs: Sequence[RunConfig],
    results: Path,
    descriptions: Mapping[str, Description],
    world_size: int,
    parts: Collection[str],
) -> list[str]:
    return [
        state_of(run_path(results, run), run, descriptions[repr(run.problem)].digest, world_size, parts) for run in runs
    ]


def _unfinished(
    runs: Sequence[RunConfig],
    results: Path,
    descriptions: Mapping[str, Description],
    ranks: Ranks,
    parts: Collection[str],
) -> list[RunConfig]:
    """The runs that are not finished; says what is reused and what is made again, and why."""
    states = states_of_runs(runs, results, descriptions, ranks.world_size, parts)
    finished = [run for run, state in zip(runs, states, strict=True) if state == "finished"]
    for run, state in zip(runs, states, strict=True):
        if state == "unfinished":
            digest = descriptions[repr(run.problem)].digest
            check_checkpoints(run_folder(run_path(results, run)), run, digest, ranks)
    counts = Counter(states)
    lack = {"without parts": f"made again, because the record has no {' or no '.join(parts)} (save)"}
    for state, text in (MADE | lack).items():
        if counts[state]:
            say(f"{text}: {counts[state]}")
    for run in finished:
        try:
            note_place(run_path(results, run), run)
        except OSError as error:  # it may belong to a colleague; the numbers are the same
            say(f"warning: the label in a finished record cannot be brought up to date: {error}")
    if finished:
        commit, dirty = git_state()
        commits = [read_run(run_path(results, run)).attributes["git_commit"] for run in finished]
        other = len(finished) if dirty else len(finished) - commits.count(commit)
        note = f", of these by other or uncommitted code: {other} (--force makes them again)" if other else ""
        say(f"finished already: {len(finished)}{note}")
    return [run for run, state in zip(runs, states, strict=True) if state != "finished"]
