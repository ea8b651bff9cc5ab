"""Tables of the benchmarks in Markdown and CSV, their numbers, and the pages of docs/ they are put into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from benchmarks.machine import ROOT, facts

REPORTS = ROOT / "docs" / "reports"


class Table(NamedTuple):
    """Title, header and rows of cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table, its title in bold above it."""
        return f"**{self.title}**\n\n{markdown(self.header, self.rows)}\n"

    def csv(self) -> str:
        """The table as comma-separated values, header first; numbers with a thousands comma lose the comma."""
        return "".join(",".join(cell.replace(",", "") for cell in row) + "\n" for row in [self.header, *self.rows])


def line(cells: Iterable[str]) -> str:
    """One line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def head(header: Sequence[str]) -> str:
    """The first two lines of a table."""
    return f"{line(header)}\n{line(['---'] * len(header))}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([head(header), *map(line, rows)])


def number(value: float | None, factor: float = 1.0) -> str:
    """Three digits, all of those before the point; "-" for None."""
    if value is None:
        return "-"
    return f"{value * factor:,.0f}" if abs(value * factor) >= 100 else f"{value * factor:.3g}"


def with_quartiles(values: Sequence[float], show: Callable[[float], str] = number) -> str:
    """Median [lower quartile .. upper quartile]."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return f"{show(median(values))} [{show(low)} .. {show(high)}]"


def with_range(values: Sequence[float], show: Callable[[float], str] = "{:.2f}".format) -> str:
    """Median [minimum .. maximum]."""
    return f"{show(median(values))} [{show(min(values))} .. {show(max(values))}]"


def origin(command: str, device: str = "cpu") -> str:
    """Where and when the command measured."""
    about: dict[str, Any] = facts(device)
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return (
        f"Written by `{command}`: {about['processor']}, {about['cores']} cores, {threads}, device {about['device']}, "
        f"torch {about['torch']}, Python {about['python']}, commit {about['commit']}, {about['date'][:10]}."
    )


def put_into_page(name: str, blocks: Mapping[str, str], reports: Path = REPORTS) -> None:
    """Puts each block between the lines `<!-- BLOCK -->` and `<!-- end of BLOCK -->` of docs/reports/NAME.md.

    Raises:
        ValueError: the page has no such lines.
    """
    page = reports / f"{name}.md"
    text = page.read_text("utf-8")
    for block, content in blocks.items():
        begin, end = f"<!-- {block} -->\n", f"<!-- end of {block} -->"
        found = re.search(re.escape(begin) + ".*?" + re.escape(end), text, re.DOTALL)
        if found is None:
            raise ValueError(f"{page} has no lines {begin.strip()} and {end}")
        text = text[: found.start()] + f"{begin}\n{content.strip()}\n\n{end}" + text[found.end() :]
    page.write_text(text, "utf-8")
