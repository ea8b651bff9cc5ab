"""benchmarks.where_it_pays: the best rate, the ratios, and a table of few cells."""

import math
from dataclasses import replace

import pytest

from benchmarks import where_it_pays as study
from benchmarks.where_it_pays import PROBLEMS, Run, best_rate, compared, middle, rate_of


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
