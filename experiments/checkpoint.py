"""Checkpoints: saved by all ranks together, whole or not at all, and loaded by all ranks from the same folder.

A killed process, a full disk or a lost permission leaves the checkpoint before untouched: a new one is written under
another name, synced, ended with a manifest and renamed. The newest that all ranks can verify and read is taken.

What W ranks ask of the file system. Saving: rank 0 writes and syncs shared.pt, the manifest and two folders, and each
rank its own small file, all at once. Loading: each rank reads shared.pt once, W times its size in all, of which the
file system reads one from disk, and its own file. All of W's replies travel to all ranks, some hundred bytes each.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from experiments import checkpoint_files as files
from experiments import checkpoint_folder as folders
from experiments.checkpoint_folder import Finding, verify_folder
from experiments.departure import background_group, control_group
from experiments.launch import Ranks
from experiments.state import (
    Encoded,
    State,
    architecture_of,
    check_template,
    decode,
    digest,
    encode,
    layouts_of,
    rng_state,
    set_rng_state,
    targets_of,
)

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Finding",
    "Loaded",
    "State",
    "digest",
    "rng_state",
    "set_rng_state",
    "verify_folder",
]

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
    """A checkpoint.

    Attributes:
        step: as saved.
        shared: the same on every rank, tensors on the CPU, DTensors as the template has them.
        own: what this rank saved, None where there was no such rank.
        world_size_saved: number of ranks that saved it.
        folder: its folder.
        rejected: newer checkpoints that could not be used, (name of the folder, reason).
    """

    step: int
    shared: State
    own: State | None
    world_size_saved: int
    folder: Path
    rejected: list[tuple[str, str]]


class _Failure(NamedTuple):
    """An error of one rank, for the others."""

    text: str
    is_transient: bool


class _FailedTogether(Exception):
    """Raised on all ranks after an error on some of them."""

    def __init__(self, failures: dict[int, _Failure], world_size: int) -> None:
        rank, first = min(failures.items())
        is_of_all = len(failures) == world_size and len(set(failures.values())) == 1
        super().__init__(first.text if is_of_all else f"{first.text} (rank {rank})")
        self.is_transient = all(failure.is_transient for failure in failures.values())


class _Job(NamedTuple):
    """What one call of `save` writes."""

    step: int
    shared: Encoded
    own: Encoded
    best: bool
    identity: str
    num_bytes: int  # of all ranks


class _Read(NamedTuple):
    """What a rank has read of a checkpoint before the DTensors are filled."""

    shared: State
    own: State | None
    targets: dict[str, Tensor]  # the DTensors in `shared`
    metadata: Any  # of torch.distributed.checkpoint


class Checkpoints:
    """The checkpoints of a run in one folder, `<folder>/step-<step>/`.

    Attributes:
        write_seconds: the longest that the thread of an asynchronous one took.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int = 2, asynchronous: bool = False) -> None:
        """Made by all ranks together; it uses `control_group`, and where asynchronous `background_group`.

        Args:
            folder: on a file system that all ranks see; made when the first checkpoint is saved.
            ranks: this process.
            keep: number of newest checkpoints to keep, >= 1; the best one stays as well.
            asynchronous: whether `save` copies the state and leaves the writing to a thread.

        Raises:
            ValueError: keep is less than 1.
        """
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be an integer >= 1, got {keep!r}")
        self.folder = Path(folder)
        self._ranks, self._keep, self._asynchronous = ranks, keep, asynchronous
        # Gloo: the values live on the CPU. A thread has a group to itself, and `save`, `wait` and `load` see to it that
        # the main thread uses it only while there is no thread.
        self._group = background_group(ranks) if asynchronous else control_group(ranks)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.write_seconds = 0.0
        self._unusable: set[str] = set()  # names of checkpoints that were passed over

    def save(self, step: int, shared: State, own: State, *, best: bool = False, identity: str = "") -> None:
        """Saves a state; on all ranks together.

        Args:
            step: number of the step, >= 0; the checkpoint with the largest one is the newest.
            shared: the same on every rank (rank 0 writes it), or DTensors (every rank writes its part).
            own: of this rank.
            best: whether this is the best so far, which stays until a later one is.
            identity: text that must be equal on load, as a hash of the configuration.

        Raises:
            TypeError: an entry is neither a tensor nor a plain value, on this rank.
            CheckpointError: the state could not be written, or the one before it, if asynchronous; on all ranks.
        """
        self.wait()
        job = self._prepare(step, shared, own, best, identity)
        if not self._asynchronous:
            self._write(job)
            return

        def run() -> None:
            start = time.monotonic()
            try:
                self._write(job)
            except BaseException as error:
                self._error = error
            self.write_seconds = max(self.write_seconds, time.monotonic() - start)

        # A daemon, for a process that fails must not wait for it; the others do so in `wait`.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            CheckpointError: it could not be written; on all ranks, and once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """The same as `wait`; to be called at the end of a run."""
        self.wait()

    def load(self, *, identity: str = "", template: State | None = None) -> Loaded | None:
        """Loads the newest checkpoint that all ranks can use, on all ranks together; those passed over are named.

        The number of ranks may differ from the one that saved: `shared` is loaded by all, DTensors are cut anew.

        Args:
            identity: of this run, compared with what was saved.
            template: what is known of `shared`: below each of its keys, the tensors must have the names, shapes and
                dtypes of those saved. Where it has DTensors, new ones of the same placement are loaded; without one,
                a saved DTensor is loaded whole.

        Returns:
            The checkpoint, None where there is none at all.

        Raises:
            ValueError: all checkpoints belong to runs of another identity.
            CheckpointError: there are checkpoints, and none can be used.
        """
        self.wait()
        try:
            manifests = self._from_first(self._manifests)
        except _FailedTogether as error:
            raise CheckpointError(f"the checkpoints in {self.folder} cannot be listed: {error}") from None
        rejected: list[tuple[str, str]] = []
        num_strangers = 0
        for name, manifest, reason in manifests:
            if manifest is not None and manifest["identity"] != identity:
                num_strangers += 1
                reason = f"it was saved by another run (identity {manifest['identity']!r}, not {identity!r})"
            if not reason:
                assert manifest is not None
                try:
                    shared, own = self._read(self.folder / name, manifest, template)
                except _FailedTogether as error:
                    reason = str(error)
                else:
                    world_size = manifest["world_size"]
                    return Loaded(manifest["step"], shared, own, world_size, self.folder / name, rejected)
            rejected.append((name, reason))
            self._unusable.add(name)
            if self._ranks.rank == 0:
                folders.note(f"checkpoint {name} is not used: {reason}")
        if not rejected:
            return None
        advice = "give the run another folder, or delete them to start anew"
        if num_strangers == len(rejected):
            raise ValueError(f"the checkpoints in {self.folder} cannot be used: {rejected[0][1]}; {advice}")
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        raise CheckpointError(f"no checkpoint in {self.folder} can be used ({reasons}); {advice}")

    # Agreement between ranks

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Runs an action on each rank and returns the results by rank; an error on one of them is raised on all."""
        outcome, cause = _outcome_of(action)
        outcomes: list[Any] = [outcome]
        if self._ranks.world_size > 1:
            outcomes = [None] * self._ranks.world_size
            with self._naming_losses():
                dist.all_gather_object(outcomes, outcome, group=self._group)
        failures = {rank: failed for rank, (_, failed) in enumerate(outcomes) if failed is not None}
        if failures:
            raise _FailedTogether(failures, self._ranks.world_size) from cause
        return [result for result, _ in outcomes]

    def _from_first(self, action: Callable[[], T]) -> T:
        """Runs an action on rank 0 and returns its result on all ranks; an error is raised on all."""
        outcome, cause = _outcome_of(action) if self._ranks.rank == 0 else (None, None)
        outcomes: list[Any] = [outcome]
        if self._ranks.world_size > 1:
            with self._naming_losses():
                dist.broadcast_object_list(outcomes, src=0, group=self._group)
        [(result, failure)] = outcomes
        if failure is not None:
            raise _FailedTogether({0: failure}, self._ranks.world_size) from cause
        return cast(T, result)

    @contextmanager
    def _naming_losses(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of gloo
            raise CheckpointError(f"a rank was lost among the checkpoints in {self.folder} ({error})") from error

    # Writing

    def _prepare(self, step: int, shared: State, own: State, best: bool, identity: str) -> _Job:
        """Takes the state apart and checks that all ranks save the same kind of state."""
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**15:
            raise ValueError(f"step must be an integer in [0, 10^15), got {step!r}")

        encoded: list[Encoded] = []

        def encode_both() -> tuple[int, str, int]:
            # What is replicated is written by rank 0; the others need only its names and shapes.
            is_first = self._ranks.rank == 0
            encoded.append(encode(shared, "shared", copy=self._asynchronous, shards_only=not is_first))
            encoded.append(encode(own, "own", copy=self._asynchronous))
            of_all, of_rank = encoded
            if of_rank.sharded:
                raise TypeError(f"{next(iter(of_rank.sharded))} is a DTensor, which belongs into the shared state")
            return step, architecture_of(of_all.layouts), of_all.num_bytes + of_rank.num_bytes

        try:
            reports = self._together(encode_both)
        except _FailedTogether as error:
            if isinstance(error.__cause__, TypeError):
                raise error.__cause__ from None
            raise CheckpointError(f"the checkpoint of step {step} was not written: {error}") from error.__cause__
        for rank, (other_step, architecture, _) in enumerate(reports):
            if (other_step, architecture) != reports[0][:2]:
                what = f"step {other_step}" if other_step != reports[0][0] else "tensors of other names or shapes"
                raise CheckpointError(
                    f"the checkpoint of step {reports[0][0]} was not written: rank {rank} saves {what}, unlike rank 0"
                )
        return _Job(step, encoded[0], encoded[1], best, identity, sum(num_bytes for _, _, num_bytes in reports))

    def _write(self, job: _Job) -> None:
        try:
            self._attempt(job)
            return
        except _FailedTogether as error:
            if not error.is_transient:
                raise self._error_of(job, error) from error.__cause__
            if self._ranks.rank == 0:
                folders.note(f"warning: the checkpoint of step {job.step} failed ({error}) and is written once more")
        try:
            self._attempt(job)
        except _FailedTogether as error:
            raise self._error_of(job, error) from error.__cause__

    def _error_of(self, job: _Job, error: Exception) -> CheckpointError:
        try:
            free = f", {shutil.disk_usage(self.folder).free} bytes are free"
        except OSError:
            free = ""
        return CheckpointError(
            f"the checkpoint of step {job.step} cannot be written to {self.folder}: {error}; it needs {job.num_bytes} "
            f"bytes{free}; the checkpoints before it are untouched"
        )

    def _attempt(self, job: _Job) -> None:
        """Writes one checkpoint, or nothing."""
        has_shards = bool(job.shared.sharded)
        temporary: Path | None = None
        try:
            temporary = self._from_first(lambda: folders.make_temporary(self.folder, job.step, has_shards))
            entries = self._written(job, temporary)
            self._from_first(partial(self._publish, job, temporary, entries))
        except _FailedTogether:
            if temporary is not None:
                self._from_first(partial(shutil.rmtree, temporary, ignore_errors=True))
            raise
        except BaseException:  # an interrupt, or a rank was lost; removed only by the one who may be renaming it
            if temporary is not None and self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _written(self, job: _Job, temporary: Path) -> dict[str, files.FileEntry]:
        """Writes all files but the manifest."""
        rank = self._ranks.rank

        def write_states() -> dict[str, files.FileEntry]:
            written = {}
            if rank == 0:
                written[files.SHARED] = files.write_state(temporary / files.SHARED, job.shared)
            name = folders.rank_file(rank)
            written[name] = files.write_state(temporary / name, job.own)
            return written

        def write_shards() -> dict[str, files.FileEntry]:
            files.write_shards(temporary, job.shared.sharded, self._group)
            return files.shards_of(temporary, rank)

        entries: dict[str, files.FileEntry] = {}
        for action in (write_states, write_shards) if job.shared.sharded else (write_states,):
            for written in self._together(action):
                entries |= written
        return entries

    def _publish(self, job: _Job, temporary: Path, entries: Mapping[str, files.FileEntry]) -> None:
        architecture = architecture_of(job.shared.layouts)
        folders.publish(
            temporary,
            folders.new_manifest(job.step, self._ranks.world_size, job.identity, architecture, job.best, entries),
        )
        try:
            folders.prune(self.folder, job.step, self._keep, self._unusable)
        except OSError as error:
            folders.note(f"warning: old checkpoints in {self.folder} cannot be removed: {error}")

    # Reading

    def _manifests(self) -> list[tuple[str, dict[str, Any] | None, str]]:
        """(name, manifest, reason for not using it), newest first."""
        listed: list[tuple[str, dict[str, Any] | None, str]] = []
        for name in folders.names_of_checkpoints(self.folder):
            try:
                listed.append((name, folders.read_manifest(self.folder / name), ""))
            except ValueError as error:
                listed.append((name, None, str(error)))
        return listed

    def _read(self, folder: Path, manifest: Mapping[str, Any], template: State | None) -> tuple[State, State | None]:
        """Verifies and reads one checkpoint, on all ranks together."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        own_name = folders.rank_file(rank) if rank < manifest["world_size"] else None
        read_by_rank = {files.SHARED, *(folders.rank_file(other) for other in range(world_size))}
        others = [name for name in manifest["files"] if name not in read_by_rank]

        def read_states() -> _Read:
            """Reads and verifies what this rank needs as a whole, and verifies a fair part of the other files."""
            content = folders.read_verified(folder, manifest, files.SHARED)
            of_rank = None if own_name is None else folders.read_verified(folder, manifest, own_name)
            folders.verify_files(folder, manifest, others[rank::world_size])
            targets = targets_of(content.tree, template)
            shared = decode(content.tree, content.tensors, targets)
            layouts = layouts_of(shared, "shared")
            if architecture_of(layouts) != manifest["architecture"]:
                raise ValueError(f"the tensors in {files.SHARED} are not those that {folders.MANIFEST} speaks of")
            check_template(layouts, template)
            metadata = files.read_metadata(folder, manifest["files"]) if targets else None
            own = None if of_rank is None else decode(of_rank.tree, of_rank.tensors, {})
            return _Read(shared, own, targets, metadata)

        read: list[_Read] = []
        self._together(lambda: read.append(read_states()))
        shared, own, targets, metadata = read[0]
        if targets:  # the tensors are in the state already, and are filled now
            self._together(lambda: files.read_shards(folder, metadata, targets, self._group))
        return shared, own


def _outcome_of(action: Callable[[], T]) -> tuple[tuple[T | None, _Failure | None], Exception | None]:
    """Result and failure, which can be sent to other ranks, and the error itself, which cannot."""
    try:
        return (action(), None), None
    except Exception as error:
        return (None, _Failure(_text_of(error), _is_transient(error))), error


def _text_of(error: BaseException) -> str:
    if isinstance(error, (OSError, ValueError, TypeError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in TRANSIENT
