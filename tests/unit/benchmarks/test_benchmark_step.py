"""The benchmark of a step counts bytes as by hand, cannot skip the work, and writes what it measured."""

import math
from dataclasses import replace

import pytest
import torch

import aadl
from benchmarks import accelerated_step, break_even, machine, step, step_report
from benchmarks.accelerated_step import Case, Memory, Result, kind_of
from benchmarks.machine import Bandwidth


@pytest.mark.parametrize(
    ("case", "store", "acceleration"),
    [
        (Case(7, 10, "float32", 2), 36, 92),  # every store follows a candidate
        (Case(7, 5, "bfloat16", 10), 24, 32),
        (Case(7, 5, "bfloat16", 10, coupling="full"), 48, 64),
    ],
)
def test_bytes_are_counted_as_by_hand(case, store, acceleration):
    plain_store = store - 8 if case.frequency == 2 else store
    moved = {"store": store, "acceleration": acceleration, "both": plain_store + acceleration}
    assert accelerated_step.moved_bytes(case) == moved
    always = accelerated_step.moved_bytes(replace(case, frequency=1))
    assert always["both"] == plain_store + 8 * case.states + acceleration
    assert accelerated_step.held_bytes(case) == acceleration


def test_the_floor_of_a_tiny_case_is_that_of_its_bytes():
    # 10 parameters, depth 1, float32: a store moves 280 bytes at 28 B/s, an acceleration 200 bytes at 50 B/s
    floors = step_report.floor_seconds(Case(10, 1, frequency=5), Bandwidth(copy=28.0, read=50.0, update=1.0))
    assert floors == {"store": 10.0, "acceleration": 4.0, "both": 14.0}


@pytest.mark.parametrize(("coupling", "history"), [("params", "float32"), ("full", "bfloat16")])
def test_a_wrong_count_of_bytes_is_noticed(monkeypatch, coupling, history):
    result = accelerated_step.measure(Case(1_000_000, 3, history, coupling=coupling), "cpu", 1)
    report = step_report.Report("cpu", Bandwidth(1.0, 1.0, 1.0), [result], [])
    assert not step_report.disagreements(report)
    right = accelerated_step.held_bytes
    for wrong in (-8, 8):
        for module in (accelerated_step, step_report):
            monkeypatch.setattr(module, "held_bytes", lambda case, wrong=wrong: right(case) + wrong)
        assert step_report.disagreements(report)


def test_the_counters_distinguish_steps():
    def kind(*change, last="idle"):
        before = dict.fromkeys(accelerated_step.COUNTED, 3)
        return kind_of(before, {name: 3 + c for name, c in zip(before, change, strict=True)}, last)

    assert kind(1, 1, 1, 0) == "both"
    assert kind(1, 0, 0, 0) == "store"
    assert kind(1, 0, 0, 0, last="both") == "store after candidate"
    assert kind(1, 1, 0, 0) == kind(1, 0, 0, 1) == "refused"
    assert kind(0, 0, 0, 0) == kind(0, 0, 0, 0, last="open") == "idle"
    assert kind(0, 0, 0, 0, last="store") == kind(0, 0, 0, 0, last="both") == "open"


def test_a_case_without_accepted_candidates_is_an_error(monkeypatch):
    identity = aadl.accelerate
    monkeypatch.setattr(
        aadl, "accelerate", lambda *args, **named: identity(*args, **named | {"acceleration_type": "identity"})
    )
    with pytest.raises(RuntimeError, match="no candidate was accepted"):
        accelerated_step.measure(Case(100, 2), "cpu", 2)


def test_host_waits_are_counted_by_kind_of_step(monkeypatch):
    case = Case(40, 2, frequency=4, store_every=2)
    turn = accelerated_step.Round(accelerated_step.Problem(40, "cpu"), case, 1, weighs=False)
    waits = iter([0, 1, 0, 3, 0, 2, 0, 3])  # of steps 1 to 8
    monkeypatch.setattr(machine, "host_waits", lambda call: next(waits))
    assert turn.host_waits() == {"idle": 0, "store": 2, "both": 3}


def test_added_time_is_split_between_store_and_acceleration():
    def result(case, **steps):
        return Result(case, {kind.replace("_", " "): [seconds] for kind, seconds in steps.items()}, Memory(0), {})

    after_candidates = result(Case(1000, 2), plain=1.0, store_after_candidate=3.0, both=8.0)
    assert step_report.added(after_candidates) == {"store": 2.0, "both": 7.0}
    seldom = result(Case(1000, 2, frequency=5), plain=1.0, store=3.0, both=8.0)
    assert step_report.added(seldom) == {"store": 2.0, "both": 7.0, "acceleration": 5.0}
    every_step = replace(after_candidates, case=Case(1000, 2, frequency=1))
    assert step_report.added(every_step) == {"both": 7.0}
    # 36 B and 28 B: one second each
    assert step_report.ratios(every_step, Bandwidth(36_000.0, 28_000.0, 1.0)) == {"both": 3.5}


def test_tensors_are_weighed_by_storage():
    before = machine.storages()
    vector = torch.zeros(1000)
    views = [vector[:10], vector.view(10, 100)]
    assert [size for address, size in machine.storages().items() if address not in before] == [4000]
    assert len(views) == 2


def test_options_are_varied_one_at_a_time_and_compiled_where_that_pays():
    cases = step.all_cases([1000, 10**6], (5, 10))
    varied = [case for case in cases if case.average or case.coupling == "full" or not case.safeguard]
    assert all(case.depth == 10 and case.frequency == 2 for case in varied)
    assert all(case.average + (case.coupling == "full") + (not case.safeguard) == 1 for case in varied)
    assert {case.parameters for case in cases if case.fused} == {10**6}
    assert sum(case not in varied and not case.fused and case.store_every == 1 for case in cases) == 2 * 2 * 2 * 3


def test_compilation_is_earned_by_what_it_saves():
    plain = break_even.costs([3.0, 2.0, 2.0, *[1.0] * break_even.STEADY])
    compiled = break_even.costs([40.0, 10.0, *[0.5] * break_even.STEADY, 0.5])
    assert plain == break_even.Costs(1.0, 4.0) and compiled == break_even.Costs(0.5, 49.0)
    assert break_even.earned_after(plain, compiled) == 90.0  # 45 seconds more at the start, half a second less each
    assert break_even.earned_after(compiled, plain) == math.inf
    assert break_even.earned_after(plain, replace(compiled, start=3.0)) == 0.0


def test_the_command_leaves_tables_and_a_figure(tmp_path, capsys):
    assert step.main(["--quick", "--repeats", "2", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| 1,000 | 5 | bfloat16 | 2 | off | params | - |" in printed and "copy bandwidth over the run" in printed
    assert (tmp_path / "out" / "step_roofline.png").read_bytes().startswith(b"\x89PNG")
    header, first, *_ = (tmp_path / "out" / "step_small.csv").read_text().splitlines()
    assert header.startswith("parameters,depth,history") and first.startswith("1000,5,")
    assert step_report.read_csv(tmp_path / "out" / "step_bandwidth.csv")[1]["kind"] == "read"


def test_the_figure_reads_its_cases_from_the_tables_of_the_documentation():
    for name in step_report.UNITS:
        rows = step_report.read_csv(machine.ROOT / "docs" / "tables" / name)
        cases = [step_report.case_of(row) for row in rows]
        assert [step_report.case_cells(case)[1:] for case in cases] == [list(row.values())[1:7] for row in rows]
        assert [str(case.parameters) for case in cases] == [row["parameters"] for row in rows]


def test_the_rows_of_the_page_are_those_of_the_tables():
    """docs/performance.md shows some rows and columns of `step_large.csv` and `step_small.csv`."""
    page = (machine.ROOT / "docs" / "performance.md").read_text("utf-8")
    shown = 0
    for name, column, others in (
        ("step_large", "step with both", {"parameters": "25557032"}),
        ("step_small", "+idle", {}),
    ):
        rows = step_report.read_csv(machine.ROOT / "docs" / "tables" / f"{name}.csv")
        head, _, *lines = next(
            part for part in page.split("\n\n") if part.startswith("| ") and f" {column} " in part
        ).split("\n")
        for line in lines:
            cells = zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True)
            wanted = others | dict(cells)
            assert any(wanted.items() <= row.items() for row in rows), line
            shown += 1
    assert shown > 15
