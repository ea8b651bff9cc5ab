"""Signals wait while processes start, whichever thread takes them."""

import signal
import threading

import pytest

from data_loaders.workers import signals_held_back


def test_a_signal_that_another_thread_takes_waits_until_the_block_has_ended():
    ended = threading.Event()
    listener = threading.Thread(target=ended.wait)  # born before the block, so it hears all signals
    listener.start()
    steps = []
    try:
        with pytest.raises(KeyboardInterrupt), signals_held_back():
            signal.pthread_kill(listener.ident, signal.SIGINT)
            steps += [each for each in range(100_000) if each % 50_000 == 0]  # Python looks for signals here
    finally:
        ended.set()
        listener.join()
    assert steps == [0, 50_000]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
