"""Progress of many runs on stderr: how many are done, the losses of those that run, and the time to the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from experiments.training.progress import duration

FIRST_LINE_SECONDS = 30.0
"""The first line of a log comes after this time; each further one after twice the time, up to LINE_SECONDS."""

LINE_SECONDS = 600.0

SHOWN_SECONDS = 0.5
"""Between two looks at the losses of running runs."""

LISTED = 4
"""Losses of at most so many runs are listed; of more the smallest and the largest are shown."""


class RunsBar:
    """A bar on a terminal, elsewhere lines; the time to the end, unfinished parts included, from the second run on."""

    def __init__(self, total: int, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock, self._start = total, clock, clock()
        self._done = 0
        self._running: dict[int, tuple[float, float]] = {}
        is_terminal = enabled and sys.stderr.isatty()
        self._has_lines = enabled and not is_terminal
        self._bar = tqdm(total=total, unit=" runs", dynamic_ncols=True) if is_terminal else None
        self._tenths, self._pause, self._line_at = 0, FIRST_LINE_SECONDS, self._start
        self._shown_at = -math.inf

    def __enter__(self) -> RunsBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def report(self, number: int, share: float, loss: float) -> None:
        """Shows how far a run is; `number` tells the runs apart."""
        self._running[number] = (share, loss)
        if self._clock() - self._shown_at >= SHOWN_SECONDS:
            self._show()

    def finish(self, number: int) -> None:
        self._running.pop(number, None)
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)
        self._show()

    def _show(self) -> None:
        now = self._shown_at = self._clock()
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._parts()))
        tenths = 10 * self._done // self._total
        if self._has_lines and (tenths > self._tenths or now - self._line_at >= self._pause):
            if now - self._line_at >= self._pause:
                self._pause = min(LINE_SECONDS, 2 * self._pause)
            self._tenths, self._line_at = tenths, now
            parts = [f"{self._done}/{self._total} runs", duration(now - self._start), *self._parts()]
            print(", ".join(parts), file=sys.stderr, flush=True)

    def _parts(self) -> list[str]:
        """The losses of those that run, and the time to the end, where they are known."""
        parts = []
        losses = [loss for _, loss in self._running.values() if not math.isnan(loss)]
        if 0 < len(losses) <= LISTED:
            parts.append("loss " + " ".join(f"{loss:.3g}" for loss in losses))
        elif losses:
            parts.append(f"loss {min(losses):.3g} to {max(losses):.3g} of {len(losses)} runs")
        seconds = self.seconds_left()
        if seconds is not None and self._done < self._total:
            parts.append(f"about {duration(seconds)} left")
        return parts

    def seconds_left(self) -> float | None:
        """Seconds to the end at the present rate; None before the second run is done."""
        if self._done < 2:
            return None
        made = self._done + sum(share for share, _ in self._running.values())
        return (self._clock() - self._start) / made * max(0.0, self._total - made)
