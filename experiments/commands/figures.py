"""`figures`: draws the figures of all results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from experiments.catalog import experiment_of
from experiments.commands.showing import show_each
from experiments.records.compare import find_folders

DOCS_FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def main(options: argparse.Namespace) -> int:
    """Draws the figures and prints their paths; returns 2 where some results cannot be shown, else 0."""

    def show(folder: Path, note: Callable[[str], None]) -> None:
        for path in experiment_of(folder).draw(folder, note):
            print(path)
            if options.docs:
                DOCS_FIGURES.mkdir(parents=True, exist_ok=True)
                copy = DOCS_FIGURES / f"{folder.parent.name}_{folder.name}_{path.name}"
                copy.write_bytes(path.read_bytes())
                print(copy)

    return show_each(options.results, find_folders(options.results, options.only), show)
