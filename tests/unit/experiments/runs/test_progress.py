"""Progress of many runs, on a clock of the test."""

import math
import sys

import pytest

from experiments.runs.progress import RunsBar
from experiments.training.progress import Bar, duration, reported_to


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_log_shows_runs_losses_and_the_time_to_the_end(clock, capsys):
    with RunsBar(20, clock=clock) as bar:
        clock.now = 31.0
        bar.report(0, 0.5, 0.25)
        assert capsys.readouterr().err == "0/20 runs, 31 s, loss 0.25\n"
        clock.now = 40.0
        bar.report(1, 0.1, math.nan)
        assert capsys.readouterr().err == ""  # the next line without news comes after twice the time
        bar.finish(0)
        assert bar.seconds_left() is None  # one run says little
        bar.finish(1)
        assert capsys.readouterr().err == "2/20 runs, 40 s, about 6 min left\n"
        clock.now = 50.0
        for number in range(2, 8):
            bar.report(number, 0.5, number / 4)
        assert bar.seconds_left() == pytest.approx(50.0 / 5 * 15)
        bar.finish(2)
        bar.finish(3)
        assert capsys.readouterr().err == "4/20 runs, 50 s, loss 1 1.25 1.5 1.75, about 2 min left\n"


def test_of_many_losses_the_range_is_shown(clock, capsys):
    with RunsBar(30, clock=clock) as bar:
        for number in range(8):
            clock.now += 8.0
            bar.report(number, 0.5, 1.0 + number)
    assert "loss 1 to 4 of 4 runs" not in capsys.readouterr().err
    clock.now += 100.0
    bar.report(8, 0.1, 0.5)
    assert "0/30 runs, 3 min, loss 0.5 to 8 of 9 runs" in capsys.readouterr().err.replace("164 s", "3 min")


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with RunsBar(3, clock=clock) as bar:
        for number in range(3):
            clock.now += 10.0
            bar.report(number, 0.5, 0.125)
            bar.finish(number)
    printed = capsys.readouterr().err
    assert "loss 0.125" in printed and "about 10 s left" in printed and "3/3" in printed


def test_nothing_is_shown_where_it_is_not_wanted(clock, capsys):
    with RunsBar(2, enabled=False, clock=clock) as bar:
        clock.now = 1e4
        bar.report(0, 0.5, 1.0)
        bar.finish(0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12_600, "3.5 h")])
def test_times_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_run_reports_its_share_and_loss(capsys):
    printed = []
    with reported_to(lambda *values: printed.append(values)):
        bar = Bar(10, "epochs", enabled=False)
        bar.move_to(5)
        bar.show({"metrics/train/loss": 0.5, "metrics/validation/loss": 2.0})
        bar = Bar(1000, "iterations", enabled=False, max_seconds=10.0)
        bar.move_to(100)
        bar.show({"timing/training_seconds": 8.0})
    bar.show()
    assert printed[0] == (0.5, 0.5) and printed[1][0] == 0.8 and math.isnan(printed[1][1]) and len(printed) == 2
    assert capsys.readouterr().err == ""


def test_a_log_of_one_run_says_how_much_time_is_left(capsys):
    bar = Bar(20, "epochs")
    for count in range(1, 21):
        bar.move_to(count)
        bar.show({"metrics/train/loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1] == "20/20 epochs, 0 s, loss 0.5"
    assert all(line.endswith(" left") for line in lines[:-1])
