"""What acceleration adds to an optimizer step: `python -m benchmarks.step` (`--quick`: seconds).

Times plain steps, steps that store and steps that accelerate, weighs the accelerator's memory, and holds both against
what an implementation cannot avoid to move at this machine's bandwidth, and against a textbook implementation. Prints
tables, and leaves those of the steps as CSV and the roofline figure in the output folder, with --docs in docs/.

Measured are all depths, histories and frequencies, and then at the larger depth, accelerating every 2 steps, average,
coupling and safeguard one at a time. From 1e6 parameters on also with compiled kernels (`fused=True`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import machine
from benchmarks.accelerated_step import (
    FRESH,
    RESNET50,
    WEIGHED,
    Case,
    Result,
    Textbook,
    measure,
    measure_textbook,
    textbook_bytes,
)
from benchmarks.machine import ROOT, BandwidthMeter, in_fresh_process
from benchmarks.step_report import SMALL, Report, disagreements, draw, name_of, tables
from benchmarks.tables import origin

SIZES = (1_000, 100_000, 1_000_000, RESNET50)


def all_cases(sizes: Sequence[int], depths: Sequence[int], frequencies: Sequence[int] = (1, 2, 10)) -> list[Case]:
    """The cases, see the docstring of the module."""
    cases: list[Case] = []
    for size in sizes:
        base = [Case(size, *each) for each in product(depths, ("float32", "bfloat16"), frequencies)]
        deepest = [case for case in base if case.depth == max(depths) and case.frequency == 2]
        varied: list[dict[str, Any]] = [{"average": True}, {"coupling": "full"}, {"safeguard": False}]
        cases += base + [replace(case, **change) for change in varied for case in deepest]
        if size <= SMALL:
            cases += [Case(size, depth, frequency=10, store_every=10) for depth in depths]
        if size >= WEIGHED:
            cases += [replace(case, fused=True) for case in [*base, *(replace(c, coupling="full") for c in deepest)]]
    return cases


def run_cases(cases: Sequence[Case], meter: BandwidthMeter, repeats: int | None) -> Iterator[Result]:
    """Measures, large cases in processes of their own. Bandwidth is sampled before every size and every larger case."""
    last = 0
    for case in cases:
        if case.parameters > SMALL or case.parameters != last:
            meter.sample()
        last = case.parameters
        large = case.parameters >= FRESH
        arguments = (case, meter.device, repeats or (9 if large else 20))
        print(f"# {name_of(case)}", file=sys.stderr, flush=True)
        yield (in_fresh_process(measure, *arguments, threads=torch.get_num_threads()) if large else measure(*arguments))


def run_textbooks(sizes: Sequence[int], depths: Sequence[int], device: str, repeats: int | None) -> Iterator[Textbook]:
    """Measures where memory allows, two events where one takes seconds; says what is left out."""
    for size, depth in product(sizes, depths):
        free, needed = machine.available_bytes(device), textbook_bytes(size, depth)
        name, large = f"# textbook, {size:,} parameters, depth {depth}", size >= FRESH
        if free is not None and needed > 0.8 * free:
            print(f"{name}: left out, needs {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free", file=sys.stderr)
            continue
        print(name, file=sys.stderr, flush=True)
        arguments = (size, depth, device, 2 if large else min(10, repeats or 10))
        threads = torch.get_num_threads()
        yield (
            in_fresh_process(measure_textbook, *arguments, threads=threads) if large else measure_textbook(*arguments)
        )


def measure_all(options: argparse.Namespace) -> tuple[Report, BandwidthMeter]:
    """Runs everything the options ask for."""
    torch.set_num_threads(options.threads)
    on_cpu = not options.device.startswith("cuda")
    meter = BandwidthMeter(options.device, 1 << 26 if options.quick and on_cpu else None)
    cases = all_cases(options.sizes, options.depths, (2,) if options.quick else (1, 2, 10))
    results = list(run_cases(cases, meter, options.repeats))
    textbooks = list(run_textbooks(options.sizes, options.depths, options.device, options.repeats))
    meter.sample()
    return Report(options.device, meter.median(), results, textbooks), meter


def write(report: Report, options: argparse.Namespace) -> None:
    """Leaves the figure in one folder and the tables of the steps in another, and prints all tables."""
    docs = ROOT / "docs"
    figures, folder = (docs / "figures", docs / "tables") if options.docs else (options.output, options.output)
    figures.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    only_small = options.docs and max(options.sizes) <= SMALL  # the page's other tables and its figure show all sizes
    for name, table in tables(report).items():
        if name == "step_small" or (name.startswith("step_") and not only_small):
            (folder / f"{name}.csv").write_text(table.csv())
        print(table.markdown())
    if not only_small:
        draw(folder, figures / "step_roofline.png")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="1e3 parameters, depth 5, few cases: seconds")
    parser.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)), help="parameters (default: all four)")
    parser.add_argument("--depths", nargs="+", type=int, help="history depths (default: 5 10)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), metavar="DIR")
    parser.add_argument("--repeats", type=int, help="accelerations timed in a case (default: 20, large ones 9)")
    parser.add_argument("--docs", action="store_true", help="leave figure and tables in docs/ instead of the output")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the figure of docs/ from its tables")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU is present")
    options.sizes = options.sizes or (SIZES[:1] if options.quick else SIZES)
    options.depths = options.depths or ((5,) if options.quick else (5, 10))
    options.repeats = options.repeats or (5 if options.quick else None)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes, prints; returns 1 where memory and its count disagree."""
    options = parse(arguments)
    if options.draw:
        draw(ROOT / "docs" / "tables", ROOT / "docs" / "figures" / "step_roofline.png")
        return 0
    report, meter = measure_all(options)
    write(report, options)
    copies = [sample.copy / 1e9 for sample in meter.samples]
    print(origin("python -m benchmarks.step", options.device))
    print(f"copy bandwidth over the run: {min(copies):.1f} to {max(copies):.1f} GB/s ({len(copies)} samples)")
    slow = sum(copy < 0.75 * median(copies) for copy in copies)
    if slow:
        print(f"others used the machine: copying fell below 3/4 of its median in {slow} of {len(copies)} samples")
    wrong = disagreements(report)
    for line in wrong:
        print(f"not what is counted: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
