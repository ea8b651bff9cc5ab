"""Progress of one run on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

SHOWN = {
    "metrics/train/loss": "loss",
    "metrics/train/minibatch_loss": "loss",
    "metrics/validation/loss": "error",
    "metrics/validation/top1": "top-1",
}
"""Values that are shown, by series; of several test sets the first one is, as "error"."""

Report = Callable[[float, float], None]
_reports: list[Report] = []


@contextmanager
def reported_to(report: Report) -> Iterator[None]:
    """Calls `report(share in [0, 1], loss or NaN)` whenever a run of this process shows its progress, seen or not."""
    _reports.append(report)
    try:
        yield
    finally:
        _reports.remove(report)


class Bar:
    """Progress on stderr: a bar on a terminal, at most ten plain lines elsewhere; with the last loss and error.

    A line appears for each tenth of the total count or of `max_seconds` of training, whichever is further.

    Args:
        total: the final count.
        unit: name of what the bar counts.
        enabled: whether anything is shown.
        max_seconds: seconds of training after which the run ends at any count; None for no limit.
        shows_rate: whether a plain line has the count per second.
        images: images in each count, which adds images/s; None for none.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        enabled: bool = True,
        *,
        max_seconds: float | None = None,
        shows_rate: bool = False,
        images: int | None = None,
    ) -> None:
        self._total, self._unit, self._count, self._max_seconds, self._images = total, unit, 0, max_seconds, images
        self._shows_rate = shows_rate
        self._start = self._shown = time.perf_counter()
        self._skipped = 0
        self._lines = enabled and not sys.stderr.isatty()
        self._told = 0
        self._last: dict[str, str] = {}
        self._bar = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) if enabled and not self._lines else None

    def start_at(self, count: int) -> None:
        self._skipped = count
        self.move_to(count)

    def move_to(self, count: int) -> None:
        """Moves to a count; the last step may go beyond the end."""
        self._count = count
        if self._bar is not None:
            self._bar.update(min(count, self._total) - self._bar.n)

    @property
    def is_due(self) -> bool:
        """Whether the bar is older than a second; asking for a value may make a device wait."""
        return self._bar is not None and time.perf_counter() - self._shown > 1.0

    def show(self, values: Mapping[str, float] | None = None) -> None:
        """Shows the loss and the error; the plain lines appear here."""
        values = values or {}
        self._last |= _headline(values)
        timed = values.get("timing/training_seconds", 0.0) / self._max_seconds if self._max_seconds is not None else 0.0
        share = min(1.0, max(self._count / self._total, timed))
        loss = next((value for name, value in values.items() if SHOWN.get(name) == "loss"), math.nan)
        for report in _reports:
            report(share, loss)
        shown = dict(self._last)
        self._shown = time.perf_counter()
        seconds = self._shown - self._start
        rate = (self._count - self._skipped) / max(seconds, 1e-9)
        if self._images is not None:
            shown = {"images/s": f"{rate * self._images:.0f}"} | shown
        if self._bar is not None:
            self._bar.set_postfix(shown)
        if self._lines and int(10 * share) > self._told:
            self._told = int(10 * share)
            more = "".join(f", {name} {text}" for name, text in shown.items())
            if shown and self._shows_rate:
                more += f", {rate:.0f} {self._unit}/s"
            made = share - self._skipped / self._total
            if made > 0 and share < 1:
                more += f", about {duration(seconds * (1 - share) / made)} left"
            count = min(self._count, self._total)
            print(f"{count}/{self._total} {self._unit}, {duration(seconds)}{more}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _headline(values: Mapping[str, float]) -> dict[str, str]:
    """The training loss and the first error on a validation set, as texts."""
    shown: dict[str, str] = {}
    for name, value in values.items():
        word = SHOWN.get(name) or ("error" if name.startswith("metrics/validation/") else "")
        if word and word not in shown:
            shown[word] = f"{value:.1%}" if word == "top-1" else f"{value:.3g}"
    return shown


def duration(seconds: float) -> str:
    """A time for people: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
