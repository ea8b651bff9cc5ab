"""Where faults are made to happen: small configurations, output folders, runs without faults, and the reckoning."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fault_jobs import Ended, Place, differences, start_server
from data_loaders import fractals
from experiments.checkpoint import verify_folder

SGD = {"name": "SGD", "lr": 1e-2, "momentum": 0.9, "nesterov": True}
EAGER = {"store_each_nth": 1, "frequency": 2, "wait_iterations": 1, "history_depth": 3}
STEPS_PER_EPOCH = 8
TABLE: dict[str, Any] = {
    "experiment": "graduate_admissions",
    "scale": "faults",
    "seeds": [0],
    "problem": {"hidden_sizes": [16, 16]},
    "training": {"epochs": 6, "batch_size": 40},
    "variants": {"aadl": {"optimizer": SGD, "acceleration": EAGER}},
    "save": {"every_seconds": 0.1, "keep": 2},
    "launch": {"rendezvous": "file", "start_seconds": 60, "collective_seconds": 60},
}
IMAGES: dict[str, Any] = TABLE | {
    "experiment": "imagenet",
    "problem": {
        "data": "folder",
        "model": "resnet18",
        "image_size": 24,
        "resize": 24,
        "statistics_images": 16,
        "statistics_batch": 8,
        "evaluation_batch": 8,
        "start_method": "fork",  # the server that torch's workers are forked from otherwise would be started each time
    },
    "training": {"epochs": 2, "batch_size": 8, "schedule": "cosine", "warmup_epochs": 0.5},
    "variants": {"sgd": {"optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9}}},
    "save": {"every_seconds": 300.0},  # for a checkpoint has 90 MB
}
NUM_STEPS = 6 * STEPS_PER_EPOCH
PACE = 0.02
"""Seconds that a job is held up after each step, so that it lasts long enough for several saves."""


class Impossible(Exception):
    """A fault cannot be made to happen here; the message says why."""


@dataclass
class Outcome:
    """What the faults of an item led to; of several, the worst is told.

    Attributes:
        detections: seconds from each fault to the end of its job, or to its next step where it goes on.
        lost: steps taken before the fault that had to be taken again.
        recoveries: seconds from each new start to its first new step on all ranks.
        problems: what was not as it must be.
        notes: what else to tell.
        num_compared: comparisons with a run without faults.
    """

    detections: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_compared: int = 0

    def check(self, good: bool, problem: str) -> None:
        """Notes a problem unless all is good."""
        if not good:
            self.problems.append(problem)

    def failed(self, ended: Ended, what: str = "") -> None:
        """A job that was ended by a fault: how long that took."""
        faults = ended.entries("fault")
        if not faults:
            self.problems.append(f"{what}: the fault did not happen: {ended.tail()}")
            return
        self.detections.append(ended.end - faults[0]["time"])

    def went_on(self, before: Ended, after: Ended, at: int | None = None) -> None:
        """The job that follows: what was lost, and how long it took."""
        faults = before.entries("fault")
        reached = at if at is not None else int(faults[0]["step"]) if faults else before.reached
        self.lost.append(max(0, reached - max(after.restored, 0)))
        if after.recovery_seconds is not None:
            self.recoveries.append(after.recovery_seconds)

    def compare(
        self,
        expected: tuple[Place, Ended],
        found: tuple[Place, Ended],
        what: str = "",
        tolerance: float | None = None,
    ) -> None:
        """Compares the end with that of a run without faults."""
        self.num_compared += 1
        self.problems += [f"{what}: {text}" if what else text for text in differences(expected, found, tolerance)]


class Site:
    """Where the jobs of the faults are, and the runs without any, made once each."""

    def __init__(self, folder: Path, *, quick: bool = False) -> None:
        """Args:
        folder: for everything that the jobs write.
        quick: whether some faults of each kind will do.
        """
        self.folder, self.quick = folder, quick
        start_server()
        self._references: dict[tuple[str, int], tuple[Place, Ended]] = {}
        self._count = 0

    def place(self, config: Mapping[str, Any] = TABLE, results: Path | None = None) -> Place:
        """A new output folder."""
        self._count += 1
        return Place(self.folder / f"place-{self._count}", config, results=results)

    def reference(self, config: Mapping[str, Any] = TABLE, ranks: int = 1) -> tuple[Place, Ended]:
        """The uninterrupted run.

        Raises:
            RuntimeError: not even that ends well.
        """
        quiet = {**config, "save": {"every_seconds": 1e6}}
        if "num_workers" in config["problem"]:  # which change nothing
            quiet = changed(quiet, problem={"num_workers": 0})
        key = json.dumps(quiet, sort_keys=True), ranks
        if key not in self._references:
            place = self.place(quiet)
            ended = place.run(ranks=ranks, rows=True)
            if any(ended.codes):
                raise RuntimeError(f"a run without any fault ended with {ended.codes}: {ended.tail()}")
            self._references[key] = place, ended
        return self._references[key]

    def images(self) -> str:
        """A small set of images."""
        folder = self.folder / "images"
        if not folder.exists():
            options = {"num_classes": 4, "images_per_class": 12, "validation_per_class": 5, "size": 24, "seed": 3}
            fractals.write_folder(folder, **options, num_workers=1, progress=False)
        return str(folder)


def changed(config: Mapping[str, Any], **changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other settings in some of its parts."""
    raw = copy.deepcopy(dict(config))
    for part, settings in changes.items():
        raw[part] = {**raw[part], **settings}
    return raw


def kept(place: Place) -> list[int]:
    """Steps of the good checkpoints, newest first."""
    return [f.step for f in verify_folder(place.run_folder) if not f.problem and f.step is not None]
