"""Faults that happen to real processes of the suite, those of `python -m benchmarks.faults`, and its report."""

import pytest

from benchmarks import faults
from benchmarks.fault_cases import FAULTS
from benchmarks.fault_jobs import Fault, Hung, differences
from benchmarks.fault_site import TABLE, Impossible, Outcome, Site, changed
from benchmarks.faults import Line, main, page, run_item

IN_SECONDS = (2, 7, 25)
"""Items that take few seconds in their quick form."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("faults"), quick=True)


@pytest.mark.parametrize("item", [pytest.param(i, marks=[pytest.mark.slow] * (i not in IN_SECONDS)) for i in FAULTS])
def test_a_run_survives_the_fault(site, item):
    line = run_item(item, site)
    if line.outcome is None:
        pytest.skip(line.why_not)
    assert line.outcome.problems == []


def test_other_ends_are_told_apart(site):
    """What the other tests rely on: a run with one step less momentum is no equal of the reference."""
    place, ended = site.reference()
    other = site.place(changed(TABLE, variants={"aadl": {"optimizer": {"name": "SGD", "lr": 0.011, "momentum": 0.9}}}))
    texts = differences((place, ended), (other, other.run()))
    assert "2 final states" in texts and "metrics/train/loss differs" in texts
    assert differences((place, ended), (place, ended)) == []
    stopped = site.place()
    first = stopped.run(Fault("SIGTERM", step=3))
    [text] = differences((place, ended), (stopped, first))
    assert text.startswith("it ended with [75]: ") and "stopped by SIGTERM after step" in text


def test_a_job_that_does_not_end_is_killed(site):
    job = site.place().start(Fault("hang", step=2))
    job.wait_for("fault")
    with pytest.raises(Hung, match=r"did not end within 0\.2 s"):
        job.wait(0.2)
    assert not job.lives


def test_what_went_wrong_is_reported(tmp_path, monkeypatch, capsys):
    def good(site):
        """A good one"""
        return Outcome(detections=[0.5, 2.0], lost=[3, 1], recoveries=[1.0], num_compared=1, notes=["as planned"])

    def bad(site):
        """A bad one"""
        return Outcome(problems=["a | b"], num_compared=1)

    def impossible(site):
        """No disk"""
        raise Impossible("a small disk needs root")

    def broken(site):
        """A broken one"""
        raise Hung("the job did not end")

    monkeypatch.setattr(faults, "FAULTS", {1: good, 2: bad, 5: impossible, 6: broken})
    assert main(["--only", "1,5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["1", "A", "good", "one", "2.0", "3", "1.0"] and "equal; as planned" in lines[1]
    assert "not run: a small disk needs root" in lines[2] and "all as they must be" in lines[3]
    assert main(["--docs"], docs=tmp_path) == 1
    told = capsys.readouterr().out
    assert "FAILED: a | b" in told and "FAILED: Hung: the job did not end" in told and "failed: 2, 6" in told
    text = (tmp_path / "faults.md").read_text()
    assert "1 of 3 faults end as they must." in text
    assert "| 1 | A good one | 2.0 | 3 | 1.0 | equal; as planned |" in text
    assert "| 2 | A bad one | - | - | - | FAILED: a \\| b |" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "99"], "--only must be numbers of 1, 2, "),
        (["--only", "one"], "got 'one'"),
        (["--docs", "--quick"], "--docs tells of all faults"),
        (["--docs", "--only", "1"], "--docs tells of all faults"),
        (["--folder", "/proc/here"], "/proc/here"),
    ],
)
def test_mistakes_are_told(capsys, arguments, text):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and text in told


def test_the_page_names_the_machine_and_the_command():
    text = page([Line(1, "a fault", Outcome(num_compared=1), "", 1.0)], 90)
    assert "python -m benchmarks.faults --docs" in text and "processor" in text
