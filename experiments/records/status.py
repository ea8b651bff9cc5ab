"""When a run is done: where its record is, and whether it must be made. It imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from experiments.records.hdf5 import DamagedRecord, IncompleteRecord, UnreadableRecord, opened
from experiments.records.reading import has_groups, read_run
from experiments.settings.run_config import RunConfig

CHECKPOINT_NAME = re.compile(r"step-(\d{10})(-best)?\.pt")
"""Of a file from which a run goes on; a former version marked the best one, and left others behind."""


def run_path(results: Path, config: RunConfig) -> Path:
    """`results/<experiment>/<scale>/<name>/seed-<s>.h5`."""
    return results / config.experiment / config.scale / config.name / f"seed-{config.seed}.h5"


def tensorboard_folder(path: Path) -> Path:
    """Where the event files of a run are, beside its record."""
    return path.with_suffix(".tensorboard")


def run_folder(path: Path) -> Path:
    """Where a run that is not finished keeps its checkpoints, beside its record."""
    return path.with_suffix(".run")


def _has_checkpoints(folder: Path) -> bool:
    return any(CHECKPOINT_NAME.fullmatch(path.name) for path in folder.glob("step-*"))


def state_of(path: Path, config: RunConfig, data_digest: str, world_size: int, parts: Collection[str] = ()) -> str:
    """Whether the run must be made: "finished", "unfinished", "missing", "changed", "damaged" or "without parts".

    "unfinished" means that the run has checkpoints from which it goes on. "changed" means other settings, other data or
    another number of ranks: each changes the numbers. A label does not, nor does an override that says what holds for
    all variants. "damaged" includes a record without an end. "without parts" is a finished run whose record lacks one
    of the groups `parts`, as those of `SaveConfig.parts`.

    Raises:
        RecordError: there is a file, and it cannot be opened here or now, or is none of this suite's records; it may
            be worth more than a new one, so nothing replaces it.
    """
    if _has_checkpoints(run_folder(path)):
        return "unfinished"
    state = _state_of_record(path, config, data_digest, world_size)
    return "without parts" if parts and state == "finished" and not has_groups(path, parts) else state


def is_finished(path: Path, config: RunConfig, data_digest: str, world_size: int) -> bool:
    """Whether there is a complete record of this very run.

    True for a file that cannot be opened now, too: it may be such a record, and the caller must not replace it.
    """
    try:
        return _state_of_record(path, config, data_digest, world_size) == "finished"
    except UnreadableRecord:
        return True


def _state_of_record(path: Path, config: RunConfig, data_digest: str, world_size: int) -> str:
    try:
        run = read_run(path)
        recorded = config.identity_of(run.config)
    except FileNotFoundError:
        return "missing"
    except (DamagedRecord, IncompleteRecord):
        return "damaged"
    except (KeyError, ValueError):  # of another version of this program
        return "changed"
    identity = (recorded, run.attributes.get("data_digest"), run.attributes.get("world_size"))
    return "finished" if identity == (config.identity(), data_digest, world_size) else "changed"


def states_of_folder(folder: Path) -> dict[tuple[str, int], str]:
    """The state of every run in `results/<experiment>/<scale>`, by name and seed; settings are not compared.

    "finished"; "stopped", where checkpoints wait for the same command; "unfinished", where a record has no end and no
    checkpoint is left; "unreadable".
    """
    states: dict[tuple[str, int], str] = {}
    for path in sorted(folder.glob("*/seed-*")):
        seed = path.stem.removeprefix("seed-")
        if path.suffix not in (".h5", ".run") or not seed.isdecimal():
            continue
        run = (path.parent.name, int(seed))
        if path.suffix == ".h5":
            states.setdefault(run, _completeness(path))
        elif _has_checkpoints(path):
            states[run] = "stopped"
    return states


def _completeness(path: Path) -> str:
    try:
        with opened(path) as file:
            return "finished" if file.attrs.get("complete") else "unfinished"
    except OSError:
        return "unreadable"
