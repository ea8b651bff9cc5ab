"""What became of each attempt of an acceleration, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.training.stage import Stage

VALUES = (
    "gain",
    "trust_ratio",
    "coefficient_norm",
    "condition_number",
    "numerical_rank",
    "relative_standard_deviation",
    "averaging",
    "damping",
    "period",
)
"""Statistics of an acceleration that stand beside each outcome; NaN where the acceleration has none."""


class Row(NamedTuple):
    """What became of one attempt."""

    step: int
    stage: int
    outcome: str
    values: list[float]


class AttemptTrace:
    """One row for each attempt: "accepted" or the cause of its rejection, and "reverted" where a point was taken back.

    It compares the counters of the accelerations after every step, so the host waits for a device in every step. The
    trust ratio of a row is that of the last judgment up to its step, which may belong to an earlier candidate.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._rows: list[Row] = []
        self._counts: dict[int, dict[str, int]] = {}  # by stage

    def after_step(self, step: int) -> None:
        """Adds the attempts of a step; steps count from 1."""
        for number, stage in enumerate(self._stages):
            if stage.statistics is None:
                continue
            statistics = stage.statistics()
            counts, before = _outcomes(statistics), self._counts.get(number, {})
            self._counts[number] = counts
            values = [float(statistics.get(name, math.nan)) for name in VALUES]
            for outcome, count in counts.items():
                self._rows += [Row(step, number, outcome, values)] * (count - before.get(outcome, 0))

    def columns(self) -> dict[str, np.ndarray]:
        """The rows by column: integers `step` and `stage`, texts `outcome`, and the `VALUES` that are known."""
        values = np.array([row.values for row in self._rows], dtype=float).reshape(-1, len(VALUES))
        columns = dict(zip(VALUES, values.T, strict=True))
        return {
            "step": np.array([row.step for row in self._rows], dtype=np.int64),
            "stage": np.array([row.stage for row in self._rows], dtype=np.int64),
            "outcome": np.array([row.outcome for row in self._rows], dtype=object),
            **{name: column for name, column in columns.items() if not np.isnan(column).all()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The numbers as one tensor and the outcomes as one text, because a checkpoint is checked entry by entry."""
        numbers = [[row.step, row.stage, *row.values] for row in self._rows]
        return {
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "outcomes": " ".join(row.outcome for row in self._rows),
            "counts": {**self._counts},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes on with a saved trace, or at the present counts of a run that was saved without one."""
        if state is not None:
            saved = zip(state["numbers"].tolist(), state["outcomes"].split(), strict=True)
            self._rows = [Row(int(step), int(stage), outcome, values) for (step, stage, *values), outcome in saved]
            self._counts = dict(state["counts"])
        else:
            self.after_step(0)
            self._rows.clear()


def _outcomes(statistics: Mapping[str, Any]) -> dict[str, int]:
    """How often each outcome occurred; a revert comes before the next attempt."""
    return {"reverted": statistics.get("reverted", 0), "accepted": statistics["accepted"], **statistics["rejected"]}
