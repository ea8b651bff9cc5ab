"""What happens around the calls of the system by which a checkpoint is written, for tests that let one fail."""

import os

import torch

from experiments.runs import checkpoint

CALLS = {"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace"), "unlink": (os, "unlink")}
POINTS = tuple(f"{moment} {name}" for name in CALLS for moment in ("before", "after"))
"""In the order in which a save meets them for the first time; the last two where an old checkpoint is removed."""


def meet_points(meet):
    """Calls `meet` with the name of each point of writing a checkpoint from now on, in this process."""
    writing = []

    def during(function):
        def entered(*arguments, **options):
            writing.append(function)
            try:
                return function(*arguments, **options)
            finally:
                writing.pop()

        return entered

    def around(name, function):
        def called(*arguments, **options):
            if not writing:
                return function(*arguments, **options)
            meet(f"before {name}")
            result = function(*arguments, **options)
            meet(f"after {name}")
            return result

        return called

    for name in ("write", "prune"):
        setattr(checkpoint, name, during(getattr(checkpoint, name)))
    for name, (module, attribute) in CALLS.items():
        setattr(module, attribute, around(name, getattr(module, attribute)))
