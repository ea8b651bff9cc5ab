"""Environment variables as numbers, with one sentence where they are none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def first(env: Mapping[str, str], names: Sequence[str], minimum: int, default: int | None) -> int:
    """Returns the first of these variables that is set, or the default; ValueError if there is neither."""
    for name in names:
        if name in env:
            return integer(env, name, minimum)
    if default is None:
        raise ValueError(
            f"environment variable {' or '.join(names)} is missing, so the rank within its node is unknown"
        )
    return default


def integer(env: Mapping[str, str], name: str, minimum: int) -> int:
    """Returns a variable as an integer; ValueError if it is none or too small."""
    text = env[name]
    if re.fullmatch(r"\s*\d+\s*", text, re.ASCII) is None or int(text) < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {text!r}")
    return int(text)


def port_of(env: Mapping[str, str], name: str) -> int:
    """Returns a variable as a port; ValueError if it is none."""
    port = integer(env, name, 1)
    if port > 65535:
        raise ValueError(f"{name} must be an integer in [1, 65535], got {port}")
    return port
