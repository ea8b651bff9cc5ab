"""Makes several runs at a time in worker processes of one thread each; a signal makes them save and stop."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from data_loaders.workers import follow_parent, signals_held_back
from experiments.distributed.departure import Interrupted
from experiments.distributed.interruption import Interruption
from experiments.runs.progress import RunsBar
from experiments.settings.run_config import RunConfig
from experiments.training.progress import reported_to

POLL_SECONDS = 0.5
"""How often the parent looks at signals, and the workers at the order of the parent."""

SAVE_SECONDS = 30
"""Time that a run has to stop and save when its pool breaks, because another worker was killed."""

GO_ON, BEGIN_NONE, STOP = range(3)
"""Orders to the workers. No future is canceled: Python up to 3.11 hangs when a pool with a canceled future breaks."""

Execute = Callable[[RunConfig], object]


def execute_at_a_time(
    execute: Execute, runs: Sequence[RunConfig], num_workers: int, interruption: Interruption
) -> None:
    """Makes runs in worker processes; a signal to this process, or Ctrl-C, reaches them all, and they save.

    When a run fails no other one begins, and those that have begun are finished. `execute` is a function at the top of
    its module, or a partial of one.

    Raises:
        Interrupted: a signal came; the runs that had begun are finished or saved.
        KeyboardInterrupt: after Ctrl-C, the same.
        RuntimeError: a worker was killed.
        Exception: what the first run in the list that failed has raised; it comes before the other reasons.
    """
    if interruption.reason:
        raise Interrupted(f"stopped by {interruption.reason} before the first run")
    # Workers are spawned, because a forked torch may hang; they inherit the environment before they import torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    order = context.RawValue("b", GO_ON)  # no Event: it hangs where a process that waited for it was killed
    shown = context.RawArray("d", [math.nan] * (2 * len(runs)))  # share and loss of each run
    futures: list[Future[object]] = []
    with _ctrl_c_noted() as ctrl_c:
        with signals_held_back():  # the helper process of the pool is not to die of them either
            pool = ProcessPoolExecutor(num_workers, context, _start_worker, (order, shown))
        with pool:
            try:
                with signals_held_back():
                    for number, run in enumerate(runs):
                        futures.append(pool.submit(_execute, execute, run, number))
            except BrokenProcessPool:
                pass  # the first future tells it
            numbers = {future: number for number, future in enumerate(futures)}
            with RunsBar(len(runs)) as bar:
                for done in _as_completed(futures, order, ctrl_c, interruption):
                    for number in sorted(numbers.pop(future) for future in done):
                        bar.finish(number)
                    for number in numbers.values():
                        if not math.isnan(shown[2 * number]):
                            bar.report(number, *shown[2 * number : 2 * number + 2])
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, (Interrupted, BrokenProcessPool)):
            raise error
    if any(isinstance(error, BrokenProcessPool) for error in errors):
        raise RuntimeError(
            "a worker process was killed, perhaps for want of memory: the same command, with fewer --jobs, goes on "
            "where the runs were saved last"
        )
    if ctrl_c:
        raise KeyboardInterrupt
    if errors and interruption.reason:
        raise Interrupted(f"stopped by {interruption.reason}; the runs that had begun are finished or saved")
    if errors:  # a run came to the time limit before its parent
        raise errors[0]


@contextmanager
def _ctrl_c_noted() -> Iterator[list[int]]:
    """What SIGINT leaves in this block, in place of a KeyboardInterrupt at any of its lines."""
    noted: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield noted
        return
    signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _as_completed(
    futures: list[Future[object]], order: Any, ctrl_c: list[int], interruption: Interruption
) -> Iterator[set[Future[object]]]:
    """Yields the futures that are done since the last look; passes signals and Ctrl-C on to the workers."""
    waiting, has_failed = set(futures), False
    while waiting:
        done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        if ctrl_c or interruption.reason:  # at each look, because a worker may say BEGIN_NONE at the same moment
            order.value = STOP
        failed = [error for future in done if (error := future.exception()) and not isinstance(error, Interrupted)]
        if failed and waiting and not has_failed:
            has_failed = True
            print(f"{failed[0]}; what has begun is finished first", file=sys.stderr, flush=True)
        yield done


# ---- in a worker -----------------------------------------------------------------------------------------------------


class _Worker:
    """State of this process: `order` and `shown` are shared by parent and workers."""

    order: Any = None
    shown: Any = None
    has_run = False


def _execute(execute: Execute, run: RunConfig, number: int) -> None:
    """Makes one run, unless it lay in the queue when the worker was ordered to begin none."""
    if _Worker.order.value != GO_ON:
        raise Interrupted(f"stopped before run {run.name}, seed {run.seed}")
    _Worker.has_run = True

    def show(share: float, loss: float) -> None:
        _Worker.shown[2 * number], _Worker.shown[2 * number + 1] = share, loss

    try:
        with reported_to(show):
            execute(run)
    except BaseException:  # a mistake, or a signal that came here before the parent has said what to do
        if _Worker.order.value == GO_ON:
            _Worker.order.value = BEGIN_NONE
        raise
    finally:
        _Worker.has_run = False


def _start_worker(order: Any, shown: Any) -> None:
    """One thread of torch, and a watch that stops the run when the parent says so."""
    _Worker.order, _Worker.shown = order, shown
    follow_parent(farewell=_save_run)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # while no run is there to save
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    torch.set_num_threads(1)
    threading.Thread(target=_stop_when_told, daemon=True).start()


def _stop_when_told() -> None:
    """Stops the run by SIGUSR1, again and again: one that has not begun catches it later."""
    while True:
        time.sleep(POLL_SECONDS)
        if _Worker.order.value == STOP:
            os.kill(os.getpid(), signal.SIGUSR1)


def _save_run() -> None:
    """Before this worker, and all of its pool, end since one was killed."""
    _Worker.order.value = STOP
    end = time.monotonic() + SAVE_SECONDS
    while _Worker.has_run and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
