"""Scaling studies: submits one job a number of nodes, and collects what they recorded into a figure and a table."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jobs import check_versions

if __name__ == "__main__":
    check_versions()

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from data_loaders.files import write_text
from experiments.catalog import load_config
from experiments.records.figures import save_figures
from experiments.records.reading import Run, read_run
from experiments.settings.run_config import ExperimentConfig
from jobs.request import allows_repeats, read_request
from jobs.script import render
from jobs.site import read_site
from jobs.submit import add_job_options, checked_job, guarded, script_path, submit_script

MODES = ("strong", "weak")
COLORS = ("#333333", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"


def main(arguments: Sequence[str] | None = None) -> int:
    """Submits a study, or collects its records; 2 after a mistake of the user, explained in one sentence on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["collect"]:
        parser = argparse.ArgumentParser(prog="python -m jobs.scaling collect", description="draw a study's records")
        parser.add_argument("results", type=Path, metavar="RESULTS", help="the folder that --results named")
        options = parser.parse_args(given[1:])
        return guarded(lambda: _collect(options.results))
    parser = argparse.ArgumentParser(prog="python -m jobs.scaling", description=__doc__)
    add_job_options(parser)
    parser.add_argument("--nodes", required=True, metavar="N,N,...", help="numbers of nodes, as 1,2,4,8")
    parser.add_argument("--mode", required=True, choices=MODES, help="the same work for all ranks, or for each rank")
    options = parser.parse_args(given)
    return guarded(lambda: _study(options, ["python", "-m", "jobs.scaling", *given]))


# --- the study


def _study(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Checks and renders every job before the first one is submitted."""
    site, numbers, given = read_site(options.site), _numbers(options.nodes), vars(options)
    config = load_config(options.config, options.set)
    first = checked_job(site, read_request({**given, "nodes": numbers[0]}))
    if len(numbers) > 1 and not allows_repeats(site, first.queue):
        raise ValueError(f"--nodes must be one number in queue {first.queue} of {site.name}, which takes no series")
    scripts: dict[Path, str] = {}
    for number in numbers:
        ranks, fewest = (nodes * first.ranks_per_node for nodes in (number, numbers[0]))
        changes = {
            "nodes": number,
            "results": folder_of(options.results, options.mode, number),
            "set": [*options.set, *work_overrides(config, options.mode, ranks, fewest)],
            "name": f"{options.name or f'{config.experiment}-{config.scale}'}-{options.mode}-{number}",
        }
        job = checked_job(site, read_request({**given, **changes}))
        path = script_path(job)
        scripts[path] = render(job, path, command)
    if not options.dry_run and site.scheduler == "none":
        raise ValueError(f"--site must have a batch system for a study over nodes, and {site.name} has none")
    for path, script in scripts.items():
        if options.dry_run:
            print(f"# --- {path}\n{script}")
            continue
        write_text(path, script, executable=True)
        print(path, file=sys.stderr)
        print(submit_script(site, path))
    return 0


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.strip().isdigit()]
    if len(numbers) < len(parts) or min(numbers) < 1 or numbers != sorted(set(numbers)):
        raise ValueError(f"--nodes must be rising integers >= 1 with commas, as 1,2,4,8, got {text!r}")
    return numbers


def folder_of(results: Path, mode: str, nodes: int) -> Path:
    """Where one job of a study keeps its records: jobs of other sizes would make each other's runs again."""
    return results / "scaling" / mode / f"nodes-{nodes}"


def work_overrides(config: ExperimentConfig, mode: str, ranks: int, fewest_ranks: int) -> list[str]:
    """Returns the settings that keep the work constant: of all ranks in strong scaling, of each rank in weak scaling.

    What the configuration says holds for the job with the fewest ranks. ValueError where the work cannot be multiplied.
    """
    factor, rest = divmod(ranks, fewest_ranks)
    if mode == "weak" and rest:
        raise ValueError(f"--nodes must be multiples of the smallest number for weak scaling, got {ranks} ranks")
    training: Any = config.training
    problem: Any = config.problem
    per_rank = getattr(training, "batch_size_per_rank", None)
    if per_rank is not None:
        whole = [f"training.batch_size={per_rank * fewest_ranks}", "training.batch_size_per_rank=null"]
        return whole if mode == "strong" else []
    if mode == "strong":
        return []
    if getattr(training, "batch_size", None) is not None:
        return [f"training.batch_size={training.batch_size * factor}"]
    return [f"problem.{name}={getattr(problem, name) * factor}" for name in ("num_points", "num_conditions")]


# --- its records


class Point(NamedTuple):
    """One number of ranks of one variant.

    `rates` are samples (images, rows, points, as `unit` says) per second over all ranks, one for each seed; steps per
    second of the optimizer are a median over the seeds.
    """

    ranks: int
    rates: tuple[float, ...]
    steps_per_second: float
    unit: str

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


Curves = dict[tuple[str, str], list[Point]]
"""Points by rising number of ranks, by mode ("strong" or "weak") and variant."""


def samples_per_step(run: Run) -> tuple[int, str]:
    """Samples of one optimizer step over all ranks, and what they are."""
    training, problem = run.config["training"], run.config["problem"]
    world_size = int(run.attributes["world_size"])
    if training.get("batch_size_per_rank") is not None:
        return int(training["batch_size_per_rank"]) * world_size, "images"
    if training.get("batch_size") is not None:
        return int(training["batch_size"]), "images" if "timing/images_per_second" in run.series else "rows"
    return int(problem["num_points"]) + int(problem["num_conditions"]), "points"


def steps_per_second(run: Run) -> float:
    """Optimizer steps per second of training; the first interval, which warms up, is left out where there are more."""
    seconds, places = run.series["timing/training_seconds"], run.places
    first = 1 if len(places) > 2 else 0
    spent = float(seconds[-1] - seconds[first])
    if not spent > 0:
        raise ValueError(f"{run.path} has no training time: the run was too short")
    share = float(places[-1] - places[first]) / float(places[-1] - places[0])
    return float(run.attributes["num_steps"]) * share / spent


def read_curves(results: Path) -> Curves:
    """The finished runs of a study; OSError where there are none."""
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for mode in MODES:
        for path in sorted((results / "scaling" / mode).glob("nodes-*/*/*/*/seed-*.h5")):
            run = read_run(path)
            if not run.diverged:
                key = (mode, str(run.attributes["variant"]), int(run.attributes["world_size"]))
                groups.setdefault(key, []).append(run)
    if not groups:
        raise OSError(f"no records of a scaling study in {results / 'scaling'}: its jobs have not finished")
    curves: Curves = {}
    for (mode, variant, ranks), runs in sorted(groups.items()):
        samples, unit = samples_per_step(runs[0])
        rates = [steps_per_second(run) for run in runs]
        point = Point(ranks, tuple(rate * samples for rate in rates), statistics.median(rates), unit)
        curves.setdefault((mode, variant), []).append(point)
    return curves


def efficiencies(curve: Sequence[Point]) -> list[float]:
    """Samples per second and rank, over those of the fewest ranks; the same for strong and weak scaling."""
    return [point.rate / point.ranks / (curve[0].rate / curve[0].ranks) for point in curve]


def _figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(curves: Curves) -> str:
    lines = [
        "| scaling | variant | ranks | samples/s | steps/s | speed-up | efficiency |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (mode, variant), curve in curves.items():
        for point, efficiency in zip(curve, efficiencies(curve), strict=True):
            numbers = f"{_figures(point.rate)} {point.unit} | {_figures(point.steps_per_second)}"
            gain = f"{point.rate / curve[0].rate:.2f} | {100 * efficiency:.0f} %"
            lines.append(f"| {mode} | {variant} | {point.ranks} | {numbers} | {gain} |")
    return "\n".join(lines) + "\n"


def draw_scaling(all_curves: Curves, mode: str) -> Figure | None:
    """Throughput and efficiency against the number of ranks, None without records of this mode."""
    curves = {variant: curve for (of_mode, variant), curve in all_curves.items() if of_mode == mode}
    if not curves:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for number, (variant, curve) in enumerate(curves.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        ranks, middle = [point.ranks for point in curve], [point.rate for point in curve]
        errors = zip(*((point.rate - min(point.rates), max(point.rates) - point.rate) for point in curve), strict=True)
        left.errorbar(
            ranks, middle, yerr=list(errors), color=color, marker=marker, markersize=4, capsize=3, label=variant
        )
        left.plot(ranks, [middle[0] * count / ranks[0] for count in ranks], color=color, linestyle=":", linewidth=0.9)
        right.plot(ranks, efficiencies(curve), color=color, marker=marker, markersize=4)
    counts = sorted({point.ranks for curve in curves.values() for point in curve})
    unit = next(iter(curves.values()))[0].unit
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("ranks")
    left.set_yscale("log")
    left.set_ylabel(f"{unit} per second (dotted: ideal)")
    left.legend()
    right.axhline(1.0, color="#999999", linestyle=":", linewidth=0.9)
    right.set_ylim(0.0, max(1.1, 1.05 * max(max(efficiencies(curve)) for curve in curves.values())))
    right.set_ylabel("efficiency against the fewest ranks")
    figure.suptitle(f"{mode.capitalize()} scaling: median and range over the seeds", x=0.01, ha="left")
    return figure


def _collect(results: Path) -> int:
    curves, folder = read_curves(results), results / "scaling"
    text = table(curves)
    for path in save_figures(folder, [(f"{mode}.png", partial(draw_scaling, curves, mode)) for mode in MODES]):
        print(path)
    write_text(folder / "scaling.md", text)
    print(folder / "scaling.md", text, sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
