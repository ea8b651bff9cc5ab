"""`run --dry-run`: what would run, and what is finished. It makes no run and changes no file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from experiments.distributed.ranks import ranks_from_environment
from experiments.distributed.rendezvous import spans
from experiments.records.text_table import text_table
from experiments.runs.runs_to_make import described_runs, single_process_variants, states_of_runs
from experiments.settings.run_config import ExperimentConfig

MEANING = {
    "finished": "finished: left as it is",
    "finished again": "finished: made again by --force",
    "unfinished": "stopped on the way: goes on from its checkpoint",
    "missing": "not made yet",
    "changed": "other settings, data or number of ranks: made again",
    "damaged": "damaged or without an end: made again",
    "without parts": "the record has not all of what `save` asks for ({parts}): made again",
}


def show(config: ExperimentConfig, options: argparse.Namespace) -> int:
    """Prints a table of the runs and returns 0; errors are those of `described_runs`."""
    ranks = ranks_from_environment(os.environ)
    world_size = config.num_ranks if ranks.launcher == "single process" else ranks.world_size
    if ranks.rank == 0:
        print("\n".join(_lines(config, options.results, world_size, options.force)))
    return 0


def _lines(config: ExperimentConfig, results: Path, world_size: int, force: bool) -> list[str]:
    left_out = single_process_variants(config) if world_size > 1 else []
    runs, descriptions = described_runs(config, left_out)
    states = states_of_runs(runs, results, descriptions, world_size, config.save.parts)
    if force:
        states = ["finished again" if state == "finished" else state for state in states]
    groups: dict[tuple[str, str], list[int]] = {}
    for run, state in zip(runs, states, strict=True):
        groups.setdefault((run.name, state), []).append(run.seed)
    rows = [
        (name, spans(sorted(seeds)), MEANING[state].format(parts=" and ".join(config.save.parts)))
        for (name, state), seeds in groups.items()
    ]
    num_finished = states.count("finished")
    sources = ", ".join(dict.fromkeys(description.source for description in descriptions.values()))
    lines = [
        f"{config.experiment}/{config.scale}: {len(runs) - num_finished} of {len(runs)} runs to do on "
        f"{world_size} rank{'s' if world_size > 1 else ''}, data: {sources}, results: "
        f"{results / config.experiment / config.scale}",
        *text_table(("run", "seeds", "state"), rows),
    ]
    if left_out:
        lines.append(f"left out on {world_size} ranks, because they run in a single process: {', '.join(left_out)}")
    if config.expected_minutes and num_finished < len(runs):
        lines.append(f"all runs of the file take about {config.expected_minutes:g} minutes on two cores")
    return lines
