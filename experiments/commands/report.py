"""`report`: one self-contained HTML file of all results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from data_loaders.files import tolerating_read_only, write_text
from experiments.catalog import experiment_of
from experiments.commands.showing import show_each
from experiments.records.compare import find_folders
from experiments.records.provenance import git_state
from experiments.records.reading import read_runs, say
from experiments.records.report import html_page, section_of


def main(options: argparse.Namespace) -> int:
    """Draws the figures, writes the file and prints its path; returns 2 where some results cannot be shown, else 0."""
    sections: list[str] = []

    def add(folder: Path, note: Callable[[str], None]) -> None:
        experiment = experiment_of(folder)
        figures, table = experiment.draw(folder, note), experiment.table(folder, note)
        sections.append(section_of(folder, read_runs(folder, note), figures, table))

    code = show_each(options.results, find_folders(options.results, options.only), add)
    if not sections:
        raise ValueError(f"none of the results in {options.results} can be shown, see above")
    commit, dirty = git_state()
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    made = f"Made {now} from {options.results} by commit {commit[:9]}{' with changes' if dirty else ''}."
    print(_write(options.output, options.results, html_page(sections, made)))
    return code


def _write(output: Path | None, results: Path, page: str) -> Path:
    """Writes the page, in the current folder where nobody named a file and that of the results is read-only."""
    if output is not None:
        write_text(output, page)
        return output
    path = results / "report.html"
    with tolerating_read_only() as refusals:
        write_text(path, page)
    if refusals:
        path = Path("report.html")
        write_text(path, page)
        say(f"note: {refusals[0]}: the report is in {path.resolve()}")
    return path
