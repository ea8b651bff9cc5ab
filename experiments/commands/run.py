"""`run`: makes the runs of one configuration."""

from __future__ import annotations

import argparse
import os

from experiments.catalog import load_config
from experiments.commands import dry_run
from experiments.commands.running import execute, resumable
from experiments.distributed.ranks import ranks_from_environment
from experiments.records.reading import say
from experiments.runs.config import complete_settings
from experiments.settings.config_files import find_config
from experiments.settings.overrides import read_overridden
from experiments.settings.yaml_file import to_yaml


def main(options: argparse.Namespace) -> int:
    """Makes the runs that are not finished yet, or prints what they would be; returns 0, or 75 after a signal."""
    path = find_config(options.config)
    notes: list[str] = []
    config = load_config(path, options.set, notes.append)
    if not (options.dry_run or options.print_config):
        return resumable(lambda: execute(path, config, ranks_from_environment(os.environ), options, notes))
    for line in notes:
        say(line)
    if options.dry_run:
        return dry_run.show(config, options)
    print(to_yaml(complete_settings(config, *read_overridden(path, options.set))), end="")
    return 0
