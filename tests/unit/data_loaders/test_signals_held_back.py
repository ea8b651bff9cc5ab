"""Signals wait while processes start, whichever thread takes them."""

import signal
import socket
import threading

import pytest

from data_loaders.workers import signals_held_back


@pytest.fixture
def listener():
    """A thread that was born before the block, so that it takes signals which the main thread blocks."""
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    yield thread
    ended.set()
    thread.join()


@pytest.fixture
def taken():
    """A socket that has a byte as soon as a thread of this process has taken a signal."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    reading.settimeout(60)
    before = signal.set_wakeup_fd(writing.fileno())
    yield reading
    signal.set_wakeup_fd(before)
    reading.close()
    writing.close()


def test_a_signal_that_another_thread_takes_waits_until_the_block_has_ended(listener, taken):
    steps = []
    with pytest.raises(KeyboardInterrupt), signals_held_back():
        signal.pthread_kill(listener.ident, signal.SIGINT)
        steps.append(taken.recv(1))
        steps.append("after the signal")
    assert steps == [bytes([signal.SIGINT]), "after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
