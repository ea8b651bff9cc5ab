"""Worker processes, and the signals that a terminal or a scheduler sends to all processes of a job."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGURG,
    signal.SIGXCPU,
}


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Processes that are started in this block are born with these signals blocked, for `follow_parent`; this thread
    hears them when it ends.

    A worker would die of one that arrives before its first line of Python. The processes of a forkserver are born as
    it is. One that starts here stays deaf: a program that ends others of its own by SIGTERM makes them by "spawn". One
    that has started before hears them, and so do its processes until `follow_parent`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # first, for a handler may raise as the next call returns
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        multiprocessing.resource_tracker.ensure_running()  # which, where it starts, unblocks SIGTERM and SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(farewell: Callable[[], None] = lambda: None) -> None:
    """For the first line of a worker: it ends when its parent has ended, and hears no signal, for its parent does.

    But for a SIGTERM of the parent itself, by `Process.terminate`: one that failed calls it on its way out, and then
    waits until the worker has ended. `farewell` is called before, in a thread. (One that comes while the worker starts
    and another's is pending is lost: the system keeps one.) Systems without sigwaitinfo (macOS) cannot tell whose it
    is: any SIGTERM counts, and ends the worker without a farewell.
    """
    can_tell = hasattr(signal, "sigwaitinfo")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    threading.Thread(target=_wait_for_end, args=(parent,), daemon=True).start()
    if can_tell:
        threading.Thread(target=_wait_for_terminate, args=(parent, farewell), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _wait_for_end(parent: Any) -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _wait_for_terminate(parent: Any, farewell: Callable[[], None]) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    farewell()
    os._exit(0)  # torch raises in the parent for a DataLoader's worker that ends with another code
