"""What a setting of a configuration may be: kinds of values, mappings, and the classes of torch that one may name.

A value of the wrong kind raises ValueError with the key, the value and what is allowed.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any

import torch

import aadl
from experiments.training import optimizers as own


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


def setting(kind: Kind, default: Any = MISSING) -> Any:
    """A dataclass field that carries its kind; a default that may be changed, as {}, is copied for each object."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"kind": kind})
    return field(default=default, metadata={"kind": kind})


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
    settings = [entry for entry in fields(cls) if "kind" in entry.metadata]
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
            raise ValueError(f"unknown key {f'{where}.' if where else ''}{key}; valid keys are: {valid}")


@dataclass(frozen=True)
class Component:
    """A class by name, with its keyword arguments: an optimizer or a learning-rate scheduler."""

    name: str
    arguments: dict[str, Any]


PACKAGES = {"SOAP": "pytorch_optimizer", "AdamWScheduleFree": "schedulefree", "SGDScheduleFree": "schedulefree"}
"""Optimizers of packages that need not be there, and are imported when a configuration names one."""


@cache
def optimizers() -> dict[str, type[torch.optim.Optimizer] | str]:
    """Optimizers that a configuration may name: those of torch, of this suite, and of optional packages."""
    return _with_step(torch.optim) | _with_step(own) | PACKAGES


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of an optimizer that a configuration may name.

    Raises:
        ValueError: its package is not there.
    """
    return _imported(name, optimizers()[name])


def _imported(name: str, found: Any) -> Any:
    """The class, or that of this name in a package."""
    if not isinstance(found, str):
        return found
    try:
        return getattr(importlib.import_module(found), name)
    except ImportError:
        raise ValueError(f"{name} needs the package {found}, which is not installed: pip install {found}") from None


def needs_residuals(name: str) -> bool:
    """Whether the optimizer asks the closure for residuals and their Jacobian, which only some problems have."""
    return getattr(optimizers()[name], "needs_residuals", False)


@cache
def schedulers() -> dict[str, type[torch.optim.lr_scheduler.LRScheduler]]:
    """The learning-rate schedulers of torch."""
    return _with_step(torch.optim.lr_scheduler)


def takes(name: str, argument: str) -> bool:
    """Whether the constructor of the optimizer has this argument."""
    return argument in inspect.signature(optimizer_class(name)).parameters


def _with_step(module: Any) -> dict[str, Any]:
    return {
        name: member
        for name, member in vars(module).items()
        if inspect.isclass(member) and hasattr(member, "step") and name not in ("Optimizer", "LRScheduler")
    }


def read_component(raw: Any, classes: Mapping[str, Any], where: str) -> Component:
    """One of the classes, by name, its arguments checked against its signature; a text is the package that has it."""
    raw = dict(as_mapping(raw, where))
    name = raw.pop("name", None)
    if name not in classes:
        raise ValueError(f"{where}.name must be one of {', '.join(sorted(classes))}, got {name!r}")
    try:
        parameters = list(inspect.signature(_imported(name, classes[name])).parameters.values())[1:]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    refuse_unknown(raw, {"name": MISSING} | {entry.name: entry.default for entry in parameters}, where)
    _refuse_not_finite(raw, where)
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Component(name, arguments)


def _refuse_not_finite(raw: Mapping[str, Any], where: str) -> None:
    for key, value in raw.items():
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"{where}.{key} must be finite, got {value!r}")


def make_optimizer(component: Component, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer over the given parameters, ready to train."""
    optimizer = optimizer_class(component.name)(parameters, **component.arguments)
    if own.is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def make_scheduler(component: Component, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate scheduler of torch over the given optimizer."""
    return schedulers()[component.name](optimizer, **component.arguments)


def check_optimizer(component: Component, where: str) -> torch.optim.Optimizer:
    """Builds the optimizer on one dummy weight, so that what torch refuses is refused before training."""
    for key in ("lr", "momentum", "weight_decay", "eps"):
        value = component.arguments.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}.{key} must be a number, got {value!r}")
    try:
        return make_optimizer(component, [torch.nn.Parameter(torch.zeros(2))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}") from None


def check_scheduler(component: Component, where: str) -> None:
    """Builds the scheduler on a dummy optimizer and steps once, so that what torch refuses is refused before training.

    Some classes look at their arguments only in `step`, and one needs an argument there that the training has not.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    try:
        scheduler = make_scheduler(component, optimizer)
        optimizer.step()  # torch warns of a scheduler that steps first
        scheduler.step()
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}") from None


def accelerate(optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any], **functions: Any) -> None:
    """`aadl.accelerate` with arguments from YAML, in which `history_dtype` is the name of a dtype of torch."""
    dtype = arguments.get("history_dtype")
    if isinstance(dtype, str):
        arguments = {**arguments, "history_dtype": getattr(torch, dtype, dtype)}
    aadl.accelerate(optimizer, **arguments, **functions)


def solves_residuals(arguments: Mapping[str, Any] | None) -> bool:
    """Whether an acceleration is that by the residuals of the loss."""
    kind = (arguments or {}).get("acceleration_type")
    return isinstance(kind, str) and kind.lower() == "nonlinear_gmres"


def check_acceleration(optimizer: Component, arguments: Mapping[str, Any], where: str, probes: Sequence[str]) -> None:
    """Checks the names against the signature of `aadl.accelerate`, then lets the library judge the values.

    Args:
        optimizer, arguments: its settings.
        where: its key, for messages.
        probes: keys of the suite that go with residuals.
    """
    parameters = list(inspect.signature(aadl.accelerate).parameters.values())[1:]
    # These are no settings: the library takes the process group of the launch, the suite the functions of the problem.
    others = ("process_group", "residuals", "check")
    defaults = {entry.name: entry.default for entry in parameters if entry.name not in others}
    if solves_residuals(arguments):
        defaults |= dict.fromkeys(probes)
        for name in probes:
            if arguments.get(name) is not None:
                parse_value(arguments[name], integer(1), f"{where}.{name}")
    refuse_unknown(arguments, defaults, where)
    try:
        accelerate(check_optimizer(optimizer, where), {k: v for k, v in arguments.items() if k not in probes})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
