"""What a run measured: its series, and how they grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from experiments.training.problem import Field

LAST_INTEGERS = ("numerical_rank",)
"""Integers among the statistics of an acceleration that count nothing."""


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        series: values by name ("group/name"): at epochs 0 .. epochs, NaN after a divergence and where nothing was
            evaluated; with `iterations`, one at each of them.
        diverged_epoch, diverged_iteration: of the first loss that is not finite, None for a run that ended well.
        num_steps: optimizer steps taken.
        iterations: where the series were evaluated, in evaluations of the gradient; None for epochs.
        stop_reason: "iterations", "time" or "diverged"; "" for epochs.
        attributes: further attributes of the record.
        fields: by name, see `Problem.fields`.
        weights: the weights that were evaluated last, on the CPU; empty where nobody wants them.
        attempts: of the acceleration, by column, see `attempts.AttemptTrace`; None where nobody traces them.
    """

    series: dict[str, np.ndarray]
    diverged_epoch: int | None
    num_steps: int
    iterations: np.ndarray | None = None
    diverged_iteration: int | None = None
    stop_reason: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Field] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    attempts: Mapping[str, np.ndarray] | None = None


def padded(series: Mapping[str, Sequence[float]], length: int) -> dict[str, np.ndarray]:
    """The series as arrays of one length, with NaN behind their last value."""
    arrays = {name: np.full(length, np.nan) for name in series}
    for name, values in series.items():
        arrays[name][: len(values)] = values
    return arrays


def append(
    series: dict[str, list[float]],
    place: int,
    values: Mapping[str, float],
    statistics: Iterable[Mapping[str, Any]],
) -> dict[str, float]:
    """Adds values, and the statistics of accelerations, at a place of the series; returns the new entries.

    A series that starts late, as a cause of rejection, is filled with 0 or NaN. Of several accelerations the counters
    are added, and of their other values those of the last one are taken.
    """
    row = dict(values)
    for counted in statistics:
        for name, value in counted.items():
            if isinstance(value, Mapping):
                counts = {f"acceleration/{name}_{cause}": float(count) for cause, count in value.items()}
                row |= {key: row.get(key, 0.0) + count for key, count in counts.items()}
            elif isinstance(value, int) and not isinstance(value, bool) and name not in LAST_INTEGERS:
                row[f"acceleration/{name}"] = row.get(f"acceleration/{name}", 0.0) + value
            elif isinstance(value, (bool, int, float)):
                row[f"acceleration/{name}"] = float(value)
    for name, value in row.items():
        missing = 0.0 if name.startswith("acceleration/rejected_") else math.nan
        entries = series.setdefault(name, [])
        entries.extend([missing] * (place - len(entries)))
        entries.append(value)
    return row
