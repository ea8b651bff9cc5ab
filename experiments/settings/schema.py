"""The base class of all settings, and what is wrong with a setting in one sentence. It imports no torch.

A section of a configuration is a class, and reading it checks it:

    class Training(Settings):
        epochs: PositiveInt = 100
        precision: Literal["float32", "bfloat16"] = "float32"

    training = read_settings(Training, {"epochs": 5}, "training")

`experiments.settings.kinds` has the kinds of values. A validator raises ValueError. A text that begins with "must" is
about the value, and its key and the value are added: "training.epochs must be even, got 5". Any other text is about the
section: "training: ...".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from experiments.settings.suggestion import did_you_mean, not_one_of

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
"""A bool is no number, 2.0 is no integer, "3" neither, and nan and inf are refused."""


class Settings(BaseModel):
    """A section of a configuration, or all of it."""

    model_config = STRICT
    removed_keys: ClassVar[Mapping[str, str]] = {}
    """Keys that a former version had, and what to do with each, for files that still have them."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, raw: Any) -> Any:
        """Says which keys there are, which `extra="forbid"` does not."""
        if isinstance(raw, Mapping):
            defaults = {name: field.get_default() for name, field in cls.model_fields.items()}
            refuse_unknown(raw, defaults, cls.removed_keys)
        return raw


def read_settings(kind: Any, raw: Any, where: str = "", context: Any = None) -> Any:
    """Settings, or one value, from what YAML gives.

    Args:
        kind: a subclass of `Settings`, or the type of a value, as `Seeds`.
        raw: a mapping, or the value.
        where: its key, for messages; "" for a whole file.
        context: what validators find in `info.context`.

    Raises:
        ValueError: one sentence with the key, the value and what is allowed, about the first mistake.
    """
    has_config = isinstance(kind, type) and issubclass(kind, BaseModel)
    try:
        return TypeAdapter(kind, config=None if has_config else STRICT).validate_python(raw, context=context)
    except ValidationError as error:
        raise ValueError(_sentence(error, where)) from None


_TYPES = {
    "bool_type": "be true or false",
    "dict_type": "be a mapping",
    "float_type": "be a number",
    "int_type": "be an integer",
    "model_type": "be a mapping of settings",
    "string_type": "be a text",
    "tuple_type": "be a list",
}
"""Kinds of values as YAML has them, by pydantic's names of its errors."""


def _sentence(invalid: ValidationError, where: str) -> str:
    error = invalid.errors()[0]
    kind, value, place = error["type"], error["input"], error["loc"]
    key = f"a name in {_joined(where, place[:-2])}" if place[-1:] == ("[key]",) else _joined(where, place)
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
    elif kind == "literal_error":
        message = not_one_of(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    else:  # "Input should be greater than 0", "Tuple should have at least 1 item after validation, not 0"
        message = f"must {_TYPES.get(kind) or error['msg'].partition(' should ')[2].partition(' after validation')[0]}"
    is_complete = ", got " in message or not message.startswith("must ")
    return placed(key, message if is_complete else f"{message}, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _joined(where: str, place: tuple[int | str, ...]) -> str:
    """The key with dots, as `variants.sgd.sizes[2]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return (where + "".join(parts)).removeprefix(".")


def placed(where: str, message: str) -> str:
    """A message about a section, or about a value if it begins with "must", together with its key."""
    if not where:
        return message
    if message.startswith("unknown key "):
        return message.replace("unknown key ", f"unknown key {where}.", 1)
    return f"{where} {message}" if message.startswith("must ") else f"{where}: {message}"


@contextmanager
def at(where: str) -> Iterator[None]:
    """Puts the key before what is refused inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(placed(where, str(error))) from None


def refuse_unknown(keys: Collection[Any], defaults: Mapping[str, Any], removed: Mapping[str, str] = {}) -> None:
    """Refuses a key that is none of `defaults`; the message shows those that are numbers, texts and the like.

    For a `removed` key the message says what to do instead.
    """
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    for key in keys:
        if key in removed:
            raise ValueError(f"unknown key {key}, which was removed: {removed[key]}")
        if key not in defaults:
            valid = [f"{k} (default {v!r})" if isinstance(v, plain) else k for k, v in defaults.items()]
            raise ValueError(f"unknown key {key}; valid keys are: {', '.join(valid)}{did_you_mean(key, defaults)}")
