"""The benchmark of a step counts bytes as by hand, cannot skip the work, and writes what it measured."""

import json
import math
from dataclasses import replace

import pytest
import torch

import aadl
from benchmarks import accelerated_step, break_even, machine, resnet50, step, step_report
from benchmarks.accelerated_step import Case, Memory, Result, kind_of
from benchmarks.machine import Bandwidth, Spread
from benchmarks.shapes import resnet50_shapes


@pytest.mark.parametrize(
    ("case", "store", "acceleration", "held"),
    [
        (Case(7, 10, "float32"), 28, 92, 92),
        (Case(7, 5, "float32"), 28, 52, 52),
        (Case(7, 10, "bfloat16"), 24, 52, 52),
        (Case(7, 5, "bfloat16"), 24, 32, 32),
        (Case(7, 5, "bfloat16", coupling="full"), 48, 64, 64),
        (Case(7, 1, "float32", average=True, safeguard=False), 28, 20, 20),
    ],
)
def test_bytes_are_counted_as_by_hand(case, store, acceleration, held):
    states = 2 if case.coupling == "full" else 1
    every_other = {"store": store + 8 * states, "acceleration": acceleration, "both": store + acceleration}
    assert accelerated_step.moved_bytes(replace(case, frequency=2)) == every_other
    seldom = {"store": store, "acceleration": acceleration, "both": store + acceleration}
    assert accelerated_step.moved_bytes(replace(case, frequency=10)) == seldom
    always = accelerated_step.moved_bytes(replace(case, frequency=1))
    assert always["both"] == store + 8 * states + acceleration
    assert accelerated_step.moved_bytes(case, relaxation=0.5)["acceleration"] == acceleration + case.depth * (
        4 if case.history == "float32" else 2
    )
    assert accelerated_step.held_bytes(case) == held


def test_the_floor_of_a_tiny_case_is_that_of_its_bytes():
    # 10 parameters, depth 1, float32: a store moves 280 bytes at 28 B/s, an acceleration 200 bytes at 50 B/s
    floors = step_report.floor_seconds(Case(10, 1, frequency=5), Bandwidth(copy=28.0, read=50.0, update=1.0))
    assert floors == {"store": 10.0, "acceleration": 4.0, "both": 14.0}


@pytest.mark.parametrize(("coupling", "history"), [("params", "float32"), ("full", "bfloat16")])
def test_a_wrong_count_of_bytes_is_noticed(monkeypatch, coupling, history):
    result = accelerated_step.measure(Case(1_000_000, 3, history, coupling=coupling, fused=False), "cpu", 1)
    report = report_of([result])
    assert not step_report.disagreements(report)
    right = accelerated_step.held_bytes
    for wrong in (-8, 8):
        for module in (accelerated_step, step_report):
            monkeypatch.setattr(module, "held_bytes", lambda case, wrong=wrong: right(case) + wrong)
        assert step_report.disagreements(report)


def test_resnet50_has_the_published_parameters():
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in resnet50.resnet50().parameters()]
    assert sorted(shapes) == sorted(resnet50_shapes())  # listed in another order there
    assert (len(shapes), sum(map(math.prod, shapes))) == (161, accelerated_step.RESNET50)
    assert accelerated_step.shapes_of(45) == [(3,)] * 5 + [(2,)] * 15


def test_resnet50_computes():
    with torch.device("meta"):
        assert resnet50.resnet50()(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


def test_steps_are_told_apart_by_the_counters():
    names = ("macro_steps", "attempts", "accepted", "reverted")

    def kind(*change, last="idle"):
        return kind_of(dict.fromkeys(names, 3), {name: 3 + c for name, c in zip(names, change, strict=True)}, last)

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
    turn = accelerated_step.Round(
        accelerated_step.Problem(40, "cpu"), Case(40, 2, frequency=4, store_every=2), 1, False
    )
    waits = iter([0, 1, 0, 3, 0, 2, 0, 3])  # of steps 1 to 8
    monkeypatch.setattr(machine, "host_waits", lambda call: next(waits))
    turn.count_host_waits()
    assert turn.waits == {"idle": 0, "store": 2, "both": 3}


def test_added_time_is_split_between_store_and_acceleration():
    result = result_of(Case(1000, 2), plain=1.0, **{"store after candidate": 3.0, "both": 8.0})
    assert step_report.added(result) == {"store after candidate": 2.0, "store": 2.0, "both": 7.0}  # another store
    seldom = result_of(Case(1000, 2, frequency=5), plain=1.0, store=3.0, both=8.0)
    assert step_report.added(seldom) == {"store": 2.0, "both": 7.0, "acceleration": 5.0}
    every_step = replace(result, case=Case(1000, 2, frequency=1))
    assert step_report.added(every_step) == {"both": 7.0}
    # 36 B and 28 B: one second each
    assert step_report.ratios(every_step, Bandwidth(36_000.0, 28_000.0, 1.0)) == {"both": 3.5}


def test_disturbed_cases_are_named():
    results = [result_of(Case(size, 2), plain=1.0, both=2.0) for size in (10, 20, 30)]
    before = [Bandwidth(copy, 1.0, 1.0) for copy in (10.0, 11.0, 7.0)]
    samples = [*before, Bandwidth(10.0, 1.0, 1.0)]
    report = step_report.Report({}, Bandwidth(10.0, 1.0, 1.0), samples, before, results, [], [], [])
    assert [name.split()[1] for name in step_report.disturbed(report)] == ["20", "30"]


def test_quartiles():
    assert machine.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5, 1.0)
    assert machine.spread([3.0]) == Spread(3.0, 3.0, 3.0, 1, 3.0)
    with pytest.raises(ValueError, match="no times"):
        machine.spread([])


def test_tensors_are_weighed_by_storage():
    before = machine.tensor_bytes("cpu")
    vector = torch.zeros(1000)
    views = [vector[:10], vector.view(10, 100)]
    assert machine.tensor_bytes("cpu") - before == 4000
    assert len(views) == 2


def test_large_cases_are_a_documented_part_of_all():
    large = step.all_cases([accelerated_step.RESNET50], (5, 10))
    plain = [c for c in large if not c.average and c.coupling == "params" and c.safeguard and not c.fused]
    assert len(plain) == 2 * 2 * 3
    compiled = [replace(c, fused=False) for c in large if c.fused and c.coupling == "params"]
    assert compiled == plain
    rest = [c for c in large if replace(c, fused=False) not in plain]
    assert all(c.depth == 10 and c.frequency == 2 for c in rest)
    assert {(c.average, c.coupling, c.safeguard) for c in large} == {
        (False, "params", True), (True, "params", True), (False, "full", True), (False, "params", False),
    }  # fmt: skip
    grid = [c for c in step.all_cases([1000], (5, 10)) if c.store_every == 1]
    assert len(grid) == 2 * 2 * 3 * 2 * 2


def test_compilation_is_earned_by_what_it_saves():
    plain = break_even.costs([3.0, 2.0, 2.0, *[1.0] * break_even.STEADY])
    compiled = break_even.costs([40.0, 10.0, *[0.5] * break_even.STEADY, 0.5])
    assert plain == break_even.Costs(1.0, 4.0) and compiled == break_even.Costs(0.5, 49.0)
    assert break_even.earned_after(plain, compiled) == 90.0  # 45 seconds more at the start, half a second less each
    assert break_even.earned_after(compiled, plain) == math.inf
    assert break_even.earned_after(plain, replace(compiled, start=3.0)) == 0.0


def test_the_command_leaves_tables_numbers_and_a_figure(tmp_path, monkeypatch, capsys):
    threads, measure_all, written = torch.get_num_threads(), step.measure_all, []
    monkeypatch.setattr(step, "measure_all", lambda options: written.append(measure_all(options)) or written[0])
    try:
        assert step.main(["--quick", "--repeats", "2", "--output", str(tmp_path / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "Small problems, 20 tensors" in printed and "not measured on a GPU" in printed and "|" not in printed
    figure = (tmp_path / "out" / "step_roofline.png").read_bytes()
    assert figure.startswith(b"\x89PNG")

    monkeypatch.setattr(step, "draw", lambda report, path: path.write_bytes(figure))
    assert step.write(written[0], tmp_path / "out", docs=tmp_path / "docs") == 0
    assert "| 1,000 | 5 | bfloat16 | 2 | off | params | - |" in capsys.readouterr().out
    assert (tmp_path / "docs" / "figures" / "step_roofline.png").read_bytes() == figure
    header, first, *_ = (tmp_path / "docs" / "tables" / "step_small.csv").read_text().splitlines()
    assert header.startswith("parameters,depth,history") and first.startswith("1000,5,")

    saved = json.loads((tmp_path / "out" / "step.json").read_text())
    assert saved["machine"].keys() >= {"processor", "threads", "torch", "commit", "date"}
    assert len(saved["bandwidth_samples"]) == 2 and saved["bandwidth"]["copy"] > 1e8
    first = saved["results"][0]
    assert first["bandwidth_just_before"] == saved["bandwidth_samples"][0]
    assert first["case"] == {**first["case"], "parameters": 1000, "depth": 5, "history": "float32", "frequency": 2}
    assert first["moved_bytes_per_parameter"] == {"store": 36, "acceleration": 52, "both": 80}
    assert first["held_bytes_per_parameter"] == 52
    assert first["steps"]["both"]["count"] == 2 and first["statistics"]["accepted"] >= 2
    assert saved["textbooks"][0]["depth"] == 5


def result_of(case, **steps):
    times = {kind: Spread(seconds, seconds, seconds, 1, seconds) for kind, seconds in steps.items()}
    return Result(case, times, Memory(0, None, None, None), {}, {})


def report_of(results):
    return step_report.Report({"device": "cpu"}, Bandwidth(1.0, 1.0, 1.0), [], [], results, [], [], [])
