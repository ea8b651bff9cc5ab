"""`summarize`: prints the tables of all results."""

from __future__ import annotations

import argparse

from experiments.catalog import experiment_of
from experiments.commands.showing import show_each
from experiments.records.compare import find_folders


def main(options: argparse.Namespace) -> int:
    """Prints the tables and writes them to summary.md; returns 2 where some results cannot be shown, else 0."""
    folders = find_folders(options.results, options.only)
    return show_each(options.results, folders, lambda folder, note: print(experiment_of(folder).table(folder, note)))
