"""A page of tables: in Markdown beside the records, and as text for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_loaders.files import write_text
from experiments.records.text_table import markdown_table, text_table


class Page:
    """Collects headings, sentences and tables below a title."""

    def __init__(self, title: str) -> None:
        self._markdown, self._text = [f"# {title}", ""], [title, ""]

    def section(self, heading: str) -> None:
        self._markdown += [f"## {heading}", ""]
        self._text += [heading, ""]

    def say(self, sentence: str, strong: bool = False) -> None:
        self._markdown += [f"**{sentence}**" if strong else sentence, ""]
        self._text += [sentence, ""]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._markdown += [*markdown_table(header, rows), ""]
        self._text += [*text_table(header, rows), ""]

    def write(self, folder: Path) -> str:
        """Writes `summary.md` into a folder and returns the text; where that is not allowed, a note says so."""
        try:
            write_text(folder / "summary.md", "\n".join(self._markdown))
        except OSError as error:
            print(f"note: {error}; the table is printed all the same", file=sys.stderr)
        return "\n".join(self._text[:-1])
