"""Arguments of the published package (AADL) that have no meaning of their own here, so that its scripts run.

docs/porting.md has the whole table.
"""

from __future__ import annotations

import warnings
from typing import Any

AFTER_AVERAGE = (
    "history_device", "compute_device", "mixing_dtype", "equilibrate", "filter_condition", "refinement_steps",
)  # fmt: skip
"""What the published package takes by position after `average`."""
WITHOUT_EFFECT: dict[str, tuple[tuple[str, ...], str]] = {
    "compute_device": (("cpu", "cuda"), "the vectors are combined where they lie"),
    "mixing_dtype": (("None", "float64", "torch.float64"), "the mixing problem is in float64"),
    "equilibrate": (("True",), "columns are always scaled to unit length"),
    "filter_condition": (("0", "0.0"), "old columns and small eigenvalues are always left out"),
    "refinement_steps": (("0",), "the mixing problem is in float64"),
    "distributed": (("True", "False"), "ranks are found through torch.distributed, see process_group"),
    "sync_frequency": (("1",), "ranks decide together at every acceleration; local_sgd is for weights of their own"),
    "vote_threshold": ((), "with local_sgd more than half of the ranks decide"),
    "debug": (("False",), "aadl.accelerator_of(optimizer).statistics tells what happened"),
}
"""Argument: the values (as text) that ask for what happens anyway, and what does happen."""
SKETCH = "every element enters the inner products, in one pass over memory"
"""In place of all arguments sketch_..., which do nothing in the published package either while sketch_fraction is 1."""


def translated(positional: tuple[Any, ...], named: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Add the published package's arguments after `average` to `settings`; warn once of all that have no effect.

    Args:
        positional: safeguard (True or False), or history_device and those that follow it.
        named: arguments that `aadl.accelerate` does not have.
        settings: the ones that it has.

    Raises:
        TypeError: an argument that the published package does not have either, or that is given twice.
    """
    names = ("safeguard",) if len(positional) == 1 and isinstance(positional[0], bool) else AFTER_AVERAGE
    if len(positional) > len(names):
        raise TypeError(f"accelerate() takes at most {9 + len(names)} positional arguments, got {9 + len(positional)}")
    given = dict(zip(names, positional, strict=False))
    for name in given:
        if name in named or settings.get(name) not in (None, True):
            raise TypeError(f"accelerate() got multiple values for argument {name!r}")
    rest = named | {name: value for name, value in given.items() if name not in settings}
    _warn_of(rest)
    return settings | {name: value for name, value in given.items() if name in settings}


def _warn_of(named: dict[str, Any]) -> None:
    """Warn of arguments that ask for something that does not happen here."""
    whole = named.get("sketch_fraction", 1) == 1
    ignored = []
    for name, value in named.items():
        if not (name in WITHOUT_EFFECT or name.startswith("sketch_")):
            raise TypeError(f"accelerate() got an unexpected keyword argument {name!r}")
        same, instead = WITHOUT_EFFECT.get(name, ((), SKETCH))
        text = str(value).partition(":")[0]  # cuda:0
        if text not in same and not (name.startswith("sketch_") and whole):
            ignored.append(f"{name}={value!r} ({instead})")
    if ignored:
        warnings.warn(f"arguments without effect in aadl: {'; '.join(ignored)}", UserWarning, stacklevel=4)
