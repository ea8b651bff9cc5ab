"""What the figures of all experiments share: files, titles, legends, spreads over seeds, curves that coincide."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data_loaders.files import replacing, tolerating_read_only
from experiments.records.compare import Comparison, Records

RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.6,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}


def save_figures(folder: Path, drawings: Sequence[tuple[str, Callable[[], Figure | None]]]) -> list[Path]:
    """Writes what is drawn by file name, returns the paths; what gives no figure is left out.

    Where the folder cannot be written, as in the results of a colleague, `figures/<experiment>/<scale>` below the
    current folder takes its place, and a line on stderr says so. ValueError for two figures of one name.
    """
    twice = sorted(name for name, count in Counter(name for name, _ in drawings).items() if count > 1)
    if twice:
        raise ValueError(f"two figures would have the same name in {folder}: {', '.join(twice)}")
    folder = _writable(folder)
    paths = []
    with plt.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # it is drawn as a box
        for name, draw in drawings:
            figure = draw()
            if figure is not None:
                with replacing(folder / name, sync=False) as temporary:
                    figure.savefig(temporary, format=Path(name).suffix[1:], metadata={"Software": None})
                plt.close(figure)
                paths.append(folder / name)
    return paths


def _writable(folder: Path) -> Path:
    """Makes the folder of figures, or one below the current folder where the results are read-only."""
    with tolerating_read_only():
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    instead = Path("figures", *folder.parts[-3:-1])
    instead.mkdir(parents=True, exist_ok=True)
    print(f"note: {folder} cannot be written: the figures are in {instead}", file=sys.stderr)
    return instead


def as_text(label: str) -> str:
    """A label as matplotlib shows it letter by letter: a dollar sign would begin a formula."""
    return label.replace("$", r"\$")


def spread_over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimum, median and maximum over the seeds, (num_seeds, num_places), as in the tables; inf where diverged."""
    return values.min(axis=0), np.median(values, axis=0), values.max(axis=0)


def spread_words(count: int) -> str:
    return "one seed" if count == 1 else f"line: median of {count} seeds, band: minimum to maximum"


def training_line(comparison: Comparison) -> str:
    run = comparison.variants[0].first
    training = run.config["training"]
    batch = run.attributes.get("batch_images", training["batch_size"])
    return f"batches of {batch}, {training['epochs']} epochs"


def legend_line(color: str, style: Any) -> Line2D:
    """A variant in the legend, in its own line style: where it coincides with another one it is drawn in dashes."""
    return Line2D([], [], color=color, linestyle=style)


class Coinciding:
    """Finds curves that lie exactly on earlier ones: they are dashed, and a note names them."""

    def __init__(self) -> None:
        self._known: list[tuple[np.ndarray, list[str]]] = []

    def style(self, label: str, curve: np.ndarray, style: Any) -> Any:
        """The line style of a curve: its own, or short dashes through which the curve below shows."""
        for known, labels in self._known:
            if known.shape == curve.shape and np.array_equal(known, curve, equal_nan=True):
                labels.append(label)
                return (3.0 * (len(labels) - 1), (3, 3 * len(labels)))
        self._known.append((curve, [label]))
        return style

    @property
    def note(self) -> str:
        """ "Curves that coincide: A = B; C = D."; empty without any."""
        groups = "; ".join(" = ".join(labels) for _, labels in self._known if len(labels) > 1)
        return f"Curves that coincide: {groups}." if groups else ""


def finish(
    figure: Figure,
    records: Records,
    title: str,
    handles: dict[str, Any],
    seeds: Iterable[int] | None = None,
    note: str = "",
) -> None:
    """Title, one legend below the panels, the source at the bottom; a caution is named first of all.

    Args:
        figure: with its panels drawn.
        records: what is drawn.
        title: what the figure shows.
        handles: of the legend, by label.
        seeds: those of the figure, None for those of the main comparison.
        note: lines below the title.
    """
    head = f"{records.subject}: {title[:1].lower()}{title[1:]}"
    color = "#111111"
    if records.caution:
        head, color = f"{records.caution} - {head}", "#B00020"
    lines = [(records.degenerate, color), *((line, "#444444") for line in note.split("\n"))]
    frame(figure, (head, color), lines, records.source_line(seeds), handles)


def frame(
    figure: Figure, head: tuple[str, str], lines: Iterable[tuple[str, str]], source: str, handles: dict[str, Any]
) -> None:
    """Title and lines below it, each with its color, one legend below the panels, and the source at the bottom."""
    for axis in figure.axes:
        axis.tick_params(which="minor", labelsize=7)
    height = figure.get_size_inches()[1]
    top = 0.32
    _fitted_text(figure, 1 - 0.1 / height, head[0], 10.5, va="top", weight="bold", color=head[1])
    for line, shade in lines:
        if line:
            _fitted_text(figure, 1 - top / height, line, 8.5, va="top", color=shade)
            top += 0.2
    _fitted_text(figure, 0.08 / height, f"Source: {source}", 7, va="bottom", color="#666666")
    rows = _legend(figure, handles)
    figure.tight_layout(rect=(0, (0.3 + 0.2 * rows) / height, 1, 1 - top / height))


def _legend(figure: Figure, handles: dict[str, Any]) -> int:
    """A legend at the bottom, in as many columns as there is room for; returns the number of its lines."""
    width, height = figure.get_size_inches()
    for columns in range(min(len(handles), int(width // 2.2)), 0, -1):
        anchor = (0.5, 0.26 / height)
        legend = figure.legend(
            [*handles.values()],
            [as_text(label) for label in handles],
            loc="lower center",
            ncols=columns,
            bbox_to_anchor=anchor,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return -(-len(handles) // columns)
        legend.remove()
    return 0


def _fitted_text(figure: Figure, y: float, text: str, size: float, **style: Any) -> None:
    """A line of text at the left margin, in smaller letters where the figure is too narrow for it."""
    artist = figure.text(0.012, y, as_text(text), fontsize=size, **style)
    share = artist.get_window_extent().width / (0.976 * figure.bbox.width)
    artist.set_fontsize(size / max(1.0, share))
