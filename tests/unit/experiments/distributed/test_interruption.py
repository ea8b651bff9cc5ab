import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from processes import wait_until

from experiments.distributed.interruption import EXIT_RESUME, SIGNALS, Agreement, Interruption, RanksDisagree, Word
from experiments.distributed.launch import Ranks


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


def test_the_keyboard_interrupts_unless_asked():
    with quiet(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with quiet(include_interrupt=True) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.reason == "SIGINT"


@pytest.mark.parametrize(
    ("environment", "deadline_seconds", "end"),
    [
        ({}, None, None),
        ({}, 500.0, 1500.0),
        ({"SLURM_JOB_END_TIME": "2000"}, None, 2000.0),
        ({"SLURM_JOB_END_TIME": "2000", "AADL_END_TIME": "1800"}, None, 1800.0),
        ({"SLURM_JOB_END_TIME": "1700", "AADL_END_TIME": "1800"}, None, 1800.0),
        ({"SLURM_JOB_END_TIME": "2000", "AADL_END_TIME": ""}, None, 2000.0),
        ({"AADL_END_TIME": "2000.5"}, 500.0, 1500.0),
        ({"AADL_END_TIME": "1200"}, 500.0, 1200.0),
    ],
)
def test_the_time_limit_less_the_margin_is_a_reason(environment, deadline_seconds, end):
    now = [1000.0]
    interruption = Interruption(
        deadline_seconds=deadline_seconds, margin_seconds=60, environment=environment, clock=lambda: now[0]
    )
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


@pytest.mark.parametrize("name", ["deadline_seconds", "margin_seconds"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_wrong_times_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        quiet(**{name: value})


def test_outside_the_main_thread_only_the_time_limit_counts():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def work():
        with quiet(deadline_seconds=1e-9, margin_seconds=0) as interruption:
            seen.extend([signal.getsignal(number) for number in SIGNALS])
            seen.append(interruption.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [*before, "time limit"]


def test_a_single_rank_needs_no_process_group():
    agreement = Agreement(Ranks())
    assert agreement.read() is None
    agreement.post(3, stop=False, finite=True, fingerprint=-5)
    with pytest.raises(RuntimeError, match="before the last one was read"):
        agreement.post(4, stop=False, finite=True)
    assert agreement.read() == Word(3, False, True)
    assert agreement.read() is None
    assert agreement.agree_now(4, stop=True, finite=False) == Word(4, True, False)
    assert agreement.agree_now(4, stop=False, finite=True, save=True) == Word(4, False, True, True)
    assert not dist.is_initialized()


def test_the_timeout_must_be_positive():
    with pytest.raises(ValueError, match="timeout_seconds must be > 0, got 0"):
        Agreement(Ranks(), timeout_seconds=0)


def agreeing_ranks(rank, world_size):
    """Rank 1 is signaled in step 3 and has a NaN in step 2."""
    agreement = Agreement(Ranks(rank, world_size))
    words, done = [], []
    with quiet() as interruption:
        for step in range(10):
            word = agreement.read()
            words.append(word)
            if word is not None and word.stop:
                break
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            finite = not (rank == 1 and step == 2)
            agreement.post(step, bool(interruption.reason), finite, fingerprint=1000 + step)
            done.append(step)
    told = {"words": words, "done": done, "now": agreement.agree_now(99, rank == 0, True, 2**62 + 1, save=rank == 2)}
    for name, step, fingerprint in (("steps", 7 + rank, 0), ("fingerprints", 7, 1 - 3 * rank)):
        try:
            told[name] = agreement.agree_now(step, False, True, fingerprint)
        except RanksDisagree as error:
            told[name] = str(error)
    told["after"] = agreement.agree_now(8, False, True, fingerprint=7)
    return told


@pytest.mark.smoke
def test_all_ranks_hear_the_same_and_stop_at_the_same_step(spawn_ranks):
    told = spawn_ranks(agreeing_ranks, 3)
    assert told[0] == told[1] == told[2]
    first = told[0]
    assert first["words"] == [None, *(Word(step, step == 3, step != 2) for step in range(4))]
    assert first["done"] == [0, 1, 2, 3]
    assert first["now"] == Word(99, True, True, True)
    assert first["steps"] == "the ranks are at different steps: rank 0 at step 7, rank 2 at step 9"
    assert first["fingerprints"] == "the ranks have taken different decisions at step 7: ranks 0 and 1 differ"
    assert first["after"] == Word(8, False, True)


@pytest.mark.parametrize("every", [0, -1, True, 1.5])
def test_the_number_of_steps_between_words_must_be_a_count(every):
    with pytest.raises(ValueError, match=f"every must be an integer >= 1, got {every}"):
        Agreement(Ranks(), every=every)


def test_between_words_what_was_said_is_kept():
    agreement = Agreement(Ranks(), every=4)
    said = {0: (False, True, False), 2: (True, True, False), 3: (False, False, False), 5: (False, True, True)}
    words = []
    for step in range(13):
        stop, finite, save = said.get(step, (False, True, False))
        agreement.post(step, stop, finite, save=save)
        words.append(agreement.read())
    expected = {
        0: Word(0, False, True),
        4: Word(4, True, False),
        8: Word(8, False, True, True),
        12: Word(12, False, True),
    }
    assert words == [expected.get(step) for step in range(13)]
    agreement.post(13, stop=True, finite=True)
    assert agreement.agree_now(14, stop=False, finite=True) == Word(14, True, True)  # at any step, with what was kept
    assert agreement.agree_now(15, stop=False, finite=True) == Word(15, False, True)


def ranks_that_seldom_agree(rank, world_size):
    """Rank 1 is signaled in step 4 and has a NaN in step 2; the last two words are of other decisions or steps."""
    agreement = Agreement(Ranks(rank, world_size), every=3)
    words, done = [], []
    for step in range(20):
        words.append(agreement.read())
        if words[-1] is not None and words[-1].stop:
            break
        agreement.post(step, rank == 1 and step == 4, not (rank == 1 and step == 2), fingerprint=1000 + step)
        done.append(step)
    told = {"words": words, "done": done}
    for name, fingerprints in (("between", (7 + rank, 5)), ("order", (5 + rank, 6 - rank)), ("last", (5, 7 + rank))):
        agreement.post(31, False, True, fingerprints[0])
        try:
            told[name] = agreement.agree_now(32, False, True, fingerprints[1])
        except RanksDisagree as error:
            told[name] = str(error)
    told["after"] = agreement.agree_now(33, False, True, fingerprint=7)
    return told


def test_ranks_that_agree_seldom_stop_together_and_miss_nothing(spawn_ranks):
    first, second = spawn_ranks(ranks_that_seldom_agree, 2)
    assert first == second
    sent = {1: Word(0, False, True), 4: Word(3, False, False), 7: Word(6, True, True)}
    assert first["words"] == [sent.get(step) for step in range(8)]
    assert first["done"] == list(range(7))
    for name in ("between", "order", "last"):
        assert "different decisions at step 32" in first[name]
    assert first["after"] == Word(33, False, True)


def hanging_ranks(rank, world_size, over):
    """Rank 1 hangs until the other one has given up."""
    Agreement(Ranks(rank, world_size), timeout_seconds=60).agree_now(1, False, True)
    agreement = Agreement(Ranks(rank, world_size), timeout_seconds=2)
    if rank == 1:
        assert wait_until(over.exists, 60)
    try:
        agreement.agree_now(2, False, True)
    except RanksDisagree as error:
        over.touch()
        return str(error)
    return ""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(spawn_ranks, tmp_path):
    first, second = spawn_ranks(hanging_ranks, 2, tmp_path / "over")
    assert first.startswith("rank 1 gave no word within 2 s at step 2")
    assert "at step 2" in second


def dying_ranks(rank, world_size, folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent ends the others as soon as it sees a death
    agreement = Agreement(Ranks(rank, world_size), timeout_seconds=600)
    agreement.agree_now(1, False, True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RanksDisagree) as caught:
        agreement.agree_now(2, False, True)
    (folder / "told").write_text(str(caught.value))
    os._exit(0)


def test_a_rank_that_died_is_named_long_before_the_timeout(spawn_ranks, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        spawn_ranks(dying_ranks, 2, tmp_path)  # which gives the others 30 s
    assert (tmp_path / "told").read_text().startswith("rank 1 was lost at step 2")
