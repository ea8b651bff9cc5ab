"""Settings of graduate admissions."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.models.mlp import ACTIVATIONS
from experiments.settings.checks import (
    BOOLEAN,
    SCHEDULER,
    SIZES,
    TEXT,
    Component,
    choice,
    integer,
    number,
    optional,
    setting,
)


@dataclass(frozen=True)
class GraduateAdmissionsConfig:
    """The regression problem: data, split and network."""

    split_seed: int = setting(integer(0, 2**32), 42)
    validation_fraction: float = setting(number(0.0, 1.0), 0.2)
    hidden_sizes: tuple[int, ...] = setting(SIZES, (64, 64, 64))
    activation: str = setting(choice(*ACTIVATIONS), "relu")
    data_path: str | None = setting(optional(TEXT), None)


@dataclass(frozen=True)
class TrainingConfig:
    """Training by epochs. `batch_size` counts rows over all ranks; the scheduler steps once an epoch."""

    epochs: int = setting(integer(1), 100)
    batch_size: int = setting(integer(1), 40)
    scheduler: Component | None = setting(SCHEDULER, None)  # noqa: RUF009
    measure_updates: bool = setting(BOOLEAN, False)
