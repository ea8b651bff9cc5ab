"""`list`: the experiments, their configurations and variants, and the state of their results.

It reads the configurations without checking them and the records without comparing their settings, so that it answers
before torch could be imported; `run --dry-run` does both.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.records.status import states_of_folder
from experiments.records.text_table import text_table
from experiments.settings.config_files import config_files, find_config
from experiments.settings.kinds import Seeds, Text
from experiments.settings.run_config import Studies
from experiments.settings.schema import read_settings
from experiments.settings.yaml_file import read_yaml

Runs = list[tuple[str, int]]
"""Runs by name and seed."""


def main(options: argparse.Namespace) -> int:
    """Prints the tables; returns 0. ValueError where no configuration has this name, or one is no valid YAML."""
    print("\n".join(_all(options.results) if options.name is None else _some(options.name, options.results)))
    return 0


def _all(results: Path) -> list[str]:
    """One line a configuration, and one for each folder of results that belongs to none."""
    rows, folders = [], set()
    for name, path in config_files().items():
        raw = _outline(path)
        folder = results / str(raw["experiment"]) / str(raw["scale"])
        folders.add(folder)
        runs = runs_of(raw, path)
        minutes = f"{raw['expected_minutes']:g}" if raw.get("expected_minutes") else "-"
        rows.append((name, str(len(raw["variants"])), str(len(runs)), minutes, _state(runs, states_of_folder(folder))))
    lines = text_table(("configuration", "variants", "runs", "minutes", "results"), rows)
    others = sorted({path.parent.parent for path in results.glob("*/*/*/seed-*.h5")} - folders)
    if others:
        lines += ["", "results of other configurations:"]
        lines += [f"  {folder}: {_count(states_of_folder(folder).values())}" for folder in others]
    lines += ["", "minutes: expected on two cores, where it was measured"]
    return [*lines, "next: python -m experiments list NAME, and run NAME (an experiment stands for its laptop runs)"]


def _some(name: str, results: Path) -> list[str]:
    """The variants of a configuration, or of all configurations of an experiment."""
    first = find_config(name)
    of_experiment = {key: path for key, path in config_files().items() if key.partition("/")[0] == name}
    lines: list[str] = []
    for key, path in (of_experiment or {name: first}).items():
        raw = _outline(path)
        states = states_of_folder(results / str(raw["experiment"]) / str(raw["scale"]))
        runs = runs_of(raw, path)
        rows = []
        for variant, settings in raw["variants"].items():
            own = [run for run in runs if run[0] == variant]
            rows.append((variant, str(settings.get("label", variant)), _kind(settings), _state(own, states)))
        lines += [key, *text_table(("variant", "label", "method", "results"), rows)]
        studies = [run for run in runs if run[0] not in raw["variants"]]
        if studies:
            lines.append(f"  studies of {', '.join(raw['studies'])}: {_state(studies, states)}")
        lines.append("")
    return lines[:-1]


def _outline(path: Path) -> Mapping[str, Any]:
    """A configuration of which what `list` reads has the right shape; the rest is not checked."""
    raw = read_yaml(path)
    try:
        for key in ("experiment", "scale"):
            read_settings(Text, raw.get(key), key)
        for name, settings in read_settings(dict[str, Any], raw.get("variants"), "variants").items():
            own = read_settings(dict[str, Any], settings, f"variants.{name}")
            if own.get("acceleration") is not None:
                read_settings(dict[str, Any], own["acceleration"], f"variants.{name}.acceleration")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return raw


def runs_of(raw: Mapping[str, Any], path: Path) -> Runs:
    """The runs that a configuration asks for, without a look at its settings."""
    try:
        seeds = read_settings(Seeds, raw.get("seeds"), "seeds")
        runs = [(name, seed) for name in raw["variants"] for seed in seeds]
        studies: Studies = read_settings(Studies, raw.get("studies") or {}, "studies")
        if (rates := studies.learning_rate) is not None:
            names = [rates.run_name(variant, rate) for variant in rates.variants for rate in rates.rates]
            runs += [(name, seed) for name in names for seed in rates.seeds]
        if (sizes := studies.batch_size) is not None:
            runs += [(sizes.run_name(size), seed) for size in sizes.sizes for seed in sizes.seeds]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return runs


def _kind(settings: Mapping[str, Any]) -> str:
    """What accelerates a variant, or averages its weights."""
    acceleration = settings.get("acceleration")
    if acceleration is not None:
        return str(acceleration.get("acceleration_type", "anderson"))
    if settings.get("published") is not None:
        return "published scheme"
    return next((key for key in ("ema_decay", "mean_epochs") if settings.get(key) is not None), "-")


def _state(runs: Runs, states: Mapping[tuple[str, int], str]) -> str:
    """The state of these runs in a few words."""
    found = [states[run] for run in runs if run in states]
    if not found:
        return "none"
    if found == ["finished"] * len(runs):
        return f"all {len(runs)} finished"
    return f"{_count(found)} of {len(runs)}"


def _count(states: Iterable[str]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(Counter(states).items()))
