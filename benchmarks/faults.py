"""Lets faults happen to small real runs, and says what they cost: `python -m benchmarks.faults [--only 1,4] [--quick]`.

Every fault is injected into real processes of `python -m experiments run` on CPUs with gloo; then the same command is
started again, and its end is compared bit for bit with that of a run without faults. A line each: seconds from the
fault to the end of the job, steps that were lost, seconds from the new start to its first new step, and whether the
ends are equal. `--docs` also writes docs/faults.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_cases import FAULTS
from benchmarks.fault_jobs import ROOT, Hung
from benchmarks.fault_site import Impossible, Outcome, Site
from benchmarks.machine import facts

FORMAT = "{:>4}  {:<60.60}  {:>8}  {:>4}  {:>7}  {}"
HEADER = ("item", "fault", "detected", "lost", "recover", "end")


@dataclass(frozen=True)
class Line:
    """What is said of one fault.

    Attributes:
        item: number of the fault.
        what: the fault, in words.
        outcome: None where the fault could not be made to happen.
        why_not: why.
        seconds: that all of it took.
    """

    item: int
    what: str
    outcome: Outcome | None
    why_not: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.outcome is not None and bool(self.outcome.problems)

    @property
    def verdict(self) -> str:
        """Equal or not, or what failed."""
        if self.outcome is None:
            return f"not run: {self.why_not}"
        if self.outcome.problems:
            return "FAILED: " + "; ".join(self.outcome.problems)
        return "; ".join(["equal" if self.outcome.num_compared else "as it must be", *filter(None, self.outcome.notes)])

    def cells(self) -> tuple[str, ...]:
        """Of a table; of several faults of an item the worst."""
        made = self.outcome or Outcome()
        worst = [f"{max(values):.1f}" if values else "-" for values in (made.detections, made.recoveries)]
        return (
            str(self.item),
            self.what,
            worst[0],
            str(max(made.lost)) if made.lost else "-",
            worst[1],
            self.verdict,
        )


def run_item(item: int, site: Site) -> Line:
    """Lets the faults of an item happen."""
    case, start = FAULTS[item], time.perf_counter()
    what = " ".join((case.__doc__ or "").split())
    outcome: Outcome | None = None
    why_not = ""
    try:
        outcome = case(site)
    except Impossible as reason:
        why_not = str(reason)
    except (Hung, RuntimeError, OSError, ValueError) as error:
        outcome = Outcome(problems=[f"{type(error).__name__}: {error}"])
    return Line(item, what, outcome, why_not, time.perf_counter() - start)


def run(items: Sequence[int], folder: Path, *, quick: bool, say: Callable[[str], None]) -> list[Line]:
    """One item after the other; each is told as soon as it is over."""
    site, lines = Site(folder, quick=quick), []
    say(FORMAT.format(*HEADER))
    for item in items:
        lines.append(run_item(item, site))
        say(FORMAT.format(*lines[-1].cells()) + f" [{lines[-1].seconds:.0f} s]")
    return lines


def page(lines: Sequence[Line], seconds: float) -> str:
    """docs/faults.md."""
    machine = ", ".join(f"{name} {value}" for name, value in facts("cpu").items())
    made = [line for line in lines if line.outcome is not None]
    good = [line for line in made if not line.failed]
    rows = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line.cells()) + " |" for line in lines)
    return f"""# What happens when something fails

Written by `python -m benchmarks.faults --docs` in {seconds / 60:.0f} minutes: {machine}; load of the machine at the
end: {os.getloadavg()[1]:.1f} processes. Every time below was taken on that machine, with whatever else it had to do.

Each fault happens to real processes of `python -m experiments run`: one or two ranks on CPUs, joined by gloo, that
train a small network on the table of graduate admissions with accelerated SGD, or a ResNet18 on a few small images.
Then the same command is started again, and its end is compared with that of a run without faults: the state at the end
(weights, momentum, history of the acceleration, counters) by SHA-256 on every rank, and all series of the record but
the times, bit for bit. Nothing in the suite knows of the faults: `benchmarks/fault_jobs.py` injects them. No launcher
stands behind the ranks, except where torchrun is named: those that are left over end by themselves.

- *detected*: seconds from the fault to the end of the job's last process (of a refused start: from the start).
- *lost*: steps that were taken before the fault and had to be taken again. A checkpoint is due every 0.1 s here and a
  step lasts at least 0.02 s, so this says that no more than one interval is lost, not how much that will be elsewhere.
- *recover*: seconds from the new start to its first new step on all ranks. The processes are forked from one that has
  imported torch; a new interpreter takes some seconds more, as the line of torchrun shows.
- Of several faults in a line, the worst is given.

{len(good)} of {len(made)} faults end as they must.

| {" | ".join(HEADER)} |
|---|---|---:|---:|---:|---|
{rows}

The numbers of the items are those of a longer list; the others are about numerics and data, which `tests/` covers. The
same under a real Slurm (requeue, a killed rank, a drained node) is in `tests/slurm`, and under mpiexec in
`tests/test_launchers.py`.
"""


def _items(text: str) -> list[int]:
    try:
        items = [int(part) for part in text.split(",")]
    except ValueError:
        items = []
    if not items or not set(items) <= set(FAULTS):
        raise ValueError(f"--only must be numbers of {', '.join(map(str, FAULTS))}, with commas, got {text!r}")
    return items


def main(arguments: Sequence[str] | None = None, docs: Path = ROOT / "docs") -> int:
    """Runs the command; 0 if all faults that could be made to happen end as they must, else 1, 2 after a mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", metavar="N,N", help="these items alone")
    parser.add_argument("--quick", action="store_true", help="fewer faults of each kind")
    parser.add_argument("--docs", action="store_true", help="also write docs/faults.md; not with the others")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="a new folder that is kept, with all logs")
    options = parser.parse_args(arguments)
    try:
        if options.docs and (options.only or options.quick):
            raise ValueError("--docs tells of all faults: leave out --only and --quick")
        items = _items(options.only) if options.only else list(FAULTS)
        if options.folder is not None:
            options.folder.mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = options.folder or Path(temporary)
        lines = run(items, folder, quick=options.quick, say=lambda text: print(text, flush=True))
    seconds = time.perf_counter() - start
    failed = [line.item for line in lines if line.failed]
    print(f"{seconds:.0f} s; " + (f"failed: {', '.join(map(str, failed))}" if failed else "all as they must be"))
    if options.docs:
        (docs / "faults.md").write_text(page(lines, seconds))
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that disks are unmounted
    sys.exit(main())
