"""What the commands that show results share: one folder, or one record, hides no other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.records.compare import closed_folders


def show_each(results: Path, folders: Iterable[Path], show: Callable[[Path, Callable[[str], None]], None]) -> int:
    """Shows each folder of results; one that cannot be shown, or a record in it, hides no other.

    `show` gets a function that prints a line about what it leaves out. Returns 2 where something was left out, else 0.
    """
    left_out: list[str] = []

    def note(line: str) -> None:
        if line not in left_out:
            left_out.append(line)
            print(line, file=sys.stderr, flush=True)

    for folder in closed_folders(results):
        note(f"left out: {folder} is closed to this account")
    for folder in folders:
        try:
            show(folder, note)
        except (ValueError, OSError) as error:
            note(f"left out: {error}")
        except LookupError as error:  # records of another version
            note(f"left out: the records in {folder} have no {error}")
    return 2 if left_out else 0
