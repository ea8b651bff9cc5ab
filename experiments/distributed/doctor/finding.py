"""A finding, one row of the table, and the table itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One row of the table. It has a cure if something should change, and fails the examination if it is `bad`."""

    what: str
    found: str
    cure: str = ""
    bad: bool = False


def who(ranks: Sequence[int], total: int) -> str:
    """Returns "all ranks" or "rank 1, 2"."""
    return "all ranks" if len(ranks) == total and total > 1 else f"rank {', '.join(map(str, ranks[:8]))}"


def groups(keys: Any) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for rank, key in enumerate(keys):
        groups.setdefault(key, []).append(rank)
    return groups


def print_report(findings: Sequence[Finding]) -> int:
    """Prints the table and what to change; returns 1 if something must change."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "!!" if finding.bad else " !" if finding.cure else "  "
        print(f"{mark} {finding.what:<{width}}  {finding.found}")
    cures = [finding for finding in findings if finding.cure]
    print()
    if not cures:
        print("nothing to change")
    for finding in cures:
        print(f"{'must' if finding.bad else 'may'} change: {finding.what}: {finding.cure}")
    sys.stdout.flush()
    return int(any(finding.bad for finding in findings))
