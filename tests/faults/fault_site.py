"""Where faults are made to happen: small configurations, output folders, runs without faults, and what must hold."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fault_jobs import LONGEST_SECONDS, Ended, Fault, Place, differences, start_server

from data_loaders.fractals import sets as fractals
from experiments.distributed.interruption import EXIT_RESUME
from experiments.runs.checkpoint_files import names_of_checkpoints, read

SGD = {"name": "SGD", "lr": 1e-2, "momentum": 0.9, "nesterov": True}
EAGER = {"store_each_nth": 1, "frequency": 2, "wait_iterations": 1, "history_depth": 3}
STEPS_PER_EPOCH = 8
DEADLINE = 4 * LONGEST_SECONDS
"""No job of these tests ends because ranks have waited so long for each other: they end because they notice a fault."""
TABLE: dict[str, Any] = {
    "experiment": "graduate_admissions",
    "scale": "faults",
    "seeds": [0],
    "problem": {"hidden_sizes": [16, 16]},
    "training": {"epochs": 6, "batch_size": 40},
    "variants": {"aadl": {"optimizer": SGD, "acceleration": EAGER}},
    "save": {"every_seconds": 0.1, "keep": 2},
    "launch": {"rendezvous": "file", "start_seconds": DEADLINE, "collective_seconds": DEADLINE},
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
    },
    "training": {"epochs": 2, "batch_size": 8, "schedule": "cosine", "warmup_epochs": 0.5},
    "variants": {"sgd": {"optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9}}},
    "save": {"every_seconds": 300.0},  # for a checkpoint has 90 MB
}
NUM_STEPS = 6 * STEPS_PER_EPOCH
PACE = 0.02
"""Seconds that a job is held up after each step, so that it lasts long enough for several saves."""
QUICK = os.environ.get("FAULTS") != "all"
"""Whether some faults of each kind will do."""


def has_met_its_fault(ended: Ended) -> None:
    assert ended.entries("fault"), f"the fault did not happen: {ended.tail()}"


def goes_on(before: Ended, after: Ended) -> None:
    """Checks that the next job went on from what was saved last, or from a later save that was under way."""
    assert before.saved <= after.restored <= before.reached, (before.saved, after.restored, before.reached)


class Site:
    """Where the jobs of the faults are, and the runs without any, made once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        start_server()
        self._references: dict[tuple[str, int], tuple[Place, Ended]] = {}
        self._count = 0

    def place(self, config: Mapping[str, Any] = TABLE, results: Path | None = None) -> Place:
        self._count += 1
        return Place(self.folder / f"place-{self._count}", config, results=results)

    def reference(self, config: Mapping[str, Any] = TABLE, ranks: int = 1) -> tuple[Place, Ended]:
        """The uninterrupted run."""
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

    def equals(
        self,
        place: Place,
        ended: Ended,
        config: Mapping[str, Any] = TABLE,
        ranks: int = 1,
        tolerance: float | None = None,
    ) -> None:
        """Checks that a run has the end of the uninterrupted one, bit for bit without a tolerance."""
        assert differences(self.reference(config, ranks), (place, ended), tolerance) == []

    def recovers(self, place: Place, first: Ended, config: Mapping[str, Any] = TABLE, ranks: int = 1) -> None:
        """Checks that the next job goes on from what the first one saved, to the end of the uninterrupted run."""
        again = place.run(ranks=ranks)
        goes_on(first, again)
        self.equals(place, again, config, ranks)

    def stopped(self, place: Place, *faults: Fault, ranks: int = 1, **more: Any) -> Ended:
        """A job that signals stop: all ranks after the same step, which is saved."""
        first = place.run(*faults, ranks=ranks, **more)
        has_met_its_fault(first)
        was_stopped(place, first, ranks)
        return first

    def images(self) -> str:
        folder = self.folder / "images"
        if not folder.exists():
            settings = fractals.Settings(4, images_per_class=12, validation_per_class=5, size=24, seed=3)
            fractals.ensure(folder, settings, num_workers=1)
        return str(folder)


def changed(config: Mapping[str, Any], **changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other settings in some of its parts."""
    raw = copy.deepcopy(dict(config))
    for part, settings in changes.items():
        raw[part] = {**raw[part], **settings}
    return raw


def was_stopped(place: Place, ended: Ended, ranks: int) -> None:
    """Checks that all ranks stopped after the same step, with its state saved."""
    assert ended.codes == [EXIT_RESUME] * ranks, ended.tail()
    last = [max((entry["step"] for entry in ended.entries("step", rank)), default=-1) for rank in range(ranks)]
    assert len(set(last)) == 1, f"the ranks stopped after steps {last}"
    assert kept(place)[:1] == [last[0]], f"kept {kept(place)}, reached {last[0]}"


def kept(place: Place) -> list[int]:
    """Steps of the good checkpoints, newest first."""
    steps = []
    for name in names_of_checkpoints(place.run_folder):
        with suppress(ValueError):
            steps.append(read(place.run_folder / name)["step"])
    return steps
