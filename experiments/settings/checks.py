"""What a setting may be: kinds of values, and the dataclasses whose fields carry them. It imports no torch.

A value of the wrong kind raises ValueError with the key, the value and what is allowed.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from experiments.settings.suggestion import did_you_mean


@dataclass(frozen=True)
class Kind:
    """What a setting accepts: `allowed` completes "must be ...", `parse` returns the value or raises ValueError."""

    allowed: str
    parse: Callable[[Any], Any]


def integer(minimum: int, below: float = math.inf) -> Kind:
    """An integer in [minimum, below); a bool is none."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < below:
            raise ValueError
        return value

    return Kind(f"an integer >= {minimum}" + (f" and < {below}" if below < math.inf else ""), parse)


def number(low: float, high: float = math.inf, *, closed_low: bool = False) -> Kind:
    """A finite number in (low, high), or [low, high) with `closed_low`; a bool is none."""

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError
        if not (low < value < high or (closed_low and value == low)):
            raise ValueError
        return float(value)

    opening = "[" if closed_low else "("
    return Kind(f"a finite number in {opening}{low:g}, {high:g})", parse)


def choice(*options: str) -> Kind:
    """One of the given words."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError
        return value

    return Kind("one of " + ", ".join(options), parse)


def sequence(item: Kind) -> Kind:
    """A list, not empty and without repetition, of items of one kind."""

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError
        items = tuple(item.parse(entry) for entry in value)
        if len(set(items)) < len(items):
            raise ValueError
        return items

    return Kind(f"a list without repetition, each entry {item.allowed}", parse)


def optional(kind: Kind) -> Kind:
    """The kind, or null."""
    return Kind(f"{kind.allowed}, or null", lambda value: None if value is None else kind.parse(value))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return tuple(integer(1).parse(entry) for entry in value)


def _some_sizes(value: Any) -> tuple[int, ...]:
    if not value:
        raise ValueError
    return _sizes(value)


def _options(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError
    return dict(value)


MAX_SEEDS = 100_000
SEED_BELOW = 2**31


def _seeds(value: Any) -> tuple[int, ...]:
    """`3`, `[0, 1, 2]`, `"0-9"` or `"0,2,4-6"`."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        expanded: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None:
                raise ValueError
            first, last = int(match[1]), int(match[2] or match[1])
            if last - first >= MAX_SEEDS:
                raise ValueError
            expanded.extend(range(first, last + 1))
        value = expanded
    parsed: tuple[int, ...] = sequence(integer(0, SEED_BELOW)).parse(value)
    if len(parsed) > MAX_SEEDS:
        raise ValueError
    return parsed


TEXT = Kind("a text that is not empty", _text)
SIZES = Kind("a list of integers >= 1", _sizes)
SOME_SIZES = Kind("a list of at least one integer >= 1", _some_sizes)
OPTIONS = Kind("a mapping from names of options to values", _options)
BOOLEAN = Kind("true or false", _boolean)
SEEDS = Kind(
    f'one or several different integers >= 0 and < {SEED_BELOW}, at most {MAX_SEEDS} of them, as 3, [0, 1, 2] or "0-9"',
    _seeds,
)
# Names become folders of results.
NAME = Kind(
    "a name of letters, digits, '_', '.' and '-' that starts with a letter",
    lambda value: re.fullmatch(r"[A-Za-z][\w.-]*", value, re.ASCII)[0],  # type: ignore[index]
)
# `read_component` checks it against the signature of the class afterwards.
SCHEDULER = Kind("a mapping with the name of a scheduler of torch", lambda value: value)


def setting(kind: Kind, default: Any = MISSING, *, added_later: bool = False) -> Any:
    """A dataclass field that carries its kind; a default that may be changed, as {}, is copied for each object.

    Args:
        kind: what the setting accepts.
        default: its value where a configuration does not give it; without one it must be given.
        added_later: whether records exist from before the setting. A record then leaves it out while it has its
            default, so that those from before it remain records of the same runs.
    """
    metadata = {"kind": kind, "added_later": added_later}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(cls: Any) -> list[Field[Any]]:
    """The fields of a dataclass, or of one of its objects, that `setting` made; the others are no keys."""
    return [entry for entry in fields(cls) if "kind" in entry.metadata]


def recorded_settings(settings: Any) -> list[str]:
    """Names of the settings that a record holds: all but those added later that have their default."""
    return [
        entry.name
        for entry in settings_of(settings)
        if not (entry.metadata["added_later"] and getattr(settings, entry.name) == _default(entry))
    ]


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def read_settings(cls: type[Any], raw: Any, where: str) -> Any:
    """A settings dataclass from a raw mapping.

    Args:
        cls: dataclass; the fields made by `setting` are settings, others are no keys.
        raw: mapping from YAML, or None for all defaults.
        where: key of the mapping, for messages.

    Raises:
        ValueError: unknown or missing key, or a value that the key's kind refuses.
    """
    raw = as_mapping(raw, where)
    settings = settings_of(cls)
    refuse_unknown(raw, {entry.name: _default(entry) for entry in settings}, where)
    values = {}
    for entry in settings:
        key = f"{where}.{entry.name}"
        if entry.name in raw:
            values[entry.name] = parse_value(raw[entry.name], entry.metadata["kind"], key)
        elif _default(entry) is MISSING:
            raise ValueError(f"{key} is missing; it must be {entry.metadata['kind'].allowed}")
    return cls(**values)


def parse_value(value: Any, kind: Kind, key: str) -> Any:
    try:
        return kind.parse(value)
    except (ValueError, TypeError):
        raise ValueError(f"{key} must be {kind.allowed}, got {value!r}") from None


def as_mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, got {raw!r}")
    return raw


def refuse_unknown(raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    for key in raw:
        if key not in defaults:
            valid = ", ".join(
                name if default in (MISSING, inspect.Parameter.empty) else f"{name} (default {default!r})"
                for name, default in defaults.items()
            )
            raise ValueError(
                f"unknown key {f'{where}.' if where else ''}{key}; valid keys are: {valid}{did_you_mean(key, defaults)}"
            )


@dataclass(frozen=True)
class Component:
    """A class by name, with its keyword arguments: an optimizer or a learning-rate scheduler."""

    name: str
    arguments: dict[str, Any]
