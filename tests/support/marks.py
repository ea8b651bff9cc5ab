"""The marks of a test that follow from where it stands and what it starts: `make test` leaves out what is slow."""

from collections.abc import Collection
from pathlib import PurePath

FOLDERS = ("cluster", "faults", "cli", "ranks")
"""Folders whose tests start processes. Their marks have these names, and a test that is no smoke test is slow."""
NEEDS = ("slurm", "mpi", "lsf")
"""Folders of tests/cluster. The marks have these names."""


def marks(path: PurePath, given: Collection[str], fixtures: Collection[str] = ()) -> list[str]:
    """The marks that a test gets beside those it has.

    Args:
        path: of its file, from the folder of all tests.
        given: names of the marks it has.
        fixtures: names of what it uses; a test of units that spawns ranks is one of ranks, too.
    """
    folders = {*path.parts[:-1], *(["ranks"] if "spawn_ranks" in fixtures else [])}
    found = [name for name in FOLDERS + NEEDS if name in folders]
    return found + ["slow"] * (bool(found) and "smoke" not in given)


def place(path: PurePath) -> int:
    """Where the file starts when several processes share the tests: those with long tests first."""
    return next((index for index, name in enumerate(FOLDERS) if name in path.parts), len(FOLDERS))
