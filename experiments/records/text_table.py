"""Tables as text, for a terminal and in Markdown, and pages of them. It imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from unicodedata import combining, east_asian_width

from data_loaders.files import tolerating_read_only, write_text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, which shows the cells letter by letter."""
    lines = [
        header,
        ["---"] * len(header),
        *([re.sub(r"([\\`*_|<~$])", r"\\\1", cell) for cell in row] for row in rows),
    ]
    return ["| " + " | ".join(line) + " |" for line in lines]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(_width(line[column]) for line in (header, *rows)) for column in range(len(header))]
    return [
        "  " + "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, ["-" * width for width in widths], *rows)
    ]


def _width(text: str) -> int:
    """Columns of a terminal: East Asian letters take two, accents that are letters of their own none."""
    return sum(0 if combining(letter) else 1 + (east_asian_width(letter) in "WF") for letter in text)


class Page:
    """Collects headings, sentences and tables, and writes them as Markdown and as text for a terminal."""

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
        with tolerating_read_only() as refusals:
            write_text(folder / "summary.md", "\n".join(self._markdown))
        if refusals:
            print(f"note: {refusals[0]}; the table is printed all the same", file=sys.stderr)
        return "\n".join(self._text[:-1])
