"""What all ranks of a job have in common: their groups for control, and how they leave, together or at once.

A failed rank must end the job within seconds and with one traceback, its own. So it says in the store of all ranks
that it failed, and a thread of every rank looks there; a rank that lost its connection looks there too. Of a rank that
was killed nobody says so: then these threads answer a roll call, and the one that does not answer is named.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import Deadline, host_of, spans

RESUME_CODE = 75  # all ranks stop together to be continued by a later job
WATCH_SECONDS = 1.0
STALL_SECONDS = 2.0  # a process that stood still for longer says so
CLAIM_SECONDS = 3.0  # a rank that lost its connection waits so long for the rank that failed to say so
FAREWELL_SECONDS = 30.0
PATIENCE_SECONDS = 1800.0  # of the groups for control, where the ranks have met otherwise
LOST_STORE: dict[str, Any] = {"rank": 0, "host": "", "what": "it ended, and its store with it"}


@dataclass
class Joined:
    """The ranks that this process has met: their store, and the watch over the others.

    Attributes:
        ranks: this process.
        base: the store, with the keys of earlier attempts in it.
        store: the part of it that belongs to this attempt.
        patience_seconds: that the ranks wait for each other in the group for control, as while rank 0 writes a
            checkpoint.
        groups: process groups so far.
        done: ends the watch.
        watcher: the thread that watches.
        has_heard: whether this rank has read which rank failed.
    """

    ranks: Ranks
    base: Store
    store: Store
    patience_seconds: float = PATIENCE_SECONDS
    groups: int = 0
    done: threading.Event | None = None
    watcher: threading.Thread | None = None
    has_heard: bool = False


class Interrupted(Exception):
    """The run stopped early, on all ranks together, and was saved; the message says where."""


class RanksDisagree(RuntimeError):
    """The ranks are at different steps or have taken different decisions, or one of them is gone."""


_joined: Joined | None = None
_last_words = threading.Lock()
_control: dist.ProcessGroup | None = None


def joined() -> Joined | None:
    """The ranks that this process has met, if it has."""
    return _joined


def join(ranks: Ranks, base: Store, store: Store, patience_seconds: float = PATIENCE_SECONDS) -> Joined:
    """Remembers the ranks that this process has met; they stay the same until it leaves."""
    global _joined
    _joined = Joined(ranks, base, store, patience_seconds)
    return _joined


def control_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """The gloo group of all ranks for what their main threads decide, None for a process that has no others.

    One for the whole life of a process group, however many runs use it, for every rank holds a connection to every
    other one. `start_process_group` makes it; where the ranks met otherwise, the first call does, on all of them.
    """
    global _control
    if not (dist.is_available() and dist.is_initialized()):
        if ranks.world_size > 1:
            raise RuntimeError(f"rank {ranks.rank} of {ranks.world_size} has no process group yet")
        return None
    if _control is not None:
        try:
            dist.get_backend(_control)
        except ValueError:  # it went with an earlier process group
            _control = None
    if _control is None:
        seconds = _joined.patience_seconds if _joined is not None else PATIENCE_SECONDS
        _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds), group_desc="aadl control")
    return _control


def watch(met: Joined) -> None:
    """Starts to watch the other ranks, in a thread, until the process group is left."""
    met.done = threading.Event()
    met.watcher = threading.Thread(target=_watch, args=(met, met.done), daemon=True)
    met.watcher.start()


def stop_process_group(ranks: Ranks) -> None:
    """Leaves the process group, if there is one, with the other ranks, or at once if an exception is under way."""
    global _control
    if ranks.world_size == 1 or not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    failing = error is not None
    if _joined is not None:
        if error is not None and not isinstance(error, Interrupted) and not _is_lost_connection(error):
            # Before the others see that the connections go, and take this rank for killed.
            _claim(_joined, _failure_of(ranks, error), lost_connection=False)
        _stop_watching(_joined)
        if not failing:
            _wait_for_all(_joined, f"stop {_joined.groups}", FAREWELL_SECONDS)
    _control = None
    # Wrappers of models own threads that must not outlive the group: torch would abort the process at its exit.
    gc.collect()
    if not (failing and dist.get_backend() == "nccl"):  # which would wait for what the others no longer do
        dist.destroy_process_group()


def _stop_watching(met: Joined) -> None:
    if met.done is not None:
        met.done.set()
    if met.watcher is not None and met.watcher is not threading.current_thread():
        met.watcher.join(timeout=2 * WATCH_SECONDS)


def _wait_for_all(met: Joined, name: str, seconds: float) -> None:
    """Waits until all ranks have come here; not longer than that, nor for a rank 0 that is gone with its store."""
    end = Deadline(seconds)
    with contextlib.suppress(RuntimeError):
        if met.store.add(f"{name} arrived", 1) == met.ranks.world_size:
            met.store.set(f"{name} all", "")
        while not met.store.check([f"{name} all"]) and end.pause():
            if (first := _failed(met)) is not None:
                _end_because_of(first, met)
        met.store.add(f"{name} seen", 1)
        if met.ranks.rank == 0:  # its store goes with it
            end = Deadline(2.0)
            while met.store.add(f"{name} seen", 0) < met.ranks.world_size and end.pause():
                pass


@contextlib.contextmanager
def end_on_failure(ranks: Ranks) -> Iterator[None]:
    """Ends this process, and with it the job, if the body raises; a single process raises as usual.

    The first rank to fail prints its traceback, or one sentence for a mistake of the user, and tells the others through
    the store; they print one line each, whether they wait in a collective or not. The code is 2 after a mistake of the
    user, 130 after Ctrl-C, else 1.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if ranks.world_size == 1:
            raise
        _fail(ranks, error)


def _fail(ranks: Ranks, error: BaseException) -> NoReturn:
    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a launcher's, which would interrupt this
            signal.signal(number, signal.SIG_IGN)
    mistake, lost_connection = isinstance(error, (ValueError, OSError)), _is_lost_connection(error)
    code = 2 if mistake else 130 if isinstance(error, KeyboardInterrupt) else 1
    me, what = f"rank {ranks.rank} on {host_of(ranks)}", _failure_of(ranks, error)["what"]
    first: dict[str, Any] | None = None
    if _joined is None:
        if mistake and ranks.rank > 0:  # most mistakes are everyone's: rank 0 tells them, and the launcher ends the job
            time.sleep(WATCH_SECONDS)
    else:
        first = _claim(_joined, _failure_of(ranks, error), lost_connection)
    if not _last_words.acquire(blocking=False):
        time.sleep(FAREWELL_SECONDS)  # the watcher is speaking, and ends the process
    if first is not None:
        print(_ended_by(me, first), file=sys.stderr)
        code = 1
    elif mistake or (isinstance(error, RuntimeError) and _joined is None):
        print(f"error: {me}: {' '.join(str(error).split())}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print(f"{me}: interrupted", file=sys.stderr)
    elif _has_cause(error, RanksDisagree):  # which says all there is to say
        print(f"error: {me}: {' '.join(str(error).split())}", file=sys.stderr)
    elif lost_connection and _joined is not None and (gone := _absent(_joined)):
        print(f"error: {me}: rank {spans(gone)} was killed, or its host is gone ({what[:300]})", file=sys.stderr)
    elif lost_connection and _joined is not None and (late := _absent(_joined, "waiting")):
        print(f"error: {me}: rank {spans(late)} hangs, or is late for a collective ({what[:300]})", file=sys.stderr)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"{me} failed:\n{text}", end="", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    if _joined is not None:
        _let_others_hear(_joined, len(_absent(_joined)) if lost_connection and first is None else 0)
    os._exit(code)


def _failure_of(ranks: Ranks, error: BaseException) -> dict[str, Any]:
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"rank": ranks.rank, "host": host_of(ranks), "what": what}


def _claim(met: Joined, own: dict[str, Any], lost_connection: bool) -> dict[str, Any] | None:
    """Says that this rank is the first to fail, unless another one was, which is returned.

    A lost connection is the consequence of another rank's failure, which has yet to say so, or was killed; those that
    live answer a roll call meanwhile.
    """
    end = Deadline(CLAIM_SECONDS)
    try:
        if lost_connection:
            met.store.set(f"waiting {met.ranks.rank}", "")
            _call_roll(met)
        else:
            met.store.set("attention", "")
        while lost_connection and not met.store.check(["failed"]) and end.pause():
            pass
        first: dict[str, Any] = json.loads(met.store.compare_set("failed", "", json.dumps(own)))
    except RuntimeError:
        return LOST_STORE if lost_connection else None
    if first == own:
        return None
    with contextlib.suppress(RuntimeError):
        _note_heard(met)
    return first


def _note_heard(met: Joined) -> None:
    if not met.has_heard:
        met.has_heard = True
        met.store.add("heard", 1)


def _call_roll(met: Joined) -> None:
    met.store.set(f"present {met.ranks.rank}", "")
    met.store.multi_set(["roll", "attention"], ["", ""])  # type: ignore[attr-defined]


def _absent(met: Joined, what: str = "present") -> list[int]:
    """The ranks that have not answered the roll call, or did not wait in vain, [] where the store does not tell."""
    try:
        everyone = range(met.ranks.world_size)
        if met.store.check([f"{what} {rank}" for rank in everyone]):
            return []
        return [rank for rank in everyone if not met.store.check([f"{what} {rank}"])]
    except RuntimeError:
        return []


def absent_ranks() -> list[int] | None:
    """The ranks whose process is gone; one whose main thread waits for a collective is not. It takes seconds.

    None where nobody can tell: the ranks have met otherwise, or their store is gone and may have been anyone's.
    """
    met = _joined
    if met is None or met.done is None or met.done.is_set():
        return None
    end = Deadline(2.5 * WATCH_SECONDS)
    try:
        _call_roll(met)
        while not met.store.check([f"present {rank}" for rank in range(met.ranks.world_size)]) and end.pause():
            pass
    except RuntimeError:
        return None if met.ranks.agent_store else [0]
    return _absent(met)


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error is not None


def _is_lost_connection(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|Connection (closed|reset|refused)", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _let_others_hear(met: Joined, num_absent: int = 0) -> None:
    """Keeps the store of rank 0 for a moment, whoever failed, so that the others can read who it was."""
    end = Deadline(CLAIM_SECONDS if met.ranks.rank == 0 else 0.0)
    with contextlib.suppress(RuntimeError):
        while end.pause() and met.store.add("heard", 0) < met.ranks.world_size - 1 - num_absent:
            pass


def _ended_by(me: str, first: Mapping[str, Any]) -> str:
    where = f" on {first['host']}" if first["host"] else ""
    return f"{me}: ended because rank {first['rank']}{where} failed: {first['what']}"


def _failed(met: Joined) -> dict[str, Any] | None:
    """What another rank said that failed, or None; answers a roll call as well."""
    if not met.store.check(["attention"]):  # one question a second for each rank is enough for the store of rank 0
        return None
    if met.store.check(["roll"]):
        met.store.set(f"present {met.ranks.rank}", "")
    if not met.store.check(["failed"]):
        return None
    first: dict[str, Any] = json.loads(met.store.get("failed"))
    if first["rank"] == met.ranks.rank:
        return None
    _note_heard(met)
    return first


def _end_because_of(first: Mapping[str, Any], met: Joined) -> NoReturn:
    print(_ended_by(f"rank {met.ranks.rank} on {host_of(met.ranks)}", first), file=sys.stderr, flush=True)
    sys.stdout.flush()
    _let_others_hear(met)
    os._exit(1)


def _watch(met: Joined, done: threading.Event) -> None:
    """Ends this process when another rank says that it failed, or rank 0 is gone, also in the midst of a collective.

    A process that was stopped, swapped out, left without a core, or long within one call of a library keeps all others
    waiting, and none of them can tell whom they wait for: it says so itself.
    """
    start = time.monotonic()
    while not done.wait(WATCH_SECONDS):
        stalled = time.monotonic() - start - WATCH_SECONDS
        if stalled > STALL_SECONDS:
            who = f"rank {met.ranks.rank} on {host_of(met.ranks)}"
            text = f"{who} stood still for {stalled:.1f} s: the others may have waited for it"
            print(text, file=sys.stderr, flush=True)
        try:
            first = _failed(met)
        except RuntimeError:
            first = LOST_STORE
        if first is not None and not done.is_set() and _last_words.acquire(blocking=False):
            _end_because_of(first, met)
        start = time.monotonic()


def leave(code: int) -> NoReturn:
    """Ends the process; after a process group together with the other ranks and without the interpreter's farewell.

    The threads of torch abort some of those farewells. The ranks wait for each other, as long as it takes with the
    codes 0 and RESUME_CODE, which all have in common: launchers end all ranks as soon as one has failed, and MPICH as
    soon as one has left in this way.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _joined is None:
        sys.exit(code)
    _stop_watching(_joined)
    together = code in (0, RESUME_CODE)
    _wait_for_all(_joined, "leave", float("inf") if together else FAREWELL_SECONDS)
    if not together:
        own = {"rank": _joined.ranks.rank, "host": host_of(_joined.ranks), "what": f"it left with code {code}"}
        _claim(_joined, own, lost_connection=False)  # for ranks that did not come here
    os._exit(code)
