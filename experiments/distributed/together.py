"""Runs a function on rank 0 or on every rank, and waits without a collective's timeout.

The ranks meet in the store of the process group, because the deadline of a collective would end the job while a slow
file system is still being read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from experiments.distributed.polling import Deadline, ask_all
from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import host_of, spans

T = TypeVar("T")
GRACE_SECONDS = 10.0
"""The other ranks wait this much longer than rank 0, which names the ranks that are late."""
SHOWN = 8
_meetings = itertools.count()  # all ranks come to all meetings, so that their numbers are the same


def by_first(ranks: Ranks, make: Callable[[], T], what: str, seconds: float) -> T:
    """Calls `make` on rank 0, and returns its result on all ranks; all ranks call this, or a process without group.

    Args:
        ranks: this process.
        make: called on rank 0 alone; its result is pickled.
        what: what `make` does, for messages: "opening the data".
        seconds: how long `make` may take.

    Raises:
        ValueError, OSError: `make` raised it; the same on all ranks.
        TimeoutError: `make` took longer.
    """
    if not _has_group(ranks):
        return make()
    box: list[Any] = [None]
    failure: Exception | None = None
    if ranks.rank == 0:
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            failure = error
    meet(ranks, what, seconds, failure)
    dist.broadcast_object_list(box, src=0)
    made: T = box[0]
    return made


def by_each(ranks: Ranks, make: Callable[[], T], what: str, seconds: float) -> T:
    """Calls `make` on every rank, and returns when all have; as `by_first`, with the rank and its host in an error."""
    if not _has_group(ranks):
        return make()
    made, failure = None, None
    try:
        made = make()
    except (ValueError, OSError) as error:
        failure = error
    meet(ranks, what, seconds, failure)
    return made  # type: ignore[return-value]


def check_same(ranks: Ranks, value: str | None, what: str, seconds: float) -> None:
    """Raises ValueError on all ranks, with host and values, where one has another value than rank 0; all ranks call it.

    None stands for a rank, other than rank 0, that has nothing to compare. `what` names the value in messages. The
    first and the last rank may come `seconds` apart.
    """
    if not _has_group(ranks):
        return
    first = by_first(ranks, lambda: value, f"comparing {what}", seconds)
    failure = None if value in (None, first) else ValueError(f"{what} is {value} here and {first} on rank 0")
    meet(ranks, f"comparing {what}", seconds, failure)


def gather(ranks: Ranks, own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks, by rank, on every rank, by default through the group of the training."""
    found: list[Any] = [own]
    if ranks.world_size > 1:
        found = [None] * ranks.world_size
        dist.all_gather_object(found, own, group=group)
    return found


def meet(ranks: Ranks, what: str, seconds: float, failure: Exception | None = None) -> None:
    """Waits for all ranks; the ValueError or OSError of the first with a failure is raised on all of them.

    TimeoutError, with the ranks that did not come, where the first and the last one are more than `seconds` apart.
    """
    kind = "" if failure is None else "OSError" if isinstance(failure, OSError) else "ValueError"
    text = "" if failure is None else " ".join(str(failure).split()) or type(failure).__name__
    own = {"host": host_of(ranks), "kind": kind, "text": text}

    def answer_to(found: list[Any]) -> dict[str, str]:
        if late := [rank for rank, each in enumerate(found) if each is None]:
            return {"kind": "TimeoutError", "text": _late_text(ranks, late, what, seconds)}
        for rank, each in enumerate(found):
            if each["kind"]:
                where = f"rank {rank} on {each['host']}: " if rank > 0 else ""
                return {"kind": each["kind"], "text": where + each["text"]}
        return {"kind": "", "text": ""}

    store = dist.distributed_c10d._get_default_store()
    patience = seconds + GRACE_SECONDS  # rank 0 may come late, and then waits for others
    answer = ask_all(store, f"meeting {next(_meetings)}", ranks, own, answer_to, Deadline(seconds), patience)
    if answer is None:
        raise TimeoutError(_late_text(ranks, [0], what, seconds))
    if answer["kind"]:
        if failure is not None and answer["text"] == text:
            raise failure
        raise {"OSError": OSError, "ValueError": ValueError}.get(answer["kind"], TimeoutError)(answer["text"])


def _late_text(ranks: Ranks, late: list[int], what: str, seconds: float) -> str:
    hosts = sorted({ranks.hosts[rank] for rank in late if rank < len(ranks.hosts)})
    where = f" on {', '.join(hosts[:SHOWN])}{', ...' if len(hosts) > SHOWN else ''}" if hosts else ""
    which = f"rank {late[0]}{where} was" if len(late) == 1 else f"ranks {spans(late)}{where} were"
    return f"{what} took more than {seconds:g} s: {which} not done when the others had waited for so long"


def _has_group(ranks: Ranks) -> bool:
    return ranks.world_size > 1 and dist.is_available() and dist.is_initialized()
