"""Kinds of values that several settings have. It imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, Strict

from experiments.settings.suggestion import not_one_of

Item = TypeVar("Item")


def must(requirement: str, test: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A validator that refuses a value which fails the test: "KEY must REQUIREMENT, got VALUE"."""

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"must {requirement}")
        return value

    return check


def one_of(names: Collection[str]) -> AfterValidator:
    """One of the names in a table of the program; where they are written in place, a `Literal` says the same."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(not_one_of(value, names))
        return value

    return AfterValidator(check)


Share = Annotated[float, Field(gt=0, lt=1)]
"""A number in (0, 1)."""
Text = Annotated[str, AfterValidator(must("be a text that is not empty", str.strip))]
Name = Annotated[
    str,
    AfterValidator(
        must(
            "be a name of letters, digits, '_', '.' and '-' that starts with a letter",
            re.compile(r"[A-Za-z][\w.-]*", re.ASCII).fullmatch,
        )
    ),
]
"""Names become folders of results."""
Items = Annotated[tuple[Item, ...], Strict(False)]
"""A list of items of one kind."""
Different = Annotated[
    tuple[Item, ...],
    Strict(False),
    Field(min_length=1),
    AfterValidator(must("have no entry twice", lambda items: len(set(items)) == len(items))),
]
"""A list of different items, not empty."""


def _expanded(value: Any) -> Any:
    """A single seed as a list, and a text as the list of its numbers."""
    if isinstance(value, (list, tuple)):
        return value
    if type(value) is int:
        return [value]
    seeds: list[int] = []
    for part in value.split(",") if isinstance(value, str) else [""]:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + MAX_SEEDS:
            raise ValueError(f'must be integers as 3, [0, 1, 2] or "0-9", at most {MAX_SEEDS} of them')
        seeds.extend(range(first, last + 1))
    return seeds


MAX_SEEDS = 100_000
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[Different[Seed], BeforeValidator(_expanded), Field(max_length=MAX_SEEDS)]
"""Different seeds, as `3`, `[0, 1, 2]`, `"0-9"` or `"0,2,4-6"`."""


@dataclass(frozen=True)
class Component:
    """A class by name, with its keyword arguments: an optimizer or a learning-rate scheduler."""

    name: str
    arguments: dict[str, Any]


def _component(raw: Any) -> Component:
    """The mapping `{name: ..., argument: value, ...}`; lists become tuples, as torch wants them."""
    if isinstance(raw, Component):
        return raw
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise ValueError("must be a mapping with a name and arguments")
    for key, value in raw.items():
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"{key} must be finite, got {value!r}")
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items() if key != "name"}
    return Component(raw["name"], arguments)


Named = Annotated[Component, BeforeValidator(_component)]
"""A class by name with its arguments; `experiments.training.components` checks them against its signature."""


# ---- how often an acceleration acts: a number of steps, or of epochs where the steps of an epoch are known -----------

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
