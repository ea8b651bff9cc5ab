"""Tables of the benchmarks in Markdown and CSV, their numbers, and the pages of docs/ they are put into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from textwrap import fill
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


def put_into_page(
    name: str, blocks: Mapping[str, str], reports: Path = REPORTS, conclude: Callable[[str], str] | None = None
) -> None:
    """Puts each block between the lines `<!-- BLOCK -->` and `<!-- end of BLOCK -->` of docs/reports/NAME.md.

    `conclude` makes the block "conclusion" from the page with the other blocks: its numbers are those of the tables.

    Raises:
        ValueError: the page has no such lines.
    """
    page = reports / f"{name}.md"
    text = page.read_text("utf-8")
    for block, content in blocks.items():
        text = _with_block(text, block, content)
    if conclude is not None:
        text = _with_block(text, "conclusion", conclude(text))
    page.write_text(text, "utf-8")


def _with_block(page: str, block: str, content: str) -> str:
    """The page with another content of the block, whose paragraphs of text are wrapped."""
    before, _, after = parts(page, block)
    paragraphs = content.strip().split("\n\n")
    lines = [fill(text, 120, break_on_hyphens=False) if text[0].isalnum() else text for text in paragraphs if text]
    return "\n\n".join([before.rstrip(), *lines, after.lstrip()])


def parts(page: str, block: str) -> tuple[str, str, str]:
    """The text of a page up to the content of a block, this content, and the rest.

    Raises:
        ValueError: the page has no lines `<!-- BLOCK -->` and `<!-- end of BLOCK -->`.
    """
    begin, end = f"<!-- {block} -->\n", f"<!-- end of {block} -->"
    before, begun, rest = page.partition(begin)
    content, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"the page has no lines {begin.strip()} and {end}")
    return before + begin, content.strip(), end + after


def rows_of(page: str, block: str) -> list[dict[str, str]]:
    """The rows of all tables of a block, each cell by its heading."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for text in parts(page, block)[1].splitlines():
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if not text.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif set(cells) != {"---"}:
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def middle(cell: str) -> str:
    """The median of a cell with quartiles or a range behind it."""
    return cell.partition(" [")[0]
