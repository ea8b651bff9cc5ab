from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from suite_cases import VARIANTS, problem, result, run_config

from experiments.admissions.settings import GraduateAdmissionsConfig
from experiments.distributed.ranks import Ranks
from experiments.records.acceleration_figure import DEVIATION, acceleration_panels, threshold_of
from experiments.records.compare import find_folders, read_comparison
from experiments.records.figures import Coinciding, spread_over_seeds
from experiments.records.palette import COLORS, method_of, styled
from experiments.records.status import run_path
from experiments.records.training_figures import draw_training_figures, oscillation_by_batch_size, slopes
from experiments.records.writing import write_run

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def save(results, config, outcome, source="csv"):
    write_run(run_path(results, config), config, problem(source), outcome, Ranks(), NOW, NOW)


def losses(rate, seed=0):
    return 0.5 * np.exp(-rate * np.arange(11)) + 0.01 * (1 + seed)


def fill(results, source="csv"):
    """Two seeds of every variant, both studies."""
    counters = {
        "acceleration__accepted": np.arange(11),
        "acceleration__reverted": np.zeros(11),
        "acceleration__rejected_loss": np.arange(11) // 2,
        "acceleration__averaging": np.arange(11) > 5,
        "acceleration__relative_standard_deviation": np.append(np.nan, np.linspace(0.1, 1, 10)),
    }
    for rate, name in zip((0.3, 0.25, 0.6, 0.1), VARIANTS, strict=True):
        for seed in (0, 1):
            series = counters if name == "sgd_aadl" else {}
            save(results, run_config(name, seed), result(losses(rate, seed), **series), source)
    for rate in (1e-3, 1e-2, 1e-1):
        for name in ("sgd", "sgd_aadl"):
            config = run_config(f"{name}--lr-{rate:g}", study="learning_rate")
            config = replace(config, variant=config.variant.with_rate(rate))
            diverged = name == "sgd" and rate == 1e-1
            outcome = result([0.5, np.inf] + [np.nan] * 9, diverged_epoch=1) if diverged else result(losses(rate))
            save(results, config, outcome, source)
    for size in (10, 40, 160, 320):
        config = run_config(f"sgd--batch-{size}", study="batch_size", batch_size=size, measure_updates=True)
        values = np.append(np.nan, np.full(10, size**-0.5 if size < 320 else 1e-3))
        save(results, config, result(losses(0.3), updates__relative_standard_deviation=values), source)


@pytest.mark.parametrize("source", ["csv", "surrogate"])
def test_all_figures_are_drawn_and_small(tmp_path, source):
    fill(tmp_path, source)
    (folder,) = find_folders(tmp_path)
    comparison = read_comparison(folder)
    assert comparison.seeds == (0, 1) and comparison.is_surrogate == (source == "surrogate")
    assert ("SURROGATE" in comparison.source_line()) == (source == "surrogate")
    assert "2 seeds (0-1)" in comparison.source_line()
    assert "scale test (settings in the records)" in comparison.source_line()
    laptop = replace(comparison, folder=folder.with_name("laptop"))
    assert laptop.source_line().startswith("experiments/configs/graduate_admissions/laptop.yaml · ")
    paths = draw_training_figures(comparison)
    assert {path.stem for path in paths} == {
        "loss", "published_scheme", "batch_size", "acceleration", "learning_rate",
    }  # fmt: skip
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and 10_000 < path.stat().st_size < 200_000


def test_only_what_was_run_is_drawn(tmp_path):
    save(tmp_path, run_config(), result(losses(0.3)))
    comparison = read_comparison(tmp_path / "graduate_admissions" / "test")
    assert [path.name for path in draw_training_figures(comparison)] == ["loss.png"]


def test_roles_and_families(tmp_path):
    fill(tmp_path)
    comparison = read_comparison(tmp_path / "graduate_admissions" / "test")
    (family,) = comparison.families
    assert family == "SGD, lr 0.001, momentum 0.9, nesterov"
    assert [variant.role for variant in comparison.families[family]] == ["plain", "ema", "published", "aadl"]
    assert {study: len(runs) for study, runs in comparison.studies.items()} == {"learning_rate": 6, "batch_size": 4}


def test_slopes_are_those_between_neighbors(tmp_path):
    fill(tmp_path)
    runs = read_comparison(tmp_path / "graduate_admissions" / "test").studies["batch_size"]
    sizes, values = oscillation_by_batch_size(runs, 0.0, 0.25)
    assert sizes.tolist() == [10, 40, 160, 320] and values.shape == (4, 1)
    assert slopes(sizes, values[:, 0])[:2] == pytest.approx([-0.5, -0.5])
    assert slopes(sizes, values[:, 0])[2] < -5


def test_a_method_has_one_color_and_its_variants_have_line_styles(tmp_path):
    fill(tmp_path)
    ((plain, ema, published, fast),) = read_comparison(tmp_path / "graduate_admissions" / "test").families.values()
    assert [method_of(variant) for variant in (plain, ema, published, fast)] == ["plain", "ema", "published", "aadl"]
    (first, second) = [(color, style) for _, color, style in styled([plain, plain])]
    assert first[0] == second[0] == COLORS["plain"] and first[1] != second[1]
    assert len(set(COLORS.values())) == len(COLORS)
    assert threshold_of(fast) == 0.7


def test_bands_run_from_the_least_to_the_largest_seed():
    low, middle, high = spread_over_seeds(np.array([[1.0, 2.0], [3.0, 5.0], [2.0, np.inf]]))
    assert (low.tolist(), middle.tolist(), high.tolist()) == ([1, 2], [2, 5], [3, np.inf])


def test_a_threshold_is_drawn_where_the_criterion_is_evaluated(tmp_path):
    fill(tmp_path)
    ((*_, fast),) = read_comparison(tmp_path / "graduate_admissions" / "test").families.values()
    without = replace(
        fast, runs={0: replace(fast.runs[0], series={**fast.runs[0].series, DEVIATION: np.full(11, np.nan)})}
    )
    figure, handles = acceleration_panels([("with", fast), ("without", without)], "epoch")
    evaluated, empty = figure.axes[2:4]
    assert len(evaluated.get_lines()) == 2 and not empty.get_lines()
    assert "The criterion is not evaluated" in empty.texts[0].get_text()
    assert "rejected: raises the loss" in handles


def test_curves_that_coincide_are_named_and_dashed():
    coinciding = Coinciding()
    curve = np.array([np.nan, 1.0, 2.0])
    assert coinciding.style("A", curve, "-") == coinciding.style("B", curve + 1, "-") == "-"
    assert coinciding.note == ""
    assert coinciding.style("C", curve.copy(), "-") != "-"
    assert coinciding.note == "Curves that coincide: A = C."


def test_records_that_do_not_belong_together_are_refused(tmp_path):
    save(tmp_path, run_config(seed=0), result(losses(0.3)))
    save(tmp_path, run_config(seed=1, epochs=5), result(losses(0.3)))
    with pytest.raises(ValueError, match=r"records with different settings.*--set scale=NAME"):
        read_comparison(tmp_path / "graduate_admissions" / "test")
    with pytest.raises(ValueError, match="no results of burgers"):
        find_folders(tmp_path, "burgers")


def test_settings_of_the_machine_may_differ(tmp_path):
    other = replace(run_config(seed=1), problem=GraduateAdmissionsConfig(hidden_sizes=(9,)))
    for run in (run_config(seed=0), other):
        save(tmp_path, run, result(losses(0.3)))
    comparison = read_comparison(tmp_path / "graduate_admissions" / "test", of_the_machine=("hidden_sizes",))
    assert len(comparison.runs) == 2
