"""What a message says about an unknown name: which names there are, and which one was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """Returns "; did you mean NAME?" with the closest of the valid names, or "" where none is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def not_one_of(name: object, valid: Collection[str]) -> str:
    """Returns "must be one of NAMES, got NAME", with the name that was probably meant."""
    return f"must be one of {', '.join(valid)}, got {name!r}{did_you_mean(name, valid)}"
