"""Settings of graduate admissions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from experiments.models.mlp import ACTIVATIONS
from experiments.settings.kinds import Items, Named, Share, Text, one_of
from experiments.settings.schema import Settings


class GraduateAdmissionsConfig(Settings):
    """The regression problem: data, split and network."""

    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    validation_fraction: Share = 0.2
    hidden_sizes: Items[PositiveInt] = (64, 64, 64)
    activation: Annotated[str, one_of(ACTIVATIONS)] = "relu"
    data_path: Text | None = None


class TrainingConfig(Settings):
    """Training by epochs. `batch_size` counts rows over all ranks; the scheduler steps once an epoch."""

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 40
    scheduler: Named | None = None
    measure_updates: bool = False
