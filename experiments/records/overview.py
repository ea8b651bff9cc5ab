"""How many runs of a folder are finished, by what the records say of themselves. It imports no torch."""

from __future__ import annotations

from pathlib import Path

from experiments.records.hdf5 import opened


def states_of_folder(folder: Path) -> dict[tuple[str, int], str]:
    """The state of every run in `results/<experiment>/<scale>`, by name and seed.

    The settings are not compared, which `experiments.records.status.state_of` does.

    Returns:
        "finished"; "stopped", where checkpoints wait for the same command; "unfinished", where a record has no end and
        no checkpoint is left; "unreadable".
    """
    states: dict[tuple[str, int], str] = {}
    for path in sorted(folder.glob("*/seed-*")):
        seed = path.stem.removeprefix("seed-")
        if path.suffix not in (".h5", ".run") or not seed.isdecimal():
            continue
        run = (path.parent.name, int(seed))
        if path.suffix == ".h5":
            states.setdefault(run, _state_of_record(path))
        elif any(path.glob("step-*")):
            states[run] = "stopped"
    return states


def _state_of_record(path: Path) -> str:
    try:
        with opened(path) as file:
            return "finished" if file.attrs.get("complete") else "unfinished"
    except OSError:
        return "unreadable"
