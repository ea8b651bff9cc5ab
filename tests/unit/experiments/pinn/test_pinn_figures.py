import copy

import numpy as np
import pytest
import yaml
from pinn_records import ADAM, LABEL, PLAIN, RAW, fields, save
from suite_cases import PINN

from experiments.__main__ import main
from experiments.pinn.compare import read_groups
from experiments.pinn.experiment import EXPERIMENT as PINN_EXPERIMENT
from experiments.pinn.figures import (
    badness,
    curve,
    draw_acceleration,
    draw_baseline_solution,
    draw_best_solution,
    draw_convergence,
    draw_pinn_figures,
    draw_predictors,
)
from experiments.records.figures import save_figures

COUNTERS = {
    "acceleration__accepted": np.arange(11),
    "acceleration__rejected_loss": np.arange(11) // 2,
    "acceleration__averaging": np.arange(11) > 5,
    "acceleration__relative_standard_deviation": np.append(np.nan, np.linspace(0.1, 1, 10)),
}


def groups(results):
    return read_groups(results / "burgers_2d" / "test", PINN_EXPERIMENT)


def drawn(group, draw):
    """All texts of a figure, and the figure."""
    figures = []
    save_figures(group.folder, [("one.png", lambda: figures.append(draw(group)) or figures[0])])
    if figures[0] is None:
        return None
    texts = [text.get_text() for text in figures[0].findobj(lambda artist: hasattr(artist, "get_text"))]
    return " ".join(texts), figures[0]


def fill(results, with_fields=True, **options):
    for seed, scale in ((0, 0.9), (1, 0.7), (2, 0.8)):
        own = {"fields": fields(scale)} if with_fields else {}
        save(results, "adam", PLAIN * (2 - scale), seed, **own, **options)
        save(results, "adam_aadl", PLAIN * (1 - scale), seed, **own, **options, **COUNTERS)


@pytest.mark.parametrize("with_fields", [False, True])
def test_all_figures_are_drawn_and_small(tmp_path, with_fields):
    fill(tmp_path, with_fields)
    save(tmp_path, "other", PLAIN)
    paths = draw_pinn_figures(groups(tmp_path))
    names = {"solution", "solution_baseline"} if with_fields else {"predictors"}
    assert {path.stem for path in paths} == names | {
        "convergence", "acceleration", "convergence_of_other", "predictors_of_other",
    }  # fmt: skip
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and 10_000 < path.stat().st_size < 300_000


def test_no_figure_overwrites_another_one(tmp_path):
    """Two groups lack one baseline, on two equations; another one is called as a figure."""
    variants = {name: RAW["variants"][name] for name in ("adam", "adam_aadl")} | {
        name: {"optimizer": ADAM, "problem": {"options": {"nu": nu}}} for name, nu in (("wide", 0.1), ("wider", 0.3))
    }
    variants["baseline"] = {"optimizer": ADAM, "baseline": "baseline"}
    for name in variants:
        save(tmp_path, name, PLAIN, fields=fields(), changes={"variants": variants})
    stems = [path.stem for path in draw_pinn_figures(groups(tmp_path))]
    assert len(set(stems)) == len(stems)
    assert {"solution_baseline", "solution_of_baseline", "solution_baseline_of_baseline"} <= set(stems)
    assert {"convergence_of_adam+wide", "convergence_of_adam+wider"} <= set(stems)


def test_figures_with_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"same name in .*: one\.png"):
        save_figures(tmp_path, [("one.png", lambda: None), ("two.png", lambda: None), ("one.png", lambda: None)])


@pytest.mark.parametrize("degenerate", ["", "degenerate: u is tiny"])
@pytest.mark.parametrize(
    "draw", [draw_convergence, draw_best_solution, draw_baseline_solution, draw_predictors, draw_acceleration]
)
def test_titles_name_the_equation_the_source_and_what_is_wrong_with_it(tmp_path, draw, degenerate):
    fill(tmp_path, with_fields=draw is not draw_predictors, degenerate=degenerate)
    texts, _ = drawn(groups(tmp_path)[0], draw)
    assert f"{LABEL}: " in texts and "32 + 8 points" in texts and "Source: scale test" in texts
    assert (f"DEGENERATE - {LABEL}" in texts and "u is tiny" in texts) == bool(degenerate)


def test_the_best_run_and_the_median_run_of_the_baseline_are_drawn(tmp_path):
    fill(tmp_path)
    (group,) = groups(tmp_path)
    assert "the best run of aadl: accelerated, seed 0, relative L2 1.00e-02" in drawn(group, draw_best_solution)[0]
    assert "the baseline: plain Adam, seed 2, relative L2 1.20e-01" in drawn(group, draw_baseline_solution)[0]
    save(tmp_path, "adam_aadl", [1.0, np.nan], 0, diverged=3, fields=fields(np.nan))
    (group,) = groups(tmp_path)
    assert "the best run of aadl: accelerated, seed 2" in drawn(group, draw_best_solution)[0]


def test_a_solution_that_is_not_known_is_drawn_alone(tmp_path):
    for seed in (0, 1):
        save(tmp_path, "adam", PLAIN * (2 - seed), seed, fields=fields(exact=False), predictors={})
    (group,) = groups(tmp_path)
    assert badness(group.variants[0].runs[1], group) == pytest.approx(0.01)  # the loss
    texts, _ = drawn(group, draw_best_solution)
    assert "seed 1" in texts and "relative L2" not in texts and "|error|" not in texts
    assert draw_predictors(group) is None
    assert len(drawn(group, draw_convergence)[1].axes) == 2  # no error


def test_solutions_of_diverged_runs_and_missing_baselines_are_left_out(tmp_path):
    save(tmp_path, "adam_aadl", [1.0, np.nan], diverged=3, fields=fields(np.nan))
    (group,) = groups(tmp_path)
    assert draw_best_solution(group) is None and draw_baseline_solution(group) is None
    assert draw_acceleration(group) is None
    assert [path.name for path in draw_pinn_figures([group])] == ["convergence.png"]


def test_a_curve_ends_with_the_shortest_run_and_a_diverged_one_counts(tmp_path):
    save(tmp_path, "adam", PLAIN, 0)
    save(tmp_path, "adam", 3 * PLAIN[:8], 1, places=[0, 12, 22, 32, 42, 52, 62, 72])
    save(tmp_path, "adam", [9.0, 8.0, np.nan], 2, diverged=15)
    variant = groups(tmp_path)[0].variants[0]
    places, (low, middle, high) = curve(variant, "metrics/train/loss", "iterations")
    assert places.tolist() == [10, 20, 31, 41, 51, 61, 71]
    assert middle.tolist() == pytest.approx([3 * PLAIN[1], *3 * PLAIN[2:8]])  # the middle one of three
    assert np.isfinite(high[0]) and np.isnan(high[1:]).all() and (low <= middle).all()
    seconds, _ = curve(variant, "metrics/train/loss", "timing/training_seconds")
    assert seconds.tolist() == [1, 2, 3, 4, 5, 6, 7]
    texts, figure = drawn(groups(tmp_path)[0], draw_convergence)
    assert "plain Adam (1 of 3 diverged)" in texts and "frozen" in texts and "zero" in texts
    assert len(figure.axes) == 4 and all(axis.get_yscale() == "log" for axis in figure.axes)


def test_a_variant_of_which_all_runs_diverged_is_no_line(tmp_path):
    save(tmp_path, "adam", PLAIN)
    save(tmp_path, "adam_aadl", [1.0, np.nan], diverged=1)
    texts, _ = drawn(groups(tmp_path)[0], draw_convergence)
    assert "plain Adam" in texts and "accelerated" not in texts
    assert "(1 of 1 diverged)" in drawn(groups(tmp_path)[0], draw_predictors)[0].replace("\n", " ")


def test_the_commands_make_figures_and_tables_of_both_kinds(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "ONLY"):
        monkeypatch.delenv(name, raising=False)
    configs, docs = tmp_path / "configs", tmp_path / "docs"
    raw = copy.deepcopy(PINN) | {"seeds": [0]}
    of_100d = {"problem": raw["problem"] | {"equation": "burgers_100d"}, "experiment": "burgers_100d"}
    for settings in (raw, raw | of_100d):
        (configs / settings["experiment"]).mkdir(parents=True)
        (configs / settings["experiment"] / "laptop.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("experiments.settings.config_files.CONFIGS", configs)
    monkeypatch.setattr("experiments.commands.figures.DOCS_FIGURES", docs)
    results = str(tmp_path / "results")
    assert main(["reproduce", "--results", results, "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("DEGENERATE", "2d Burgers", "solution.png", "predictors.png"))
    assert main(["figures", "--results", results, "--docs", "--only", "burgers_2d"]) == 0
    assert "burgers_2d_test_convergence.png" in {path.name for path in docs.iterdir()}
    assert not any("100d" in path.name for path in docs.iterdir())
    capsys.readouterr()
    assert main(["summarize", "--results", results, "--only", "burgers_2d"]) == 0
    printed = capsys.readouterr().out
    assert "compared with plain Adam" in printed and "Source: " in printed and "100d" not in printed
