"""Puts the texts of `--set` into what a configuration's file says. It imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.settings.yaml_file import parse_setting, read_yaml


def read_overridden(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], list[str] | None]:
    """The raw mapping of a file with the overrides put in, and the names of the variants to keep (None: all).

    Raises:
        ValueError: invalid YAML, or an override that is no `key=value` or is given twice.
        OSError: the file cannot be read.
    """
    raw = read_yaml(path)
    selected = None
    keys = [text.partition("=")[0].strip() for text in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"--set {key} is given {keys.count(key)} times: give it once")
    for text in overrides:
        key, _, value = text.partition("=")
        if key.strip() == "variants" and value.strip() and not value.lstrip().startswith("{"):
            selected = [name.strip() for name in value.split(",")]
        else:
            raw = _override(raw, text)
    return raw, selected


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """One `key=value` put into the raw mapping; anchors are shared objects, so every level on the way is copied."""
    key, equals, value_text = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set needs key=value, as training.epochs=5, got {text!r}")
    try:
        value = parse_setting(value_text)
    except ValueError as error:
        raise ValueError(f"--set {key}: {error}") from None
    result = dict(raw)
    level = result
    for position, part in enumerate(keys[:-1]):
        below = level.get(part)
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ValueError(f"--set {key}: {'.'.join(keys[: position + 1])} is a value, not a group of settings")
        level[part] = dict(below)
        level = level[part]
    level[keys[-1]] = value
    return result
