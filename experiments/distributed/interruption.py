"""When a run must stop early: signals and the time limit set a flag, on which all ranks agree once per step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_RESUME = 75
"""Exit code of a process that stopped early, has saved its state, and wants to be started again; as EX_TEMPFAIL."""
STOPPED_FILE = "AADL_STOPPED_FILE"
"""Names a file that rank 0 makes when the runs were stopped and saved, for launchers with exit codes of their own."""

OF_ANOTHER_RANK = "a signal or a time limit of another rank"
"""The reason on a rank that has none of its own."""

# USR1 and USR2 announce a time limit (Slurm --signal, LSF), TERM a preemption or a cancellation.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

# Seconds since the epoch at which the job ends; the first one that is set counts.
END_TIME_VARIABLES = ("AADL_END_TIME", "SLURM_JOB_END_TIME")


class Interruption:
    """A context manager in which signals and the time limit only give a reason to stop.

    A second signal changes nothing. Python allows signal handlers in the main thread alone; in other threads only the
    time limit counts. Schedulers signal every process of a step, workers too: see `data_loaders.workers`.

    Args:
        margin_seconds: how long before the end of the job the run must stop, >= 0; it may change at any time, for
            instance when a checkpoint turns out to take long.
        environment: AADL_END_TIME or SLURM_JOB_END_TIME is in seconds since the epoch; ValueError where it is not.
        clock: returns seconds since the epoch.
    """

    def __init__(
        self,
        *,
        margin_seconds: float = 60.0,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.end_time = _end_time(environment)
        self.margin_seconds = margin_seconds
        self._clock = clock
        self._previous: dict[signal.Signals, Any] = {}
        self._reason = ""

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: it was not set by Python, and Python cannot bring it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    @property
    def reason(self) -> str:
        """Why the run must stop ("SIGUSR1", "time limit"), or ""; the first reason stays."""
        if not self._reason and self.seconds_left <= 0:
            self._reason = "time limit"
        return self._reason

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit less the margin, infinite without a limit."""
        return float("inf") if self.end_time is None else self.end_time - self.margin_seconds - self._clock()


def _end_time(environment: Mapping[str, str]) -> float | None:
    for name in END_TIME_VARIABLES:
        text = environment.get(name, "")
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"environment variable {name} must be a time in seconds since the epoch, got {text!r}")
        return value
    return None


def write_stopped_file(environment: Mapping[str, str] = os.environ) -> None:
    """Makes the file that tells a launcher or job script that the runs were stopped and saved, if it asks for one."""
    if environment.get(STOPPED_FILE):
        Path(environment[STOPPED_FILE]).touch()
