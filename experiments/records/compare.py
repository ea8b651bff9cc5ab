"""What the figures and the table share: which records belong together, and which variant is whose plain rival."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.distributed.rendezvous import spans
from experiments.records.reading import Run, read_runs, say

TRAIN = "metrics/train/loss"
VALIDATION = "metrics/validation/loss"
SECONDS = "timing/training_seconds"


@dataclass(frozen=True)
class Variant:
    """All seeds of one variant of the main comparison: the name of their folder, and the runs by seed."""

    name: str
    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def definition(self) -> dict[str, Any]:
        definition: dict[str, Any] = self.first.config["variant"]
        return definition

    @property
    def label(self) -> str:
        return str(self.definition["label"])

    @property
    def role(self) -> str:
        return role_of(self.definition)

    @property
    def family(self) -> str:
        """The base optimizer in words; variants of one family are compared."""
        return family_of(self.definition["optimizer"])

    def series(self, name: str) -> np.ndarray:
        """One series, (num_seeds, epochs + 1); a diverged run counts as infinitely bad."""
        stacked = np.stack([self.runs[seed].series[name] for seed in sorted(self.runs)])
        return np.where(np.isfinite(stacked), stacked, np.inf)


@dataclass(frozen=True)
class Records:
    """What the records of one folder `results/<experiment>/<scale>` have in common.

    Attributes:
        folder: where they lie.
        runs: the records.
        studies: runs by study, "learning_rate" and "batch_size".
        is_as_configured: whether the configuration's file, if there is one, has the settings of the records.
        trained: what was trained on what, in words, for titles; empty: the name of the experiment.
        degenerate: why results on this equation say little; empty: they do not.
    """

    folder: Path
    runs: list[Run]
    studies: dict[str, list[Run]]
    is_as_configured: bool = field(default=True, kw_only=True)
    trained: str = field(default="", kw_only=True)
    degenerate: str = field(default="", kw_only=True)

    @property
    def data_source(self) -> str:
        """ "csv", "surrogate" or "computed"."""
        return ", ".join(sorted({run.attributes["data_source"] for run in self.runs}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the main comparison."""
        return tuple(sorted({run.attributes["seed"] for run in self.runs if not run.attributes["study"]}))

    @property
    def commits(self) -> list[str]:
        """Short commits that made the records, with "+" where the checkout had changes."""
        return sorted({run.attributes["git_commit"][:9] + "+" * bool(run.attributes["git_dirty"]) for run in self.runs})

    @property
    def is_surrogate(self) -> bool:
        return "surrogate" in self.data_source

    @property
    def caution(self) -> str:
        """What stands first in every title; empty for nothing."""
        return "DEGENERATE" if self.degenerate else "SURROGATE DATA" if self.is_surrogate else ""

    @property
    def subject(self) -> str:
        """What titles say was trained."""
        if self.trained:
            return self.trained
        name = self.folder.parent.name.replace("_", " ")
        return f"{name[:1].upper()}{name[1:]}"

    def source_line(self, seeds: Iterable[int] | None = None) -> str:
        """Where a figure or a table comes from: configuration, data, seeds (by default the main comparison's), code."""
        numbers = sorted(self.seeds if seeds is None else seeds)
        count = f"{len(numbers)} seed{'s' * (len(numbers) != 1)} ({spans(numbers)})"
        data = "SURROGATE DATA, not the real file" if self.is_surrogate else f"data: {self.data_source}"
        experiment, scale = self.folder.parts[-2:]
        config = Path("experiments", "configs", experiment, f"{scale}.yaml")
        has_file = self.is_as_configured and (Path(__file__).parents[2] / config).is_file()  # no file: --set scale=NAME
        settings = config.as_posix() if has_file else f"scale {scale} (settings in the records)"
        return f"{settings} · {data} · {count} · commit {', '.join(self.commits)}"


@dataclass(frozen=True)
class Comparison(Records):
    """The records of one folder, the variants by family, the plain one first."""

    families: dict[str, list[Variant]]

    @property
    def variants(self) -> list[Variant]:
        """Returns the variants of all families; there is at least one."""
        return [variant for variants in self.families.values() for variant in variants]


def grouped(runs: Iterable[Run]) -> tuple[list[Variant], dict[str, list[Run]]]:
    """The variants of the main comparison, and the other runs by study."""
    main: dict[str, dict[int, Run]] = {}
    studies: dict[str, list[Run]] = {}
    for run in runs:
        study = run.attributes["study"]
        if study:
            studies.setdefault(study, []).append(run)
        else:
            main.setdefault(run.attributes["variant"], {})[run.attributes["seed"]] = run
    return [Variant(name, of_variant) for name, of_variant in main.items()], studies


def find_folders(results: Path, only: str | None = None) -> list[Path]:
    """Folders `<experiment>/<scale>` with records; ValueError where there is none."""
    folders = sorted({path.parent.parent for path in results.glob("*/*/*/seed-*.h5")})
    folders = [folder for folder in folders if only is None or folder.parent.name == only]
    if not folders:
        raise ValueError(f"no results{f' of {only}' if only else ''} in {results}: make some with 'run' or 'reproduce'")
    return folders


def closed_folders(results: Path) -> list[Path]:
    """Folders of results that this account may not look into, and that `find_folders` therefore passes over."""
    levels = ("", "*", "*/*", "*/*/*")
    folders = [path for level in levels for path in (results.glob(level) if level else [results]) if path.is_dir()]
    return sorted(path for path in folders if not os.access(path, os.R_OK | os.X_OK))


def read_comparison(
    folder: Path, note: Callable[[str], None] = say, of_the_machine: Collection[str] = ()
) -> Comparison:
    """Reads and orders all records of a folder.

    Args:
        folder: of one configuration.
        note: gets a line about each record that cannot be read.
        of_the_machine: settings of the problem that change no number and may differ, also by version of the suite.

    Raises:
        ValueError: records that do not belong together (other settings, other data).
        OSError: none of the records can be read.
    """
    runs = read_runs(folder, note)
    check_same(folder, "data", runs, [run.attributes["data_digest"] for run in runs])
    for study in {_study(run) for run in runs}:
        own = [run for run in runs if _study(run) == study]
        problems = [{k: v for k, v in run.config["problem"].items() if k not in of_the_machine} for run in own]
        settings = [[problem, run.config["training"]] for problem, run in zip(problems, own, strict=True)]
        check_same(folder, "settings", own, settings)
    variants, studies = grouped(runs)
    families: dict[str, list[Variant]] = {}
    for variant in variants:
        families.setdefault(variant.family, []).append(variant)
    for of_family in families.values():
        of_family.sort(key=lambda variant: (_ROLES.index(variant.role.split()[0]), variant.role, variant.name))
    order = sorted(families, key=lambda family: (not family.startswith("SGD"), -len(families[family]), family))
    return Comparison(folder, runs, studies, {family: families[family] for family in order})


_ROLES = ("plain", "ema", "mean", "published", "aadl")


def _study(run: Run) -> str:
    """What may differ between records of one folder: the batch-size study changes the training settings."""
    study = run.attributes["study"]
    return f"{study} {run.attributes['variant']}" if study == "batch_size" else ""


def check_same(folder: Path, what: str, runs: Sequence[Run], values: Sequence[Any]) -> None:
    """Raises ValueError where the values of the runs are not all the same."""
    other = next((run for run, value in zip(runs, values, strict=True) if value != values[0]), None)
    if other is not None:
        raise ValueError(
            f"{folder} holds records with different {what}, for instance {runs[0].path} and {other.path}: "
            "run the experiment again, or keep trials apart with --set scale=NAME"
        )


def role_of(definition: dict[str, Any]) -> str:
    """ "plain", "ema", "mean", "aadl" (defaults), "aadl settings", or "published" with "average" and "safeguard"."""
    if definition["published"] is not None:
        return "published" + "".join(
            f" {option}" for option in ("average", "safeguard") if definition["published"][option]
        )
    for stage in (definition, definition.get("then") or {}):
        if stage.get("acceleration") is not None:
            return "aadl settings" if stage["acceleration"] else "aadl"
    if definition.get("mean_epochs") is not None:
        return "mean"
    return "ema" if definition["ema_decay"] is not None else "plain"


def family_of(optimizer: dict[str, Any]) -> str:
    """The optimizer in words: "SGD, lr 0.001, momentum 0.9, nesterov"."""
    words = [optimizer["name"]]
    for key, value in optimizer["arguments"].items():
        if value is True:
            words.append(key)
        elif value is not False and value is not None:
            words.append(f"{key} {value:g}" if isinstance(value, (int, float)) else f"{key} {value}")
    return ", ".join(words)


def plain_of(variants: list[Variant]) -> Variant | None:
    return next((variant for variant in variants if variant.role == "plain"), None)
