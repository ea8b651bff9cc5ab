"""What a command says when its runs are done: what was written, the main figure of merit, and the next command."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote

import numpy as np

from experiments.records.reading import Run
from experiments.runs.experiment import Experiment, Merit

SHOWN_VARIANTS = 8
"""Of more variants the best ones are shown."""


def closing_lines(kind: Experiment, runs: Sequence[Run], results: Path) -> list[str]:
    """Lines about the finished runs of one folder `results/<experiment>/<scale>`; `results` is as typed."""
    main = [run for run in runs if not run.attributes["study"]] or list(runs)
    by_variant: dict[str, list[Run]] = {}
    for run in main:
        by_variant.setdefault(run.attributes["variant"], []).append(run)
    merit = kind.merit(main[0].series)
    values = {variant: median_of(own, merit) for variant, own in by_variant.items()}
    best = sorted(values, key=lambda variant: -values[variant] if merit.more_is_better else values[variant])
    shown = best[:SHOWN_VARIANTS]
    lines = [*diverged_lines(runs), *idle_lines(runs)]
    lines.append(f"written: {len(runs)} record{'s' * (len(runs) > 1)} in {main[0].path.parents[1]}")
    title = merit.series.partition("/")[2].replace("/", " ").replace("_", " ")
    lines.append(f"{title} at the end, the best first:")
    width = max(len(variant) for variant in shown)
    for variant in shown:
        number = len(by_variant[variant])
        seeds = f"median of {number} seeds" if number > 1 else "1 seed"
        text = f"{values[variant]:.4g}" if math.isfinite(values[variant]) else "diverged"
        lines.append(f"  {variant:<{width}}  {text} ({seeds})")
    if len(best) > len(shown):
        lines.append(f"  and {len(best) - len(shown)} more variants")
    where = "" if results == Path("results") else f" --results {quote(str(results))}"
    only = f" --only {main[0].attributes['experiment']}"
    lines.append(f"next: python -m experiments summarize{where}{only}, and the same with figures")
    return lines


def median_of(runs: Iterable[Run], merit: Merit) -> float:
    """Median of the last values over the seeds; a diverged run is infinitely bad."""
    name, worst = merit.series, -math.inf if merit.more_is_better else math.inf
    finals = [worst if run.diverged or name not in run.series else float(run.series[name][-1]) for run in runs]
    return float(np.median([value if math.isfinite(value) else worst for value in finals]))


def diverged_lines(runs: Iterable[Run]) -> list[str]:
    """A line that names the runs whose loss was lost, if there are any."""
    diverged: dict[str, list[str]] = {}
    for run in runs:
        if run.diverged:
            place = f" at iteration {run.diverged_iteration}" if run.diverged_iteration is not None else ""
            diverged.setdefault(run.attributes["variant"], []).append(f"seed {run.attributes['seed']}{place}")
    named = (f"{name} ({len(seeds)} seeds: {', '.join(seeds)})" for name, seeds in diverged.items())
    return ["diverged: " + ", ".join(named)] if diverged else []


def idle_lines(runs: Iterable[Run]) -> list[str]:
    """A line that names the variants of which no accelerated run accepted a candidate, if there are any."""
    counts: dict[str, list[float]] = {}
    for run in runs:
        accepted = run.series.get("acceleration/accepted")
        if accepted is not None and len(accepted):
            counts.setdefault(run.attributes["variant"], []).append(float(accepted[-1]))
    idle = [name for name, accepted in counts.items() if not any(accepted)]
    return [f"no candidate accepted, as if without acceleration: {', '.join(idle)}"] if idle else []
