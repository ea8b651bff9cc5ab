"""The configuration as a mapping with every setting, also those that its file leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.settings.kinds import Component
from experiments.settings.run_config import ExperimentConfig


def complete_settings(
    config: ExperimentConfig, raw: Mapping[str, Any], selected: Sequence[str] | None = None
) -> dict[str, Any]:
    """The settings of a configuration, with which a file makes the same runs.

    A relative path of an equation starts at the folder of the file, so the new file belongs beside the old one.

    Args:
        config: the configuration.
        raw: the mapping that it was read from.
        selected: names of the variants that it keeps, without studies; None for all.
    """
    settings = dict(raw)
    for section in ("problem", "training", "save", "launch"):
        settings[section] = {key: _as_raw(value) for key, value in getattr(config, section)}
    settings["seeds"] = list(config.seeds)
    if selected is not None:
        settings["variants"] = {name: _with_baseline(raw["variants"][name], selected) for name in selected}
        settings.pop("studies", None)
        if settings.get("baseline") not in selected:
            settings.pop("baseline", None)
    return settings


def _as_raw(value: Any) -> Any:
    return {"name": value.name, **value.arguments} if isinstance(value, Component) else value


def _with_baseline(variant: Mapping[str, Any], selected: Sequence[str]) -> dict[str, Any]:
    """The variant without a baseline that is left out; the baseline changes no number."""
    return {key: value for key, value in variant.items() if key != "baseline" or value in selected}
