"""`doctor`: looks in seconds for what makes jobs fail, and says what to change.

Works with one process, which needs no network, and under every launcher, as the job itself would be started.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.distributed.departure import end_on_failure, stop_process_group
from experiments.distributed.devices import binding
from experiments.distributed.doctor.facts import Finding, facts_of, print_report
from experiments.distributed.doctor.placement import bandwidth, binding_of, launcher, versions
from experiments.distributed.doctor.site import compare_site, read_site_file, traps
from experiments.distributed.doctor.storage import probe_folder, shared_folder, storage
from experiments.distributed.process_group import start_process_group
from experiments.distributed.ranks import Ranks, ranks_from_environment
from experiments.distributed.together import gather
from experiments.settings.launch_settings import LaunchSettings


def main(options: argparse.Namespace) -> int:
    """Prints the table on rank 0 and returns 1 if something must change, else 0. ValueError for a wrong option."""
    site = read_site_file(options.site)
    if not options.start_seconds > 0:
        raise ValueError(f"--start-seconds must be positive, got {options.start_seconds}")
    settings = LaunchSettings(start_seconds=options.start_seconds, share_devices=True)
    try:
        ranks = ranks_from_environment(os.environ)
    except ValueError as error:
        return print_report([Finding("launcher", "refused", str(error), bad=True), *_alone(options.results)])
    with end_on_failure(ranks):
        if ranks.rank == 0:
            probe_folder(options.results)
        start_process_group(ranks, settings, options.results)
        try:
            findings = _examine(ranks, options, site)
        finally:
            stop_process_group(ranks)
    return print_report(findings) if ranks.rank == 0 else int(any(finding.bad for finding in findings))


def _alone(results: Path) -> list[Finding]:
    """Returns what one process finds although the variables of its launcher contradict each other."""
    return [*versions([facts_of(Ranks(), results)]), *storage(results)]


def _examine(ranks: Ranks, options: argparse.Namespace, site: Mapping[str, Any]) -> list[Finding]:
    facts = gather(ranks, facts_of(ranks, options.results))
    places = binding(ranks)
    findings = [
        *versions(facts),
        *launcher(ranks, facts),
        *binding_of(places, facts),
        *shared_folder(ranks, options.results),
        *(storage(options.results) if ranks.rank == 0 else []),
        *bandwidth(ranks),
        *traps(facts),
        *compare_site(site, ranks, facts),
    ]
    return gather(ranks, findings)[0]
