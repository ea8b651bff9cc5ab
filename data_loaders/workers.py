"""Worker processes, and the signals that a terminal or a scheduler sends to all processes of a job."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator
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


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Here they arrive when the block ends; processes that are started in it are born with them blocked.

    A worker would die of one that arrives before its first line of Python.
    """
    multiprocessing.resource_tracker.ensure_running()  # which unblocks SIGTERM and SIGINT if it starts later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """For the first line of a worker: it ends when its parent has ended, and hears no signal, for its parent does.

    But for a SIGTERM of the parent itself, by `Process.terminate`: one that failed calls it on its way out, and then
    waits until the worker has ended.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    for watch in (_wait_for_end, _wait_for_terminate):
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _wait_for_end(parent: Any) -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _wait_for_terminate(parent: Any) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(1)
