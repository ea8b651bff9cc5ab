"""Checkpoints: one file a step, written by rank 0 for all ranks, and read by each of them.

A killed process, a full disk or a lost permission leaves the checkpoint before untouched: a new one is written under
another name, synced and renamed. The checksums in the file (those of zip) are compared before it is used, and nothing
in it is executed (weights_only). The newest file that all ranks can use is taken.
"""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from experiments.distributed.departure import control_group
from experiments.distributed.ranks import Ranks
from experiments.distributed.together import gather
from experiments.records.reading import say
from experiments.runs.checkpoint_files import FORMAT, name_of, names_of_checkpoints, prune, read, write
from experiments.runs.checkpoint_state import State, num_bytes_of, on_cpu

# Errors that another attempt may not meet: a quota that was freed, a server that came back.
TRANSIENT = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ENOSPC", "EDQUOT", "EAGAIN", "EINTR", "EBUSY", "ESTALE", "ETIMEDOUT", "ENXIO", "EREMOTEIO")
    if hasattr(errno, name)
)

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be used; raised on all ranks."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint: what is the same on every rank, and what this rank saved (None where there was no such rank).

    Tensors are on the CPU, those that were sharded whole. `rejected` has newer checkpoints that could not be used, as
    (name of the file, reason).
    """

    step: int
    shared: State
    own: State | None
    world_size_saved: int
    rejected: list[tuple[str, str]]


class Checkpoints:
    """The newest `keep` checkpoints of a run, in one folder that all ranks see; the ranks make this object together."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int = 2) -> None:
        self.folder = Path(folder)
        self._ranks, self._keep = ranks, keep
        self._group = control_group(ranks)  # gloo: the values live on the CPU
        self._unusable: set[str] = set()  # names of checkpoints that were passed over

    # ---- saving

    def save(self, step: int, shared: State, own: State, *, identity: str = "") -> None:
        """Saves a state; on all ranks together.

        Args:
            step: number of the step, in [0, 10^10); the checkpoint with the largest one is the newest.
            shared: the same on every rank, or DTensors, which are gathered.
            own: of this rank.
            identity: text that must be equal on load, as a hash of the configuration.

        Raises:
            TypeError: an entry is neither a tensor nor a plain value, on this rank.
            CheckpointError: the state could not be written; on all ranks.
        """
        is_first = self._ranks.rank == 0
        mine = on_cpu(own, "own", sharded=False)
        whole, every = on_cpu(shared, "shared", keep=is_first), self._gathered(mine)
        failure: Exception | None = None
        if is_first:
            try:
                self._write({"format": FORMAT, "identity": identity, "step": step, "shared": whole, "own": every})
            except Exception as error:  # raised when the other ranks, which wait for this one, know
                failure = error
        text = gather(self._ranks, "" if failure is None else str(failure) or repr(failure), self._group)[0]
        if text:
            raise CheckpointError(text) from failure

    def _write(self, content: State) -> None:
        """Writes a checkpoint, or nothing; after an error that may be gone once more. Then the old ones go."""
        name = name_of(content["step"])
        for is_last in (False, True):
            try:
                write(self.folder / name, content)
                break
            except OSError as error:
                if is_last or error.errno not in TRANSIENT:
                    raise CheckpointError(self._failure(content, error)) from error
                say(f"warning: the checkpoint of step {content['step']} failed ({error}) and is written once more")
        self._unusable.discard(name)
        try:
            prune(self.folder, name, self._keep, self._unusable)
        except OSError as error:
            say(f"warning: old checkpoints in {self.folder} cannot be removed: {error}")

    def _failure(self, content: State, error: OSError) -> str:
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(self.folder).free} bytes are free"
        return (
            f"the checkpoint of step {content['step']} cannot be written to {self.folder}: {error}; it needs "
            f"{num_bytes_of(content)} bytes{free}; the checkpoints before it are untouched"
        )

    # ---- loading

    def load(self, *, identity: str = "") -> Loaded | None:
        """Loads the newest checkpoint that all ranks can use, on all ranks together; those passed over are named.

        The number of ranks may differ from the one that saved. Returns None where there is no checkpoint at all.

        Raises:
            ValueError: all checkpoints belong to runs of another identity.
            CheckpointError: there are checkpoints, and none can be used; or rank 0 cannot read the folder.
        """
        rejected: list[tuple[str, str]] = []
        num_strangers = 0
        is_first = self._ranks.rank == 0
        names: list[str] = []
        problem = ""
        if is_first:
            try:
                names = names_of_checkpoints(self.folder)
            except OSError as error:  # the other ranks must not wait for the names
                problem = str(error)
        names, problem = gather(self._ranks, (names, problem), self._group)[0]
        if problem:
            raise CheckpointError(problem)
        for name in names:
            content, reason = None, ""
            try:
                content = read(self.folder / name)
            except ValueError as error:
                reason = str(error)
            reasons = gather(self._ranks, reason, self._group)
            if not any(reasons):
                assert content is not None
                if content["identity"] == identity:
                    own, rank = content["own"], self._ranks.rank
                    mine = own[rank] if rank < len(own) else None
                    return Loaded(content["step"], content["shared"], mine, len(own), rejected)
                num_strangers += 1
                reasons = [f"it was saved by another run (identity {content['identity']!r}, not {identity!r})"]
            rank, reason = next((rank, text) for rank, text in enumerate(reasons) if text)
            reason += f" (rank {rank})" if len(set(reasons)) > 1 else ""
            rejected.append((name, reason))
            self._unusable.add(name)
            if is_first:
                say(f"checkpoint {name} is not used: {reason}")
        if not rejected:
            return None
        advice = "give the run another folder, or delete them to start from the beginning"
        if num_strangers == len(rejected):
            raise ValueError(f"the checkpoints in {self.folder} cannot be used: {rejected[0][1]}; {advice}")
        every = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        raise CheckpointError(f"no checkpoint in {self.folder} can be used ({every}); {advice}")

    # ---- between ranks

    def _gathered(self, mine: T) -> list[T]:
        """What each rank has, by rank, on rank 0; nothing on the others."""
        if self._ranks.world_size == 1:
            return [mine]
        found: list[Any] | None = [None] * self._ranks.world_size if self._ranks.rank == 0 else None
        dist.gather_object(mine, found, dst=0, group=self._group)
        return found or []
