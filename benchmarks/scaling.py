"""What Anderson acceleration (AA) costs on thousands of ranks: `python -m benchmarks.scaling --docs`.

Three steps, each in processes of its own: one real rank of 1,536 and of 6,144 is run through torch's fake process
group, and its collectives and memory are counted (`fake_ranks`); two gloo ranks on this host are measured against the
model (`host_check`); `machine_model` predicts machines. --docs writes docs/scaling.md and docs/figures/scaling.png.
All of it takes some four minutes on two cores and up to 8 GB of memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import scaling_docs
from benchmarks.fake_ranks import cases_of, count_all
from benchmarks.host_check import checks_of, gram_bytes_of, measure_host
from benchmarks.machine_model import LAYOUTS, WORKLOADS

WORLD_SIZES = (1536, 6144)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure, predict, print, and with --docs write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write docs/scaling.md and docs/figures/scaling.png")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--world-sizes", nargs="+", type=int, default=list(WORLD_SIZES))
    options = parser.parse_args(arguments)
    if options.docs and (options.layouts, options.workloads) != (list(LAYOUTS), list(WORKLOADS)):
        parser.error("--docs writes about all layouts and workloads")
    workloads = [WORKLOADS[name] for name in options.workloads]
    counts = count_all(cases_of(options.layouts, options.world_sizes, workloads))
    layouts = ["replicated", "sharded"] if "sharded" in options.layouts else ["replicated"]
    host = measure_host(layouts, gram_bytes_of(counts))
    report = scaling_docs.Report(counts, host, checks_of(host), workloads)
    text = scaling_docs.markdown(report)
    print(text)
    if options.docs:
        scaling_docs.write(report, text)


if __name__ == "__main__":
    main()
