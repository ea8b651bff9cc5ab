import os
import signal
import threading

import pytest

from experiments.distributed.interruption import EXIT_RESUME, SIGNALS, Interruption


def quiet(**options):
    """Without the environment of this process."""
    return Interruption(environment={}, **options)


def test_the_exit_code_is_that_of_a_temporary_failure():
    assert EXIT_RESUME == os.EX_TEMPFAIL == 75


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_gives_a_reason(number):
    with quiet() as interruption:
        assert interruption.reason == ""
        os.kill(os.getpid(), number)
        assert interruption.reason == number.name


def test_the_first_reason_stays_and_further_signals_do_no_harm():
    with quiet() as interruption:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert interruption.reason == "SIGUSR2"
    assert interruption.reason == "SIGUSR2"


def test_previous_handlers_come_back():
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    try:
        others = [signal.getsignal(number) for number in SIGNALS]
        with quiet() as interruption:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert [signal.getsignal(number) for number in SIGNALS] == others
        assert interruption.reason == "SIGUSR1" and not calls
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("environment", "end"),
    [
        ({}, None),
        ({"SLURM_JOB_END_TIME": "2000"}, 2000.0),
        ({"SLURM_JOB_END_TIME": "1700", "AADL_END_TIME": "1800.5"}, 1800.5),
        ({"SLURM_JOB_END_TIME": "2000", "AADL_END_TIME": ""}, 2000.0),
    ],
)
def test_the_time_limit_less_the_margin_is_a_reason(environment, end):
    now = [1000.0]
    interruption = Interruption(margin_seconds=60, environment=environment, clock=lambda: now[0])
    assert interruption.end_time == end
    if end is None:
        now[0] = 1e12
        assert interruption.reason == "" and interruption.seconds_left == float("inf")
        return
    now[0] = end - 60.5
    assert interruption.reason == "" and interruption.seconds_left == 0.5
    interruption.margin_seconds = 61.0  # saving takes longer than thought
    assert interruption.reason == "time limit"
    interruption.margin_seconds = 0.0
    assert interruption.reason == "time limit"


@pytest.mark.parametrize("text", ["tomorrow", "nan", "-5", "0", "inf"])
def test_a_wrong_end_time_is_named(text):
    with pytest.raises(ValueError, match=f"AADL_END_TIME must be a time in seconds since the epoch, got '{text}'"):
        Interruption(environment={"AADL_END_TIME": text})


def test_outside_the_main_thread_only_the_time_limit_counts():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def work():
        with Interruption(environment={"AADL_END_TIME": "1"}) as interruption:
            seen.extend([signal.getsignal(number) for number in SIGNALS])
            seen.append(interruption.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [*before, "time limit"]
