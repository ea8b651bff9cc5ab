from datetime import datetime, timezone

import numpy as np
import pytest
from suite_cases import problem, result, run_config

from experiments.distributed.ranks import Ranks
from experiments.records.compare import read_comparison
from experiments.records.status import run_path
from experiments.records.summarize import measure, spread, summarize
from experiments.records.writing import write_run

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
PLAIN = np.linspace(11, 1, 11)  # final loss 1 after 10 epochs
FAST = np.append(np.linspace(11, 1, 5), [0.9] * 6)  # reaches 1 at epoch 4, ends at 0.9


def save(results, name, seed, losses, seconds=1.0, source="csv", **options):
    config = run_config(name, seed)
    outcome = result(losses, seconds, **options)
    write_run(run_path(results, config), config, problem(source), outcome, Ranks(), NOW, NOW)


def compare(results):
    return read_comparison(results / "graduate_admissions" / "test")


def variants(results):
    (family,) = compare(results).families.values()
    return {variant.name: variant for variant in family}


def test_measures(tmp_path):
    for seed in (0, 1, 2):
        save(tmp_path, "sgd", seed, PLAIN)
    save(tmp_path, "sgd_aadl", 0, FAST, seconds=1.1)
    save(tmp_path, "sgd_aadl", 1, PLAIN + 0.5, seconds=1.1)
    save(tmp_path, "sgd_aadl", 7, FAST)  # no plain run has this seed
    found = variants(tmp_path)
    measures = measure(found["sgd_aadl"], found["sgd"])
    assert measures.seeds == (0, 1)
    assert measures.epochs.tolist() == [4, np.inf]
    assert measures.seconds.tolist() == [pytest.approx(4.4), np.inf]
    assert measures.train_ratio.tolist() == [pytest.approx(0.9), pytest.approx(1.5)]
    assert np.allclose(measures.overhead, 0.1)
    plain = measure(found["sgd"], found["sgd"])
    assert plain.epochs.tolist() == [10, 10, 10] and (plain.train_ratio == 1).all()


def test_a_diverged_run_counts_as_infinitely_bad(tmp_path):
    save(tmp_path, "sgd", 0, PLAIN)
    save(tmp_path, "sgd_aadl", 0, [11, np.inf] + [np.nan] * 9, diverged_epoch=1)
    found = variants(tmp_path)
    assert found["sgd_aadl"].series("metrics/train/loss").tolist() == [[11, *[np.inf] * 10]]
    measures = measure(found["sgd_aadl"], found["sgd"])
    assert measures.epochs.tolist() == [np.inf] and measures.train_ratio.tolist() == [np.inf]
    assert "1 of 1" in summarize(compare(tmp_path))


DIVERGED = [11, np.inf] + [np.nan] * 9


def test_a_run_that_is_ahead_and_then_diverges_never_arrives(tmp_path):
    save(tmp_path, "sgd", 0, PLAIN)
    save(tmp_path, "sgd_aadl", 0, [11, 0.5, *[np.nan] * 9], diverged_epoch=2)
    found = variants(tmp_path)
    assert measure(found["sgd_aadl"], found["sgd"]).epochs.tolist() == [np.inf]


def test_a_seed_on_which_only_plain_diverged_is_unknown(tmp_path):
    save(tmp_path, "sgd", 0, PLAIN)
    save(tmp_path, "sgd", 1, DIVERGED, seconds=np.nan)
    save(tmp_path, "sgd_aadl", 0, FAST)
    save(tmp_path, "sgd_aadl", 1, FAST)
    assert "0 of 2, 1 unknown" in summarize(compare(tmp_path))
    save(tmp_path, "sgd_aadl", 0, PLAIN + 0.1)
    assert "1 of 2, 1 unknown" in summarize(compare(tmp_path))


def test_a_run_that_ends_as_the_plain_one_is_not_above_it(tmp_path):
    save(tmp_path, "sgd", 0, PLAIN)
    save(tmp_path, "sgd_aadl", 0, PLAIN)
    assert "0 of 1" in summarize(compare(tmp_path))


def test_no_seed_in_common(tmp_path):
    save(tmp_path, "sgd", 0, PLAIN)
    save(tmp_path, "sgd_aadl", 1, FAST)
    with pytest.raises(ValueError, match="no seed in common"):
        summarize(compare(tmp_path))


@pytest.mark.parametrize("source", ["csv", "surrogate"])
def test_the_table_is_written_and_printed(tmp_path, source):
    save(tmp_path, "sgd", 0, PLAIN, source=source)
    save(tmp_path, "sgd_aadl", 0, FAST, source=source)
    text = summarize(compare(tmp_path))
    markdown = (tmp_path / "graduate_admissions" / "test" / "summary.md").read_text()
    for printed in (text, markdown):
        assert "4 [4 .. 4]" in printed and "9.00e-01" in printed and "0 of 1" in printed
        assert "SGD, lr 0.001, momentum 0.9, nesterov" in printed and "Source: " in printed
        assert ("SURROGATE DATA" in printed) == (source == "surrogate")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


def test_records_of_other_data_are_not_compared(tmp_path):
    save(tmp_path, "sgd", 0, PLAIN)
    config = run_config("sgd_aadl", 0)
    write_run(run_path(tmp_path, config), config, problem(digest="other"), result(FAST), Ranks(), NOW, NOW)
    with pytest.raises(ValueError, match="holds records with different data"):
        compare(tmp_path)


def test_spread_of_never():
    assert spread(np.array([1.0, np.inf]), "{:.0f}") == "never [1 .. never]"
    assert spread(np.array([np.inf, np.inf]), "{:.0f}") == "never [never .. never]"
    assert spread(np.array([1.0, 3.0, np.inf]), "{:.0f}") == "3 [1 .. never]"
    assert spread(np.array([np.nan]), "{:.0f}") == "unknown"
