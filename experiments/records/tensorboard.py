"""The series of a run for TensorBoard, while it is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes each entry of the series as scalars at its epoch or iteration, where it is `enabled`.

    A run that resumes goes on in the same folder. TensorBoard then hides what an earlier process wrote from the first
    new entry on, as after a crash between two saves.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self._folder, self._is_enabled = folder, enabled
        self._writer: Any = None

    def __call__(self, place: int, values: Mapping[str, float]) -> None:
        if not self._is_enabled:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # here, because it imports an optional package

            self._writer = SummaryWriter(str(self._folder), purge_step=place)
        for name, value in values.items():
            self._writer.add_scalar(name, value, place)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Raises ValueError where the package that the setting needs is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "save.tensorboard needs the package tensorboard, which is not installed: pip install tensorboard"
        )
