"""`reproduce`: makes all laptop configurations, with their figures and tables."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from experiments.catalog import experiment_of, load_config
from experiments.commands.running import execute, resumable
from experiments.commands.showing import show_each
from experiments.distributed.ranks import ranks_from_environment
from experiments.records.reading import say
from experiments.settings.config_files import LAPTOP, config_files
from experiments.settings.run_config import ExperimentConfig
from experiments.settings.suggestion import did_you_mean
from experiments.training.progress import duration


def main(options: argparse.Namespace) -> int:
    """Makes runs, draws figures and prints tables; returns 2 where some cannot be shown, 75 after a signal, else 0."""
    only = options.only or os.environ.get("ONLY") or None
    paths = {path.parent.name: path for path in config_files().values() if path.stem == LAPTOP}
    if only is not None and only not in paths:
        raise ValueError(f"--only must be one of {', '.join(paths)}, got {only!r}{did_you_mean(only, paths)}")
    chosen = [(path, load_config(path)) for name, path in paths.items() if only in (None, name)]
    return resumable(lambda: _reproduce(chosen, options))


def _reproduce(chosen: list[tuple[Path, ExperimentConfig]], options: argparse.Namespace) -> int:
    configs = [config for _, config in chosen]
    ranks = ranks_from_environment(os.environ)
    if ranks.rank == 0:
        say("This will run:")
        for config in configs:
            minutes = f", about {config.expected_minutes:g} minutes on two cores" if config.expected_minutes else ""
            say(f"  {config.experiment}: {len(config.variants)} variants, {len(config.seeds)} seeds{minutes}")
    start = time.perf_counter()
    for number, (path, config) in enumerate(chosen, 1):
        execute(path, config, ranks, options)
        expected = [config.expected_minutes or 0.0 for config in configs]
        if ranks.rank == 0 and number < len(chosen):
            seconds = time.perf_counter() - start
            # The expected minutes are those of another machine, so the time until now says how fast this one is.
            made, left = sum(expected[:number]), sum(expected[number:])
            more = f", about {duration(seconds * left / made)} left" if made and all(expected) else ""
            say(f"{number} of {len(chosen)} experiments, {duration(seconds)}{more}")
    if ranks.rank != 0:
        return 0

    def show(folder: Path, note: Callable[[str], None]) -> None:
        for path in experiment_of(folder).draw(folder, note):
            print(path)
        print(experiment_of(folder).table(folder, note))

    folders = (options.results / config.experiment / config.scale for config in configs)
    code = show_each(options.results, folders, show)
    say(f"{time.perf_counter() - start:.0f} s in all")
    return code
