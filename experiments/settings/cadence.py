"""How often an acceleration acts: a number of optimizer steps, or of epochs where the steps of an epoch are known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator

from experiments.settings.kinds import must

LEAST = {"wait_iterations": 0, "store_each_nth": 1, "frequency": 1}
"""Arguments of an acceleration that are cadences, and their least number of steps."""


def _cadence(least: int) -> PlainValidator:
    def test(value: Any) -> bool:
        return isinstance(value, str) or (type(value) is int and value >= least)

    return PlainValidator(must(f"be an integer >= {least}", test))


Wait = Annotated[Any, _cadence(0)]
"""An integer >= 0, or a text as "2 epochs", which `in_steps` reads."""
Period = Annotated[Any, _cadence(1)]
"""An integer >= 1, or such a text."""


def in_steps(settings: Mapping[str, Any], steps_per_epoch: int | None) -> dict[str, Any]:
    """The arguments of an acceleration with cadences in optimizer steps; ValueError for a text that is no number.

    `1 epoch` becomes `steps_per_epoch`, and part of an epoch at least one step; None: cadences count steps alone.
    """
    steps = dict(settings)
    for name, least in LEAST.items():
        text = settings.get(name)
        if not isinstance(text, str):
            continue
        if steps_per_epoch is None:
            raise ValueError(f"{name} must be an integer, got {text!r}")
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*epochs?\s*", text)
        epochs = float(match[1]) if match else math.nan
        if not (epochs > 0 or epochs == least):
            raise ValueError(f"{name} must be an integer or a number of epochs, as '2 epochs', got {text!r}")
        steps[name] = max(round(epochs * steps_per_epoch), least)
    return steps
