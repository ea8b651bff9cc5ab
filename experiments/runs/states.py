"""The runs of a configuration and their states, without a change of any file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from experiments.records.status import run_path, state_of
from experiments.runs.config import expand_runs
from experiments.settings.run_config import ExperimentConfig, RunConfig
from experiments.training.problem import Description


def described_runs(
    config: ExperimentConfig, left_out: Collection[str] = ()
) -> tuple[list[RunConfig], dict[str, Description]]:
    """All runs but those of some variants, and what is known of their data, by the text of their problem.

    Raises:
        ValueError: the data is not as it must be.
        OSError: the data cannot be read.
    """
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
    """The state of each run, see `experiments.records.status.state_of`."""
    return [
        state_of(run_path(results, run), run, descriptions[repr(run.problem)].digest, world_size, parts) for run in runs
    ]
