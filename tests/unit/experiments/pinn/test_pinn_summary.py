import numpy as np
import pytest
from pinn_records import LABEL, LAPTOP, PLAIN, RAW, SECOND_ORDER, save

from experiments.catalog import load_config, parse_config
from experiments.pinn.compare import CONFIGS, EVALUATIONS, accepted_candidates, measure, read_groups, settings_line
from experiments.pinn.experiment import EXPERIMENT as PINN_EXPERIMENT
from experiments.pinn.figures import draw_pinn_figures
from experiments.pinn.tables import summarize_pinn
from experiments.records.compare import SECONDS
from experiments.runs.config import expand_runs

FAST = np.append(PLAIN[::2], [0.009] * 5)  # below 0.01 from iteration 50 on, ends at 0.009


def groups(results, experiment="burgers_2d"):
    return read_groups(results / experiment / "test", PINN_EXPERIMENT)


def counters(accepted, attempts, reverted=0):
    counts = {"accepted": accepted, "attempts": attempts, "reverted": reverted}
    return {f"acceleration__{name}": np.linspace(0, count, 11) for name, count in counts.items()}


def measured(results, name="adam_aadl"):
    group = next(group for group in groups(results) if any(variant.name == name for variant in group.variants))
    return measure(next(variant for variant in group.variants if variant.name == name), group)


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_variants_stand_in_the_order_of_the_configuration_beside_their_baseline(tmp_path):
    for name in ("adam", "adam_aadl", "zadam", "lbfgs", "other"):
        save(tmp_path, name, PLAIN)
    main, other = groups(tmp_path)
    assert [variant.name for variant in main.variants] == ["zadam", "adam", "adam_aadl", "lbfgs"]
    assert main.baseline.name == "adam" and main.main_set == "grid" and main.seeds == (0,)
    assert [variant.name for variant in other.variants] == ["other"] and other.baseline.name == "other"
    assert settings_line(main) == "MLP of 2 x 6, 32 + 8 points (latin hypercube, fixed), 100 iterations, float32"


def test_another_equation_is_never_compared(tmp_path):
    save(tmp_path, "adam", PLAIN)
    save(tmp_path, "adam_aadl", FAST, digest="xyz", equation="another one")
    one, two = groups(tmp_path)
    assert (one.trained, two.trained) == (LABEL, "another one") and two.baseline is None
    text = summarize_pinn([one, two])
    assert "another one, compared with adam (not run)" in text and "iterations to" not in text.split("Median over")[0]


def test_an_option_that_the_label_does_not_tell_makes_another_equation(tmp_path):
    problem = RAW["problem"] | {"equation": "two_body"}
    own = RAW["variants"]["adam_aadl"] | {"problem": {"options": {"amplitude": 1.0}}}
    changes = {"problem": problem, "variants": RAW["variants"] | {"adam_aadl": own}}
    for name in ("adam", "adam_aadl"):
        save(tmp_path, name, PLAIN, changes=changes)
    one, two = groups(tmp_path)
    assert one.baseline is not None and two.baseline is None
    assert two.trained == f"{one.trained}, amplitude 1"


def test_a_baseline_stands_in_its_own_group_and_in_that_of_its_baseline(tmp_path):
    for name in LAPTOP:
        save(tmp_path, name, PLAIN, changes={"variants": LAPTOP})
    main, second = groups(tmp_path)
    assert [variant.name for variant in main.variants] == ["adam", "adam_aadl", "lm"]
    assert [variant.name for variant in second.variants] == ["lm", "lm_aadl"]
    assert main.baseline.name == "adam" and second.baseline.name == "lm"
    text = summarize_pinn([main, second])
    assert f"{LABEL}, compared with LM\n" in text and "not run)" not in text


SHIPPED = sorted(path for path in CONFIGS.glob("burgers_*/*.yaml"))
CASES = [
    pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=() if path.stem == "laptop" else pytest.mark.slow)
    for path in SHIPPED
]


def fill_shipped(results, path, overrides=()):
    config = load_config(path, overrides)
    for run in expand_runs(config):
        if run.seed == config.seeds[0]:
            save(results, run.name, PLAIN, config=run)
    return read_groups(results / config.experiment / config.scale, PINN_EXPERIMENT)


@pytest.mark.parametrize("path", CASES)
def test_every_group_of_the_shipped_configurations_has_its_baseline(tmp_path, path):
    try:
        found = fill_shipped(tmp_path, path)
    except ValueError as error:
        if "needs the package" in str(error):
            pytest.skip(str(error))
        raise
    names = {variant.name for group in found for variant in group.variants}
    assert names == set(load_config(path).variants)
    assert all(group.baseline is not None for group in found)
    text = summarize_pinn(found)
    assert "(not run)" not in text
    assert f"Source: experiments/configs/{path.parent.name}/{path.name} · " in text
    assert len({f.name for f in draw_pinn_figures(found)}) == 2 * len(found)  # convergence and predictors


def test_a_file_that_was_overridden_is_not_named_as_the_source(tmp_path):
    (path,) = [path for path in SHIPPED if path.parent.name == "burgers_2d" and path.stem == "laptop"]
    plain = fill_shipped(tmp_path / "plain", path, ["seeds=7"])[0]
    changed = fill_shipped(tmp_path / "changed", path, ["problem.num_points=256"])[0]
    assert plain.source_line().startswith("experiments/configs/burgers_2d/laptop.yaml · ")
    assert changed.source_line().startswith("scale laptop (settings in the records) · ")


@pytest.mark.parametrize("name", ["adam", "adam_aadl"])
def test_records_with_different_settings_are_refused(tmp_path, name):
    save(tmp_path, "adam", PLAIN)
    changes = {"training": {"iterations": 90, "evaluate_every": 10}}
    save(tmp_path, name, PLAIN, seed=1, changes=changes)
    what = "settings" if name == "adam" else r"training\.iterations"
    with pytest.raises(ValueError, match=rf"records with different {what}.*--set scale=NAME"):
        groups(tmp_path)


def test_a_setting_that_a_variant_has_for_itself_may_differ(tmp_path):
    save(tmp_path, "adam", PLAIN)
    save(tmp_path, "lbfgs", PLAIN)  # 50 iterations by its own settings
    assert len(groups(tmp_path)[0].variants) == 2


# ---- measures --------------------------------------------------------------------------------------------------------


def test_measures_against_the_baseline(tmp_path):
    for seed in (0, 1, 2):
        save(tmp_path, "adam", PLAIN, seed)
    save(tmp_path, "adam_aadl", FAST, 0)
    save(tmp_path, "adam_aadl", PLAIN * 1.5, 1)
    save(tmp_path, "adam_aadl", FAST, 7)  # the baseline has no such seed
    own = measured(tmp_path)
    assert own.shared == (0, 1) and len(own.loss) == 3
    assert np.isnan(own.unseen).all() and np.isnan(own.unseen_ratio).all()  # records from before there was one
    assert own.iterations.tolist() == [50, np.inf]
    assert own.ratio.tolist() == [pytest.approx(0.9), pytest.approx(1.5)]
    assert own.errors["grid"].tolist() == [pytest.approx(0.09), pytest.approx(0.15), pytest.approx(0.09)]
    assert own.errors["fine"][0] == pytest.approx(0.18)
    assert own.evaluations.tolist() == [100] * 3 and own.seconds.tolist() == [10] * 3


@pytest.mark.parametrize(
    ("settings", "is_other"),
    [
        ({"options": {"graded": 0.5}}, True),
        ({"condition_weight": 10}, True),
        ({"conditions": "hard"}, True),
        ({"adaptive_pool": 64, "resample_every": 10}, True),
        ({"num_points": 64, "num_conditions": 16, "sampler": "sobol", "dtype": "float64"}, False),
        ({"options": {"graded": 0.0, "nu": 0.01 / np.pi}, "resample_every": 10}, False),
    ],
)
def test_losses_of_different_objectives_are_not_divided(tmp_path, settings, is_other):
    variants = RAW["variants"] | {"adam_aadl": RAW["variants"]["adam_aadl"] | {"problem": settings}}
    for name, losses in (("adam", PLAIN), ("adam_aadl", FAST)):
        save(tmp_path, name, losses, changes={"variants": variants})
    (group,) = groups(tmp_path)
    own = measured(tmp_path)
    for values in (own.iterations, own.ratio, own.at_equal[EVALUATIONS], own.at_equal[SECONDS]):
        assert np.isnan(values).all() == is_other
    assert own.error_ratio.tolist() == [pytest.approx(0.9)]
    _, line = [line for line in summarize_pinn([group]).splitlines() if line.startswith("  accelerated ")]
    assert line.endswith(" 0.9 [0.9 .. 0.9]") and line.count("other loss") == (7 if is_other else 0)


def test_hard_conditions_without_points_have_no_weight(tmp_path):
    second = LAPTOP["lm_aadl"] | {"problem": SECOND_ORDER["problem"] | {"condition_weight": 10}}
    for name in ("lm", "lm_aadl"):
        save(tmp_path, name, PLAIN, changes={"variants": LAPTOP | {"lm_aadl": second}, "baseline": "lm"})
    assert measured(tmp_path, "lm_aadl").ratio.tolist() == [1]


def test_accepted_candidates_are_counted_net_and_over_the_seeds(tmp_path):
    for seed, counts in enumerate(((5, 20, 1), (9, 30), (0, 10))):
        save(tmp_path, "adam", PLAIN, seed)
        save(tmp_path, "adam_aadl", PLAIN, seed, **counters(*counts))
    (group,) = groups(tmp_path)
    assert [accepted_candidates(variant) for variant in group.variants] == ["-", "4 of 20"]
    assert any("1 [1 .. 1]" in line and "4 of 20" in line for line in summarize_pinn([group]).splitlines())
    save(tmp_path, "adam_aadl", [1.0, np.nan], 1, diverged=3, acceleration__accepted=[2, np.nan],
         acceleration__attempts=[4, np.nan])  # fmt: skip
    assert accepted_candidates(groups(tmp_path)[0].variants[1]) == "2 of 10"


def test_a_loss_that_rises_again_has_not_arrived(tmp_path):
    save(tmp_path, "adam", PLAIN)
    save(tmp_path, "adam_aadl", [*PLAIN[:3], 0.005, 0.005, 0.1, *PLAIN[6:-2], 0.01, 0.009])
    assert measured(tmp_path).iterations.tolist() == [90]
    lucky = [*PLAIN[:3], 0.005, *PLAIN[4:]]
    save(tmp_path, "adam", lucky)
    assert measured(tmp_path, "adam").iterations.tolist() == [100]


def test_equal_cost(tmp_path):
    """Twice the evaluations, half the seconds: half of its budget against all of the baseline's, and back."""
    save(tmp_path, "adam", PLAIN)
    save(tmp_path, "adam_aadl", PLAIN**2, evaluations=2, seconds=0.5)
    own = measured(tmp_path)
    assert own.ratio[0] == pytest.approx(1e-2)
    assert own.at_equal[EVALUATIONS][0] == pytest.approx(PLAIN[5] ** 2 / PLAIN[10])
    assert own.at_equal[SECONDS][0] == pytest.approx(PLAIN[10] ** 2 / PLAIN[5])


def test_equal_runs_with_slightly_different_clocks_are_equal(tmp_path):
    save(tmp_path, "adam", PLAIN)
    save(tmp_path, "adam_aadl", PLAIN, seconds=1.01)
    assert measured(tmp_path).at_equal[SECONDS][0] == pytest.approx(1, abs=0.06)
    save(tmp_path, "adam_aadl", PLAIN, seconds=2.0)
    assert measured(tmp_path).at_equal[SECONDS][0] == pytest.approx(PLAIN[5] / PLAIN[10])


def test_a_diverged_run_counts_as_infinitely_bad_and_is_named(tmp_path):
    for seed in (0, 1):
        save(tmp_path, "adam", PLAIN, seed)
        save(tmp_path, "adam_aadl", FAST, seed)
    save(tmp_path, "adam_aadl", [1.0, 0.001, np.nan], 1, diverged=17)
    own = measured(tmp_path)
    equal = own.at_equal[EVALUATIONS], own.at_equal[SECONDS]
    for values in (own.loss, own.errors["grid"], own.iterations, own.ratio, *equal, own.evaluations, own.seconds):
        assert np.isfinite(values[0]) and np.isposinf(values[1])
    text = summarize_pinn(groups(tmp_path))
    assert "Diverged: accelerated: seed 1 at iteration 17" in text and "1 of 2" in text
    assert "9.00e-03 .. diverged]" in text


def test_a_seed_on_which_only_the_baseline_diverged_is_unknown(tmp_path):
    for seed in (0, 1, 2):
        save(tmp_path, "adam", PLAIN, seed)
        save(tmp_path, "adam_aadl", FAST, seed)
    save(tmp_path, "adam", [1.0, np.nan], 1, diverged=3)
    save(tmp_path, "adam_aadl", [1.0, np.nan], 2, diverged=3)
    own = measured(tmp_path)
    for ratio in (own.ratio, own.error_ratio):
        assert ratio[0] == pytest.approx(0.9) and np.isnan(ratio[1]) and np.isposinf(ratio[2])
    assert "1 of 3, 1 unknown" in summarize_pinn(groups(tmp_path))


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_the_tables_are_written_and_printed(tmp_path):
    for seed in (0, 1):
        save(tmp_path, "adam", PLAIN, seed)
        save(tmp_path, "adam_aadl", FAST, seed)
        save(tmp_path, "lbfgs", PLAIN * 1.03, seed)
    save(tmp_path, "other", PLAIN)
    text = summarize_pinn(groups(tmp_path))
    markdown = (tmp_path / "burgers_2d" / "test" / "summary.md").read_text()
    for printed in (text, markdown):
        assert f"{LABEL}, compared with plain Adam" in printed and f"{LABEL}, compared with other" in printed
        assert "no network: frozen" in printed and "6.00e-01" in printed and "7.00e-01" in printed
        assert "50 [50 .. 50]" in printed and "0.9 [0.9 .. 0.9]" in printed
        assert "2 of 2" in printed and "Source: " in printed
        assert "DEGENERATE" not in printed
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + 5, 2 + 3, 2 + 3]  # a lone variant is not compared
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_a_degenerate_equation_is_named_first(tmp_path):
    save(tmp_path, "adam", PLAIN, degenerate="degenerate: u is tiny")
    text = summarize_pinn(groups(tmp_path))
    markdown = (tmp_path / "burgers_2d" / "test" / "summary.md").read_text()
    assert f"DEGENERATE EQUATION: {LABEL}: u is tiny" in text.splitlines()[0]
    assert f"DEGENERATE EQUATION: {LABEL}: u is tiny" in markdown.splitlines()[0]
    assert f"DEGENERATE - {LABEL}, compared with" in text


def test_without_a_known_solution_there_are_no_errors(tmp_path):
    save(tmp_path, "adam", PLAIN, predictors={})
    save(tmp_path, "adam_aadl", FAST, predictors={})
    text = summarize_pinn(groups(tmp_path))
    assert "relative L2 (" not in text and "no network" not in text and "50 [50 .. 50]" in text


def test_learning_rates_have_a_table(tmp_path):
    save(tmp_path, "adam", PLAIN)
    raw = RAW | {"seeds": [0], "studies": {"learning_rate": {"variants": ["adam"], "rates": [1e-3, 0.1], "seeds": [0]}}}
    studies = [run for run in expand_runs(parse_config(raw)) if run.study]
    save(tmp_path, "", 2 * PLAIN, config=studies[0])
    save(tmp_path, "", [1.0, np.nan], diverged=3, config=studies[1])
    text = summarize_pinn(groups(tmp_path))
    rows = [line.split() for line in text.splitlines() if line.startswith("  plain Adam  0.")]
    assert [row[2] for row in rows] == ["0.001", "0.1"] and rows[0][3] == "2.00e-02" and rows[1][3] == "diverged"
