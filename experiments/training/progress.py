"""Progress on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

SHOWN = {
    "metrics/train/loss": "loss",
    "metrics/train/minibatch_loss": "loss",
    "metrics/validation/loss": "error",
    "metrics/validation/top1": "top-1",
}
"""Names of the values that the bar shows, by series; of several test sets it shows the first one, as "error"."""


class Bar:
    """Progress on stderr: a bar on a terminal, at most ten plain lines elsewhere; with the last loss and error.

    A line appears for each tenth of the total count or of `max_seconds` of training, whichever is further.

    Args:
        total: the final count.
        unit: name of what the bar counts.
        enabled: whether anything is shown.
        max_seconds: seconds of training after which the run ends at any count; None for no limit.
        shows_rate: whether a plain line has the count per second.
        images: images in each count, which adds images/s and the time that is left; None for none.
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
        self._tenths_shown = 0
        self._last: dict[str, str] = {}
        self._bar = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) if enabled and not self._lines else None

    def skip(self, count: int) -> None:
        """Counts what an earlier process has done, which is no part of the rate."""
        self._skipped = count
        self.update(count)

    def update(self, count: int) -> None:
        """Counts on, without showing it on a line."""
        self._count += count
        if self._bar is not None:
            self._bar.update(min(count, self._total - self._bar.n))  # the last step may go beyond

    @property
    def is_due(self) -> bool:
        """Whether the bar is older than a second; asking for a value may make a device wait."""
        return self._bar is not None and time.perf_counter() - self._shown > 1.0

    def show(self, values: Mapping[str, float] | None = None) -> None:
        """Shows the loss and the error; a plain line appears here."""
        self._last |= _headline(values or {})
        shown = dict(self._last)
        self._shown = time.perf_counter()
        seconds = self._shown - self._start
        rate = (self._count - self._skipped) / max(seconds, 1e-9)
        if self._images is not None:
            shown = {"images/s": f"{rate * self._images:.0f}"} | shown
        if self._bar is not None:
            self._bar.set_postfix(shown)
        tenths = self._tenths((values or {}).get("timing/training_seconds", 0.0))
        if self._lines and tenths > self._tenths_shown:
            self._tenths_shown = tenths
            more = "".join(f", {name} {text}" for name, text in shown.items())
            if shown and self._shows_rate:
                more += f", {rate:.0f} {self._unit}/s"
            if self._images is not None and rate > 0:
                more += f", {(self._total - self._count) / rate:.0f} s left"
            count = min(self._count, self._total)
            print(f"{count}/{self._total} {self._unit}, {seconds:.0f} s{more}", file=sys.stderr, flush=True)

    def _tenths(self, seconds: float) -> int:
        """Tenths of the run, 0 to 10, after so many seconds of training."""
        timed = int(10 * seconds / self._max_seconds) if self._max_seconds is not None else 0
        return min(10, max(self._count * 10 // self._total, timed))

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _headline(values: Mapping[str, float]) -> dict[str, str]:
    """The training loss and the first error on a validation set, as texts."""
    shown: dict[str, str] = {}
    for name, value in values.items():
        label = SHOWN.get(name) or ("error" if name.startswith("metrics/validation/") else "")
        if label and label not in shown:
            shown[label] = f"{value:.1%}" if label == "top-1" else f"{value:.3g}"
    return shown


def progress(items: Iterable[Any], total: int, unit: str, enabled: bool = True) -> Iterator[Any]:
    """Passes the items on, with a bar on a terminal and at most ten plain lines elsewhere, both on stderr."""
    bar = Bar(total, unit, enabled)
    try:
        for item in items:
            yield item
            bar.update(1)
            bar.show()
    finally:
        bar.close()
