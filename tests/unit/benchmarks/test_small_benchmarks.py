"""Derivatives of PINNs, where acceleration pays, tuned rates, and the tables that all benchmarks print."""

import csv
import math
import re
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import deepxde_burgers, input_pipeline, pinn_operators, scaling, tables
from benchmarks import where_it_pays as study
from benchmarks.pinn_operators import WAYS, Case, Row, all_cases, errors, measure
from benchmarks.small_training import PROBLEMS, SCHEDULES, Run, train
from benchmarks.tuned_rates import HEADER, LOSS, rows
from benchmarks.where_it_pays import best_rate, compared, middle, rate_of
from experiments.pinn.burgers import cole_hopf


def test_numbers_of_tables():
    assert tables.number(None) == "-" and tables.number(0.0012345, 1e3) == "1.23" and tables.number(12345.6) == "12,346"
    assert tables.with_quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == "3 [2 .. 4]"
    assert tables.with_quartiles([3.0]) == "3 [3 .. 3]"
    assert tables.with_range([3.0, 1.0, 2.0]) == "2.00 [1.00 .. 3.00]"


def test_a_block_of_a_page_is_replaced_and_one_that_is_missing_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- b -->\n\nold\n\n<!-- end of b -->\nafter\n")
    tables.put_into_page("page", {"b": "| new |"}, tmp_path)
    assert page.read_text() == "before\n<!-- b -->\n\n| new |\n\n<!-- end of b -->\nafter\n"
    with pytest.raises(ValueError, match="has no lines <!-- c -->"):
        tables.put_into_page("page", {"c": ""}, tmp_path)


@pytest.mark.parametrize("benchmark", [input_pipeline, pinn_operators, scaling])
def test_the_conclusion_of_a_page_has_the_numbers_of_its_tables(benchmark):
    name = benchmark.__name__.rpartition(".")[2]
    page = (tables.REPORTS / f"{name}.md").read_text("utf-8")
    assert tables.parts(page, "conclusion")[1].split() == benchmark.conclusion(page).split()
    first = re.search(r"\d+\.\d+", benchmark.conclusion(page))[0]
    assert benchmark.conclusion(page.replace(first, "0.125")) != benchmark.conclusion(page)


# ---- derivatives -----------------------------------------------------------------------------------------------------


# The ways that call torch.func import modules that warn of their own deprecated calls.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
def test_ways_agree_with_autograd_and_the_estimate_does_not(way):
    residual, gradient = errors(Case(way, 30, "float64", checked=5))
    if way == "random":
        assert residual > 1e-4 and gradient > 1e-4
    else:
        assert residual < 1e-12 and gradient < 1e-12


def test_rows_are_compared_with_the_loop_of_the_same_dimension():
    rows = [Row(Case("loop", 100), [1.0], 10, 1, 0, 0), Row(Case("compressed", 100), [0.1, 0.2, 9.0], 10, 1, 0, 0)]
    rows.append(replace(rows[1], case=Case("compressed", 1000)))
    assert [cells[4] for cells in pinn_operators.table(rows, planar=False)] == ["1.00", "5.00", "-"]
    assert {case.way for quick in (True, False) for case in all_cases(quick)} == set(WAYS)


def test_a_row_is_measured():
    measured = measure(Case("compressed", 6, points=40, repeats=2))
    assert len(measured.seconds) == 2 and min(measured.seconds) > 0
    assert measured.residual_error < 1e-4
    text = pinn_operators.blocks_of([measured])["wide"]
    assert "| 6 | float32 | forward Laplacian, compressed (40 points, time x 100) |" in text


# ---- where it pays ---------------------------------------------------------------------------------------------------


def test_the_neighbors_of_the_best_rate_are_worse(monkeypatch):
    losses = {rate_of(index): abs(index - 3) for index in range(-5, 5)} | {rate_of(5): math.inf}
    monkeypatch.setattr(study, "train", lambda problem, batch, schedule, rate, seed: Run([losses[rate] + seed], [0.0]))
    assert [rate_of(index) for index in (-3, -2, -1, 0, 1)] == pytest.approx([0.03, 0.1, 0.3, 1, 3])
    assert best_rate(PROBLEMS["admissions"], 40, "constant") == 3


def test_ratios_are_steps_to_the_final_loss_of_plain():
    plain = Run([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0])
    runs = [
        Run([2.0, 1.01, 0.5, 0.5], [2.0, 5.0, 1.0, 1.0], 3, 4, 3, 18),
        Run([2.0, 2.0, 2.0, 2.0], [1.0] * 4, 0, 4, 0, 16),
    ]
    columns = compared([plain, plain], runs, 16)
    assert columns["steps_ratio_of_seeds"] == "0.500 inf"  # 2 % above is near enough
    assert columns["validation_ratio"] == "3.000"  # 5 / 1 and 1 / 1
    assert (columns["accepted"], columns["attempts"]) == (3, 8)
    assert (columns["averaging_share"], columns["closure_calls_per_step"]) == ("0.38", "1.06")
    entries = [{key: str(value) for key, value in columns.items()}] * 3
    assert middle(entries) == (math.inf, False)
    assert middle([entry | {"steps_ratio_of_seeds": "0.2 0.4", "averaging_share": "0.6"} for entry in entries])[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains(schedule):
    problem = replace(PROBLEMS["admissions"], steps=8)
    first, second = (
        train(problem, 160, schedule, 1e-2, 3, every=1, generator=generator)
        for generator in (None, torch.Generator().manual_seed(4))
    )
    assert len(first.losses) == 8 and first.losses[-1] < first.losses[0]
    assert first.losses != second.losses  # another order


@pytest.mark.slow
def test_a_table_is_measured_kept_and_drawn(tmp_path, monkeypatch):
    small = replace(PROBLEMS["admissions"], steps=24)
    monkeypatch.setattr(study, "PROBLEMS", {"admissions": small, "digits": small})
    for name, value in {"BATCHES": (160, 0), "NAMES": ("linear",), "CHOOSING": (0,), "REPORTED": (5,)}.items():
        monkeypatch.setattr(study, name, value)
    table, figure = tmp_path / "tables" / "t.csv", tmp_path / "figures" / "f.png"
    places = ["--table", str(table), "--figure", str(figure)]
    study.main(places)
    first = study.read(table)
    assert len(first) == 2 * 2 * 3 * 2 and {entry["batch"] for entry in first} == {"160", "320"}
    assert figure.stat().st_size > 10_000
    study.main(["--problems", "digits", *places])
    assert sorted(map(str, study.read(table))) == sorted(map(str, first))


# ---- tuned rates -----------------------------------------------------------------------------------------------------


def run_with_rate(variant, lr, losses):
    optimizer = {"name": "SGD", "arguments": {"lr": lr}}
    config = {"experiment": "graduate_admissions", "variant_name": variant, "variant": {"optimizer": optimizer}}
    series = {LOSS: np.array(losses), "metrics/validation/loss": np.array([3.0, 4.0, 2.0])}
    return types.SimpleNamespace(config=config | {"problem": {}}, series=series, diverged=False)


def test_a_rate_is_tuned_when_both_neighbors_are_worse():
    ends = {"inner": {0.1: [3.0, 9.0, 1.0], 0.2: [2.0, 1.0, 8.0], 0.3: [math.nan, 1.0, math.nan]}, "end": {0.1: [1.0]}}
    ends["end"] |= {0.2: [2.0], 0.3: [3.0]}
    runs = [run_with_rate(name, lr, [7.0, end]) for name in ends for lr, of in ends[name].items() for end in of]
    table = [dict(zip(HEADER, row, strict=True)) for row in rows(runs)]
    found = {(row["variant"], row["lr"]): row["tuned"] for row in table if row["tuned"]}
    assert found == {("inner", "0.2"): "yes", ("end", "0.1"): "end"}
    (row,) = (row for row in table if (row["variant"], row["lr"]) == ("inner", "0.2"))
    assert list(row.values())[4:9] == ["3", "2.000e+00", "1.000e+00", "8.000e+00", "2.000e+00"]
    (row,) = (row for row in table if (row["variant"], row["lr"]) == ("inner", "0.3"))
    assert row["final_loss"] == row["highest_final_loss"] == "inf" and row["lowest_final_loss"] == "1.000e+00"


def test_the_table_of_rates_is_the_one_that_the_command_writes():
    with (tables.REPORTS.parent / "tables" / "tuned_rates.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == HEADER


def test_the_exact_solution_of_the_example_has_no_error():
    def exact(points):
        return cole_hopf(torch.from_numpy(points), deepxde_burgers.NU).numpy()

    assert deepxde_burgers.error_of(exact) == 0.0
    assert deepxde_burgers.error_of(lambda points: 1.1 * exact(points)) == pytest.approx(0.1)
