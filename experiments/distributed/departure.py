"""How ranks leave: together when all is done, and at once when one of them fails, with one readable cause.

A launcher ends the other ranks when one fails (srun --kill-on-bad-exit, torchrun, Open MPI's mpiexec), but only in its
own time, some do not (MPICH waits, jsrun makes no promise), and by then the others may have printed what they know:
a broken connection. So the failing rank writes its failure to the store of all ranks, and a thread of every rank looks
there and ends its process with one line. Nobody writes for a rank that was killed. These threads therefore let their
pulse count in the store as well, and the rank whose pulse stands still is named. `torch.distributed.monitored_barrier`
cannot do this: it needs the connections that have just been lost.
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
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from experiments.distributed.interruption import EXIT_RESUME
from experiments.distributed.polling import Deadline
from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import host_of, spans

WATCH_SECONDS = 1.0
STALL_SECONDS = 2.0  # a process that stood still for longer prints it
CAUSE_SECONDS = 3.0  # a rank that lost a connection waits this long for the rank that failed to write why
FAREWELL_SECONDS = 30.0
PATIENCE_SECONDS = 1800.0  # of the control group, where `start_process_group` did not join the ranks
STORE_IS_GONE: dict[str, Any] = {"rank": 0, "host": "", "what": "it ended, and its store with it"}


@dataclass
class Joined:
    """The ranks that this process has met, in the store that rank 0 holds; `done` ends the thread that watches them.

    In the control group the ranks wait for each other for `patience_seconds`, for instance while rank 0 writes a
    checkpoint. `groups` counts the process groups so far.
    """

    ranks: Ranks
    store: Store
    patience_seconds: float = PATIENCE_SECONDS
    groups: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None


class Interrupted(Exception):
    """The run stopped early on all ranks together and was saved; the message says where."""

    is_said_here = True
    """Whether this process tells the user: one of the ranks is enough."""


class RanksDisagree(RuntimeError):
    """The ranks are at different steps or have taken different decisions, or one of them is gone."""


_joined: Joined | None = None
_last_line = threading.Lock()  # the main thread or the watcher prints why the process ends, not both
_control: dist.ProcessGroup | None = None


def joined() -> Joined | None:
    return _joined


def join(ranks: Ranks, store: Store, patience_seconds: float = PATIENCE_SECONDS) -> Joined:
    """Remembers the ranks that this process has met; they stay the same until the process ends."""
    global _joined
    _joined = Joined(ranks, store, patience_seconds)
    return _joined


def control_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """Returns the gloo group in which the main threads of all ranks decide; None for a single process.

    There is one for each process group, however many runs use it, because every rank holds a connection to every other
    rank. RuntimeError where several ranks have no process group yet.
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


# --- leaving together


def stop_process_group(ranks: Ranks) -> None:
    """Leaves the process group, if there is one: with the other ranks, or at once while an exception is propagating."""
    global _control
    if ranks.world_size == 1 or not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    if _joined is not None:
        if error is None:
            _stop_watching(_joined)
            _wait_for_all(_joined, f"stop {_joined.groups}", FAREWELL_SECONDS)
        elif isinstance(error, Interrupted):
            _stop_watching(_joined)
        elif not _is_lost_connection(error):
            # The others must read the cause before they see the connections go. The watcher keeps its pulse.
            _write_failure(_joined, _describe(ranks, error))
    _control = None
    # Wrappers of models own threads that must not outlive the group: torch would abort the process at its exit.
    gc.collect()
    if not (error is not None and dist.get_backend() == "nccl"):  # NCCL would wait for ranks that no longer answer
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends the process; after a process group together with the other ranks, and without Python's own shutdown.

    Threads of torch abort some of those shutdowns. With the codes 0 and EXIT_RESUME, which all ranks have in common,
    the ranks wait for each other as long as it takes: launchers end all ranks as soon as one has failed, and MPICH does
    so as soon as one has left in this way.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _joined is None:
        sys.exit(code)
    _stop_watching(_joined)
    together = code in (0, EXIT_RESUME)
    _wait_for_all(_joined, "leave", float("inf") if together else FAREWELL_SECONDS)
    if not together:  # ranks that do not come here learn it from the store
        own = {"rank": _joined.ranks.rank, "host": host_of(_joined.ranks), "what": f"it left with code {code}"}
        _write_failure(_joined, own)
    os._exit(code)


def _stop_watching(met: Joined) -> None:
    met.done.set()
    if met.watcher is not None and met.watcher is not threading.current_thread():
        met.watcher.join(timeout=2 * WATCH_SECONDS)


def _wait_for_all(met: Joined, name: str, seconds: float) -> None:
    """Waits until all ranks have come here or the time is up, and ends the process if one of them fails meanwhile."""
    end = Deadline(seconds)
    with contextlib.suppress(RuntimeError):  # rank 0 is gone with its store
        if met.store.add(f"{name} arrived", 1) == met.ranks.world_size:
            met.store.set(f"{name} all", "")
        while not met.store.check([f"{name} all"]) and end.pause():
            if (first := _failure_of_another(met)) is not None:
                _end_because_of(first, met)
        met.store.add(f"{name} seen", 1)
        if met.ranks.rank == 0:  # its store goes with it
            end = Deadline(2.0)
            while met.store.add(f"{name} seen", 0) < met.ranks.world_size and end.pause():
                pass


# --- leaving at once


@contextlib.contextmanager
def end_on_failure(ranks: Ranks) -> Iterator[None]:
    """Ends this process, and with it the job, if the body raises; a single process raises as usual.

    The first rank to fail prints its traceback, or one sentence for a mistake of the user; every other rank names the
    first in one line. The exit code is 2 after a mistake of the user, 130 after Ctrl-C, otherwise 1.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if ranks.world_size == 1:
            raise
        _fail(ranks, error)


def _fail(ranks: Ranks, error: BaseException) -> NoReturn:
    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # from a launcher, which would interrupt this
            signal.signal(number, signal.SIG_IGN)
    mistake, own = isinstance(error, (ValueError, OSError)), _describe(ranks, error)
    code = 2 if mistake else 130 if isinstance(error, KeyboardInterrupt) else 1
    met, first, lost = _joined, None, ""
    if met is None:
        if mistake and ranks.rank > 0:  # most mistakes are everyone's: rank 0 prints, the launcher ends the job
            time.sleep(WATCH_SECONDS)
    else:
        if _is_lost_connection(error):
            first, lost = _wait_for_cause(met, own["what"])
            own["what"] = lost or own["what"]
        first = first or _write_failure(met, own)
    if not _last_line.acquire(blocking=False):
        time.sleep(FAREWELL_SECONDS)  # the watcher is printing, and ends the process
    me = f"rank {ranks.rank} on {host_of(ranks)}"
    if first is not None:
        code, text = 1, _ended_by(me, first)
    elif lost:
        text = f"error: {me}: {lost}"
    elif mistake or _has_cause(error, RanksDisagree) or (isinstance(error, RuntimeError) and met is None):
        text = f"error: {me}: {' '.join(str(error).split())}"
    elif isinstance(error, KeyboardInterrupt):
        text = f"{me}: interrupted"
    else:
        text = f"{me} failed:\n{''.join(traceback.format_exception(error))}".rstrip()
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if first is None:
        with contextlib.suppress(OSError):
            ErrorHandler().record_exception(error)  # for the summary of torchrun, whose agent reads the file
    if met is not None:
        _let_others_read(met)
    os._exit(code)


def _describe(ranks: Ranks, error: BaseException) -> dict[str, Any]:
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"rank": ranks.rank, "host": host_of(ranks), "what": what}


def _write_failure(met: Joined, own: dict[str, Any]) -> dict[str, Any] | None:
    """Writes that this rank failed; returns the failure of the rank that did so first, or None if this one is first."""
    try:
        first: dict[str, Any] = json.loads(met.store.compare_set("failed", "", json.dumps(own)))
    except RuntimeError:  # the store of rank 0 is gone, which may be because this rank failed
        return None
    return None if first["rank"] == met.ranks.rank else first


def _failure_of_another(met: Joined) -> dict[str, Any] | None:
    if not met.store.check(["failed"]):
        return None
    first: dict[str, Any] = json.loads(met.store.get("failed"))
    return None if first["rank"] == met.ranks.rank else first


def _wait_for_cause(met: Joined, what: str) -> tuple[dict[str, Any] | None, str]:
    """Finds out why a connection was lost: the failure of another rank, or a text that names ranks that are silent."""
    end, store = Deadline(CAUSE_SECONDS), met.store
    others = [rank for rank in range(met.ranks.world_size) if rank != met.ranks.rank]
    try:
        store.set(f"waiting {met.ranks.rank}", "")
        pulses = {rank: store.add(f"pulse {rank}", 0) for rank in others}
        while end.pause():
            if (first := _failure_of_another(met)) is not None:
                return first, ""
        if dead := [rank for rank in others if store.add(f"pulse {rank}", 0) == pulses[rank]]:
            return None, f"rank {spans(dead)} was killed, or its host is gone ({what[:300]})"
        if late := [rank for rank in others if not store.check([f"waiting {rank}"])]:
            return None, f"rank {spans(late)} hangs, or is late for a collective ({what[:300]})"
        return None, ""
    except RuntimeError:
        return STORE_IS_GONE, ""


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


def _let_others_read(met: Joined) -> None:
    """Keeps the store of rank 0 for a moment, whoever failed: each watcher looks there once a second."""
    if met.ranks.rank == 0:
        time.sleep(2 * WATCH_SECONDS)


def _ended_by(me: str, first: Mapping[str, Any]) -> str:
    where = f" on {first['host']}" if first["host"] else ""
    return f"{me}: ended because rank {first['rank']}{where} failed: {first['what']}"


def _end_because_of(first: Mapping[str, Any], met: Joined) -> NoReturn:
    print(_ended_by(f"rank {met.ranks.rank} on {host_of(met.ranks)}", first), file=sys.stderr, flush=True)
    sys.stdout.flush()
    _let_others_read(met)
    os._exit(1)


# --- the watcher


def watch(met: Joined) -> None:
    """Starts the thread that watches the other ranks until the process group is left."""
    met.done = threading.Event()
    met.watcher = threading.Thread(target=_watch, args=(met, met.done), daemon=True)
    met.watcher.start()


def _watch(met: Joined, done: threading.Event) -> None:
    """Counts the pulse of this rank, and ends the process when another rank has failed or rank 0 is gone.

    This works in the midst of a collective too. A process that was stopped, swapped out or left without a core keeps
    all others waiting, and none of them can see whom they wait for, so it prints by itself that it stood still.
    """
    start = time.monotonic()
    while not done.wait(WATCH_SECONDS):
        stalled = time.monotonic() - start - WATCH_SECONDS
        if stalled > STALL_SECONDS:
            who = f"rank {met.ranks.rank} on {host_of(met.ranks)}"
            text = f"{who} stood still for {stalled:.1f} s: the others may have waited for it"
            print(text, file=sys.stderr, flush=True)
        try:
            met.store.add(f"pulse {met.ranks.rank}", 1)
            first = _failure_of_another(met)
        except RuntimeError:
            first = STORE_IS_GONE
        if first is not None and not done.is_set() and _last_line.acquire(blocking=False):
            _end_because_of(first, met)
        start = time.monotonic()
