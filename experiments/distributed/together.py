"""What one rank does for all of them, or each for itself, while the others wait longer than a collective may take.

The ranks meet in the store of the process group, not in a collective: its deadline would end the job while a slow file
system is still being read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import Deadline, host_of, spans

T = TypeVar("T")
GRACE_SECONDS = 10.0
"""That the others give rank 0, which names the ranks that are late, beyond its own deadline."""
SHOWN = 8
_meetings = itertools.count()  # all ranks come to all meetings, so that their numbers are the same


class Outcome(NamedTuple):
    """What a rank tells the others; kind and text are "" where nothing went wrong."""

    host: str
    kind: str = ""
    text: str = ""


def by_first(ranks: Ranks, make: Callable[[], T], what: str, seconds: float) -> T:
    """What `make` returns on rank 0, on all ranks; the others wait. Called by all ranks, or by a process without group.

    Args:
        ranks: this process.
        make: called on rank 0 alone; what it returns is pickled.
        what: it does, for messages: "opening the data".
        seconds: that it may take.

    Raises:
        ValueError, OSError: `make` raised it; the same on all ranks.
        TimeoutError: it took longer.
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
    """What `make` returns on this rank, once it has returned on all of them; arguments and errors as of `by_first`.

    An error of one rank is raised on all of them, with the rank and its host.
    """
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
    """Refuses a value that is not that of rank 0; called by all ranks.

    Args:
        ranks: this process.
        value: of this rank; None, on another rank than 0, where it has none to compare.
        what: it is, for messages: "the data".
        seconds: that the first and the last rank may be apart.

    Raises:
        ValueError: a rank has another value; raised on all ranks, with its number, its host and both values.
    """
    if not _has_group(ranks):
        return
    first = by_first(ranks, lambda: value, f"comparing {what}", seconds)
    failure = None if value in (None, first) else ValueError(f"{what} is {value} here and {first} on rank 0")
    meet(ranks, f"comparing {what}", seconds, failure)


def meet(ranks: Ranks, what: str, seconds: float, failure: Exception | None = None) -> None:
    """Waits for all ranks; a ValueError or OSError of any of them is raised on all of them.

    Args:
        ranks: this process, one of several in a process group.
        what: they did, for messages.
        seconds: that the first and the last rank may be apart.
        failure: of this rank.

    Raises:
        ValueError, OSError: what the first rank with a failure ran into.
        TimeoutError: ranks did not come, which are named.
    """
    store = dist.distributed_c10d._get_default_store()
    name = f"aadl-meeting-{next(_meetings)}"
    own = Outcome(host_of(ranks))
    if failure is not None:
        own = own._replace(kind="OSError" if isinstance(failure, OSError) else "ValueError", text=_one_line(failure))
    store.set(f"{name} {ranks.rank}", json.dumps(own))
    if ranks.rank == 0:
        verdict = _verdict(store, name, ranks, what, seconds)
        store.set(f"{name} verdict", json.dumps(verdict))
    else:
        verdict = _wait_for_verdict(store, name, ranks, what, seconds)
    if verdict.kind:
        if failure is not None and verdict.text == own.text:
            raise failure
        raise {"OSError": OSError, "ValueError": ValueError}.get(verdict.kind, TimeoutError)(verdict.text)


def _verdict(store: Store, name: str, ranks: Ranks, what: str, seconds: float) -> Outcome:
    """On rank 0: what is to be raised, after all ranks have come or the time is up."""
    keys = [f"{name} {rank}" for rank in range(ranks.world_size)]
    deadline = Deadline(seconds)
    while not store.check(keys):
        if not deadline.pause():
            late = [rank for rank, key in enumerate(keys) if not store.check([key])]
            if late:
                return Outcome("", "TimeoutError", _late_text(ranks, late, what, seconds))
    for rank, text in enumerate(store.multi_get(keys)):
        told = Outcome(*json.loads(text))
        if told.kind:
            where = f"rank {rank} on {told.host}: " if rank > 0 else ""
            return told._replace(text=where + told.text)
    return Outcome("")


def _wait_for_verdict(store: Store, name: str, ranks: Ranks, what: str, seconds: float) -> Outcome:
    """On the other ranks. They look now and then: a blocking wait would keep the watch over failed ranks waiting."""
    deadline, is_first_there = Deadline(seconds), False
    while not store.check([f"{name} verdict"]):
        if deadline.pause():
            continue
        if is_first_there or not store.check([f"{name} 0"]):
            return Outcome("", "TimeoutError", _late_text(ranks, [0], what, seconds))
        deadline, is_first_there = Deadline(seconds + GRACE_SECONDS), True
    return Outcome(*json.loads(store.get(f"{name} verdict")))


def _late_text(ranks: Ranks, late: list[int], what: str, seconds: float) -> str:
    hosts = sorted({ranks.hosts[rank] for rank in late if rank < len(ranks.hosts)})
    where = f" on {', '.join(hosts[:SHOWN])}{', ...' if len(hosts) > SHOWN else ''}" if hosts else ""
    which = f"rank {late[0]}{where} was" if len(late) == 1 else f"ranks {spans(late)}{where} were"
    return f"{what} took more than {seconds:g} s: {which} not done when the others had waited for so long"


def _has_group(ranks: Ranks) -> bool:
    return ranks.world_size > 1 and dist.is_available() and dist.is_initialized()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
