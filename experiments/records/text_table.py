"""Tables as text, for a terminal and in Markdown. It imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from unicodedata import combining, east_asian_width


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
