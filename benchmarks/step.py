"""What acceleration adds to an optimizer step: `python -m benchmarks.step` (`--quick`: seconds).

Times plain steps, steps that store and steps that accelerate, weighs the accelerator's memory, and holds both against
what an implementation cannot avoid to move at this machine's bandwidth, and against a textbook implementation. Leaves
`step.json` and `step_roofline.png` in the output folder and prints tables.

Up to 1e6 parameters all combinations of depth, history, frequency, average and coupling are measured. Above, where a
case takes ten seconds and more: all depths, histories and frequencies without average and coupling, and then at the
larger depth, accelerating every 2 steps, average, coupling and safeguard one at a time. From 1e6 parameters on also
with compiled kernels (`fused=True`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, resnet50
from benchmarks.accelerated_step import (
    FRESH,
    RESNET50,
    WEIGHED,
    Case,
    Result,
    Textbook,
    in_fresh_process,
    measure,
    measure_textbook,
    textbook_bytes,
)
from benchmarks.machine import BandwidthMeter
from benchmarks.step_report import SMALL, Report, as_csv, as_json, disagreements, disturbed, draw, name_of, show, tables

SIZES = (1_000, 100_000, 1_000_000, RESNET50)


# ---- what is measured ----------------------------------------------------------------------------------------------


def all_cases(sizes: Sequence[int], depths: Sequence[int], quick: bool = False) -> list[Case]:
    """The cases, see the docstring of the module."""
    cases: list[Case] = []
    for size in sizes:
        base = [
            Case(size, depth, history, frequency)
            for depth, history, frequency in product(depths, ("float32", "bfloat16"), (2,) if quick else (1, 2, 10))
        ]
        varied: list[dict[str, Any]] = [{"average": True}, {"coupling": "full"}]
        if size > WEIGHED or quick:
            chosen = [c for c in base if c.depth == max(depths) and c.frequency == 2]
            chosen = chosen[:1] if quick else chosen
            varied.append({"safeguard": False})
        else:
            chosen = base
            varied.append({"average": True, "coupling": "full"})
        cases += base + [replace(case, **change) for change in varied for case in chosen]
        if size <= SMALL:
            cases += [Case(size, depth, frequency=10, store_every=10) for depth in depths]
        if size >= WEIGHED:
            cases += [replace(case, fused=True) for case in [*base, *(replace(c, coupling="full") for c in chosen)]]
    return list(dict.fromkeys(cases))


def repeats_for(size: int, wanted: int | None) -> int:
    """Accelerations timed in a case."""
    return wanted or (9 if size >= FRESH else 20)


def run_cases(
    cases: Sequence[Case], meter: BandwidthMeter, wanted: int | None
) -> Iterator[tuple[Result, machine.Bandwidth]]:
    """Measure, large cases in processes of their own. Bandwidth is sampled before every size and every larger case."""
    last = 0
    for case in cases:
        large = case.parameters >= FRESH
        if case.parameters > SMALL or case.parameters != last:
            meter.sample()
        last = case.parameters
        arguments = (case, meter.device, repeats_for(case.parameters, wanted))
        print(f"# {name_of(case)}", file=sys.stderr, flush=True)
        result = in_fresh_process(measure, torch.get_num_threads(), *arguments) if large else measure(*arguments)
        yield result, meter.samples[-1]


def run_textbooks(
    sizes: Sequence[int], depths: Sequence[int], device: str, wanted: int | None
) -> tuple[list[Textbook], list[str]]:
    """Measure where memory allows, two events where one takes seconds; also notes on what was left out."""
    measured, notes = [], []
    for size, depth in product(sizes, depths):
        free, needed = machine.available_bytes(device), textbook_bytes(size, depth)
        name, large = f"textbook, {size:,} parameters, depth {depth}", size >= FRESH
        if free is not None and needed > 0.8 * free:
            notes.append(f"{name}: left out, needs {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")
            continue
        print(f"# {name}", file=sys.stderr, flush=True)
        arguments = (size, depth, device, min(2 if large else 10, repeats_for(size, wanted)))
        run = in_fresh_process(measure_textbook, torch.get_num_threads(), *arguments) if large else None
        measured.append(run or measure_textbook(*arguments))
    return measured, notes


def run_training(device: str) -> list[dict[str, Any]]:
    """Share of a ResNet50 training step; on a GPU only."""
    if not device.startswith("cuda"):
        return []
    choices: list[dict[str, Any]] = [{"fused": True}, {"fused": False}]
    return resnet50.training_share([{**choice, "history_dtype": torch.bfloat16} for choice in choices], device)


# ---- command -------------------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> Report:
    """Run everything the options ask for."""
    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    cases = all_cases(options.sizes, options.depths, options.quick)
    meter = BandwidthMeter(options.device, 1 << 26 if options.quick and not cuda else None)
    measured = list(run_cases(cases, meter, options.repeats))
    results, before = [result for result, _ in measured], [sample for _, sample in measured]
    textbooks, notes = run_textbooks(options.sizes, options.depths, options.device, options.repeats)
    meter.sample()
    notes += [] if cuda else ["not measured on a GPU"]
    facts = machine.facts(options.device)
    training = run_training(options.device)
    return Report(facts, meter.median(), meter.samples, before, results, textbooks, training, notes)


def write(report: Report, output: Path, docs: Path | None, say: Callable[[str], object] = print) -> int:
    """Write and print the report; returns 1 where memory and its count disagree."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "step.json").write_text(as_json(report) + "\n")
    draw(report, output / "step_roofline.png")
    if docs is not None:
        for folder in ("figures", "tables"):
            (docs / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output / "step_roofline.png", docs / "figures" / "step_roofline.png")
        for table in tables(report, brief=True):
            name = {"Small": "step_small", "Milliseconds": "step_large"}.get(table[0].split(",")[0].split()[0])
            if name is not None:
                (docs / "tables" / f"{name}.csv").write_text(as_csv(table))
    for table in tables(report, brief=docs is not None):
        say(show(table, markdown=docs is not None))
    say(" · ".join(f"{name} {value}" for name, value in report.machine.items()))
    copies = [sample.copy / 1e9 for sample in report.bandwidth_samples]
    say(f"copy bandwidth over the run: {min(copies):.1f} to {max(copies):.1f} GB/s ({len(copies)} samples)")
    for name in disturbed(report):
        say(f"others used the machine (copying below 3/4 of its median) around: {name}")
    wrong = disagreements(report)
    for line in [*report.notes, *(f"MEMORY DISAGREES WITH ITS COUNT: {line}" for line in wrong)]:
        say(line)
    return 1 if wrong else 0


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
    parser.add_argument(
        "--docs",
        action="store_true",
        help="shorter tables in Markdown; the figure also to docs/figures, tables to docs/tables",
    )
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU is present")
    options.sizes = options.sizes or (SIZES[:1] if options.quick else SIZES)
    options.depths = options.depths or ((5,) if options.quick else (5, 10))
    options.repeats = options.repeats or (5 if options.quick else None)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    options = parse(arguments)
    report = measure_all(options)
    return write(report, options.output, machine.ROOT / "docs" if options.docs else None)


if __name__ == "__main__":
    sys.exit(main())
