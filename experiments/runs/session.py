"""A run on disk: it resumes from its checkpoint, saves itself on the way, and stops on all ranks at the same step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from torch import Tensor

from aadl.deferred import Deferred
from experiments.distributed.departure import Interrupted, RanksDisagree
from experiments.distributed.interruption import OF_ANOTHER_RANK, Interruption
from experiments.distributed.ranks import Ranks
from experiments.distributed.step_vote import StepVote
from experiments.distributed.together import by_first
from experiments.records.reading import say
from experiments.runs.checkpoint import Checkpoints
from experiments.runs.checkpoint_files import identity_of, names_of_checkpoints, remove_checkpoints
from experiments.runs.checkpoint_state import rng_state, set_rng_state
from experiments.runs.lock import STALE_SECONDS, FolderLock
from experiments.settings.run_config import RunConfig, SaveConfig
from experiments.training.result import Result
from experiments.training.train import Training

PUBLISH_SECONDS = 10.0
"""Least time between two versions of the record of an unfinished run, each of which is a whole file."""


class OtherRun(ValueError):
    """The checkpoints are of a run with other settings or data."""


def identity_of_checkpoints(config: RunConfig, data_digest: str, ranks: Ranks) -> str:
    """Hash of what must not change before a run resumes: settings, data, and the batch over all ranks."""
    batch = config.kind.global_batch(config.training, ranks) or ""
    return hashlib.sha256(f"{config.identity()} {data_digest} {batch}".encode()).hexdigest()[:16]


def check_checkpoints(folder: Path, config: RunConfig, data_digest: str, ranks: Ranks) -> None:
    """Raises OtherRun, before any run is made, where every readable checkpoint in a folder belongs to another run."""
    identity = identity_of_checkpoints(config, data_digest, ranks)
    others = []
    for name in names_of_checkpoints(folder):
        with suppress(ValueError):  # `load` names the damaged ones
            found = identity_of(folder / name)
            if found == identity:
                return
            others.append(name)
    if others:
        raise OtherRun(_other_run(f"{folder / others[0]} was saved by another run"))


def _other_run(what: str) -> str:
    return (
        f"{what}: its settings, its data or its batch over all ranks have changed; go back to them, keep both apart "
        "with --set scale=NAME, or start from the beginning with --force"
    )


class FiniteLosses:
    """Says whether the losses were finite, some steps late, so that the host does not wait for a device."""

    def __init__(self) -> None:
        self._pending: list[Deferred] = []
        self._finite = True

    def __call__(self, loss: Tensor) -> bool:
        """Takes the present loss; returns whether those of two steps ago and before were finite."""
        self._pending.append(Deferred(loss.isfinite().all()))
        if len(self._pending) > 2:
            self._finite = self._finite and bool(self._pending.pop(0).value())
        return self._finite


class RunSession:
    """Context manager around one run on disk; all ranks make it together.

    A run has a folder beside its record, which holds checkpoints and a lock. The folder goes when the run is finished.

    Args:
        folder: of this run alone.
        config: what determines the run, with the data: a checkpoint of another one is refused.
        ranks: this process.
        data_digest: of the data.
        save: how often to save, and how many checkpoints to keep.
        interruption: says whether to stop.
        publish: writes the record of the unfinished run; called on rank 0.
        from_start: whether to remove the checkpoints that are there.
        timeout_seconds: how long the ranks wait for each other.

    Attributes:
        start: when the run began, in the first process that had it; UTC.
        num_restores: how often the run has resumed.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        ranks: Ranks,
        data_digest: str,
        save: SaveConfig,
        interruption: Interruption,
        publish: Callable[[Result], None],
        *,
        from_start: bool = False,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.folder, self._ranks, self._save_settings = folder, ranks, save
        self._interruption, self._publish, self._from_start = interruption, publish, from_start
        self._identity = identity_of_checkpoints(config, data_digest, ranks)
        self._finite = FiniteLosses()
        self._lock = FolderLock(folder, f"run {config.name}, seed {config.seed}", ranks) if ranks.rank == 0 else None
        self._checkpoints = Checkpoints(folder, ranks, keep=save.keep)
        self._timeout_seconds = timeout_seconds
        self._vote = StepVote(ranks, timeout_seconds=timeout_seconds)
        self._saved_at = self._published_at = time.monotonic()
        self._last_step = -1  # that was saved
        self._seen_step = 0
        self._save_seconds = 0.0  # the longest
        self.start = datetime.now(timezone.utc)
        self.num_restores = 0

    def __enter__(self) -> RunSession:
        # Another job that died a moment ago is waited out, which takes longer than a collective may.
        seconds = self._timeout_seconds + 2 * STALE_SECONDS
        try:
            by_first(self._ranks, self._take_folder, "locking the folder of the run", seconds)
        except BaseException:  # of another rank too, which may have been late
            if self._lock is not None:
                self._lock.release()
            raise
        return self

    def _take_folder(self) -> None:
        assert self._lock is not None
        self._lock.acquire()
        if self._lock.note:
            say(self._lock.note)
        if self._from_start:
            remove_checkpoints(self.folder)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._vote.result()  # of the last step
                if self._ranks.rank == 0:
                    remove_checkpoints(self.folder)
        finally:
            if self._lock is not None:
                self._lock.release()
        if kind is None and self._ranks.rank == 0:
            with suppress(OSError):  # somebody else is there by now
                self.folder.rmdir()

    def restore(self, run: Training) -> bool:
        """Puts the run where it was saved last; returns False if it was never saved.

        Raises:
            OtherRun: the checkpoints are of another run.
            CheckpointError: none of them can be used.
        """
        try:
            loaded = self._checkpoints.load(identity=self._identity)
        except ValueError as error:
            raise OtherRun(_other_run(str(error))) from None
        if loaded is None:
            return False
        # With other ranks, what each had for itself belongs to another division of the work.
        own = loaded.own if loaded.world_size_saved == self._ranks.world_size else None
        run.load_state(loaded.shared["run"], own["run"] if own is not None else None)
        if own is not None:
            set_rng_state(own["rng"])
        self.start = datetime.fromisoformat(loaded.shared["start"])
        self.num_restores = loaded.shared["num_restores"] + 1
        self._last_step = self._seen_step = loaded.step
        if self._ranks.rank == 0:
            other = f", saved by {loaded.world_size_saved} ranks" * (loaded.world_size_saved != self._ranks.world_size)
            say(f"taken up again after step {loaded.step}{other}: {self.folder.parent.name}/{self.folder.stem}")
        return True

    def after_step(self, run: Training, loss: Tensor) -> None:
        """Saves when it is time, or saves and stops when a rank was asked to; all ranks do so after the same step.

        Raises:
            Interrupted: the run was saved and must end.
            RanksDisagree: the ranks are at different steps, or one is gone.
        """
        if run.num_steps != self._seen_step + 1:
            # The others are in the collectives of a step that this rank left out, so a vote would not reach them.
            text = f"rank {self._ranks.rank} went from step {self._seen_step} to step {run.num_steps}"
            raise RanksDisagree(f"the ranks are at different steps: {text}")
        self._seen_step = run.num_steps
        tally = self._vote.result()
        if tally is not None and not tally.finite:
            run.is_lost = True  # all ranks end the interval here, and record that the run diverged
            return
        if tally is not None and tally.stop:
            self._stop(run)
        if tally is not None and tally.save:
            self.save(run)
        # How often the loss was asked for tells whether the ranks took the same decisions.
        stop = bool(self._interruption.reason)
        self._vote.cast(run.num_steps, stop, self._finite(loss), run.closure.evaluations, save=self._is_time())

    def after_interval(self, run: Training) -> None:
        """Publishes the record now and then, and saves when it is time."""
        if self._ranks.rank == 0 and time.monotonic() - self._published_at > PUBLISH_SECONDS:
            self._publish_unfinished(run)
        # An evaluation cannot be stopped, so the run must stop before one that may reach beyond the end of the job.
        margin = run.longest_evaluation + 3 * self._save_seconds
        self._interruption.margin_seconds = max(self._interruption.margin_seconds, margin)
        self._vote.result()
        stop = bool(self._interruption.reason)
        tally = self._vote.vote_now(run.num_steps, stop, True, run.closure.evaluations, save=self._is_time())
        if tally.stop and run.goes_on:
            self._stop(run)
        if tally.save and run.goes_on:
            self.save(run)

    def _is_time(self) -> bool:
        """Whether to save, by the clock of rank 0."""
        return self._ranks.rank == 0 and time.monotonic() - self._saved_at > self._save_settings.every_seconds

    def _stop(self, run: Training) -> None:
        self.save(run)
        reason = self._interruption.reason or OF_ANOTHER_RANK
        raise Interrupted(f"stopped by {reason} after step {run.num_steps}; the state is saved")

    def save(self, run: Training) -> None:
        """Saves the run, unless it was saved at this very step. Rank 0 publishes the record as well."""
        start = self._saved_at = time.monotonic()
        if run.num_steps == self._last_step:
            return
        self.check_lock()
        with run.clock.stopped():
            shared, own = run.state()
            self._checkpoints.save(
                run.num_steps,
                {"run": shared, "start": self.start.isoformat(), "num_restores": self.num_restores},
                {"run": own, "rng": rng_state()},
                identity=self._identity,
            )
        self._last_step = run.num_steps
        self._saved_at = time.monotonic()  # saving is no time of training
        self._save_seconds = max(self._save_seconds, self._saved_at - start)
        if self._ranks.rank == 0:
            self._publish_unfinished(run)

    def check_lock(self) -> None:
        """Raises FolderInUse, on rank 0, where another job has taken the run over meanwhile."""
        if self._lock is not None:
            self._lock.check()

    def _publish_unfinished(self, run: Training) -> None:
        """Writes the record so far, on rank 0; a disk that is full for a while does not end the run."""
        self.check_lock()
        try:
            self._publish(run.result(finished=False))
        except OSError as error:
            say(f"warning: the record of the unfinished run cannot be written now: {error}")
        self._published_at = time.monotonic()
