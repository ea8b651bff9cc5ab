"""Worker processes, and the signals that a terminal or a scheduler sends to all processes of a job."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import tempfile
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

MAX_SOCKET_PATH = 107  # bytes, in sockaddr_un of Linux


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_temporary_folder() -> None:
    """Raises ValueError where the sockets of workers, which lie in the temporary folder, would have too long a path.

    A worker that sends a tensor would fail in a thread, and the process that waits for it would wait for ever.
    """
    folder = tempfile.gettempdir()
    longest = MAX_SOCKET_PATH - len("/pymp-12345678/listener-12345678")
    if len(os.fsencode(folder)) > longest:
        raise ValueError(
            f"workers need a temporary folder whose path has at most {longest} bytes, got {folder}: "
            "export TMPDIR=/tmp, or another short one"
        )


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Blocks the signals for processes that are started in the block, until their `follow_parent`.

    This thread gets the signals when the block ends. A worker would die of one that arrives before its first line of
    Python. The processes of a forkserver inherit its mask. A forkserver that starts in the block keeps the signals
    blocked, so a program that ends its other processes by SIGTERM must start them by "spawn". A forkserver that has
    started before gets the signals, and so do its processes until `follow_parent`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # first, because a handler may raise as the next call returns
    with _handlers_held_back():
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            multiprocessing.resource_tracker.ensure_running()  # which, where it starts, unblocks SIGTERM and SIGINT
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handlers_held_back() -> Iterator[None]:
    """Calls the handlers of Python for these signals only when the block has ended.

    The mask of this thread is not enough: another thread may take the signal, and Python then calls the handler here.
    One that raises KeyboardInterrupt within `ProcessPoolExecutor.submit` leaves a lock behind, and the pool never ends.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


def follow_parent(farewell: Callable[[], None] = lambda: None) -> None:
    """Call first in every worker. It exits when its parent dies, and ignores signals, which the parent handles.

    The exception is a SIGTERM of the parent itself: a parent that fails calls `Process.terminate` on its way out and
    waits until the worker has ended. `farewell` is called before that, in a thread. (A SIGTERM that arrives while the
    worker starts and another one is pending is lost, because the system keeps one.) Systems without sigwaitinfo
    (macOS) do not show the sender: any SIGTERM ends the worker there, without a farewell.
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
