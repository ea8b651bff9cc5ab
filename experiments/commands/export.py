"""`export`: what groups of runs end with, as CSV or LaTeX, with bootstrap intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_loaders.files import write_text
from experiments.commands.showing import show_each
from experiments.records.compare import find_folders
from experiments.records.intervals import DEFAULT_METRICS, as_csv, as_latex, intervals_of
from experiments.records.reading import Run, read_runs


def main(options: argparse.Namespace) -> int:
    """Writes the files; returns 2 where some results cannot be read, else 0. ValueError for nothing to write."""
    targets = {as_csv: options.csv, as_latex: options.latex}
    if not any(targets.values()):
        raise ValueError("export needs --csv FILE, --latex FILE or both; - stands for the terminal")
    runs: list[Run] = []
    folders = find_folders(options.results, options.only)
    code = show_each(options.results, folders, lambda folder, note: runs.extend(read_runs(folder, note)))
    if not runs:
        raise ValueError(f"none of the results in {options.results} can be read, see above")
    group_by = [name.strip() for name in options.group_by.split(",")]
    intervals = intervals_of(runs, group_by, options.metric or DEFAULT_METRICS)
    for text_of, target in targets.items():
        text = text_of(intervals, group_by) if target else ""
        if target == "-":
            print(text, end="")
        elif target:
            write_text(Path(target), text)
            print(target)
    return code
