"""Runs of physics-informed networks by the command: records, messages, and an equation of a user."""

import copy

import h5py
import numpy as np
import pytest
import torch
import yaml
from heat import HEAT, write_heat
from suite_cases import PINN, build, pinn_run

from experiments.__main__ import main
from experiments.catalog import load_config, parse_config
from experiments.distributed.ranks import Ranks
from experiments.pinn.problem import describe
from experiments.records.reading import read_fields, read_run
from experiments.records.status import run_path, state_of
from experiments.runs import execute
from experiments.runs.config import expand_runs
from experiments.training.stage import Stage
from experiments.training.train import Training, train

LOSS = "metrics/train/loss"
SGD = {"name": "SGD", "lr": 1e-3}
LBFGS = {"name": "LBFGS", "max_iter": 4, "line_search_fn": "strong_wolfe"}


def run(config, results, *options):
    return main(["run", str(config), "--results", str(results), "--jobs", "1", *options])


def test_a_record_says_what_it_holds(config, tmp_path, capsys):
    results = tmp_path / "results"
    assert run(config, results, "--set", "seeds=0") == 0
    path = results / "burgers_2d" / "test" / "adam_aadl" / "seed-0.h5"
    record = read_run(path)
    attributes = record.attributes
    assert record.config["experiment"] == "burgers_2d" and record.places.tolist() == [0, 4, 8, 12]
    assert attributes["data_source"] == "computed" and "Burgers" in attributes["equation"]
    assert (attributes["variant_index"], attributes["baseline"], attributes["degenerate"]) == (1, "adam", "")
    assert (attributes["diverged_epoch"], attributes["diverged_iteration"]) == (-1, -1)
    assert attributes["stop_reason"] == "iterations" and attributes["num_threads"] == 1
    last = record.series["metrics/validation/relative_l2_grid"][-1]
    assert attributes["relative_l2_grid"] == pytest.approx(last) and attributes["relative_l2_graded"] > 0
    assert "folder" not in record.config["problem"]
    fields = read_fields(path)
    assert fields["u"].shape == fields["exact"].shape == fields["pde_residual"].shape == (256, 100)
    error = np.linalg.norm(fields["u"] - fields["exact"]) / np.linalg.norm(fields["exact"])
    assert error == pytest.approx(last, rel=1e-4)
    assert fields["collocation_x"].shape == (32,)
    with h5py.File(path) as file:
        names = []
        file.visit(names.append)
        datasets = [file[name] for name in names if isinstance(file[name], h5py.Dataset)]
        for dataset in datasets:
            assert dataset.attrs["units"] and dataset.attrs["long_name"], dataset.name
            if not dataset.is_scale:
                for axis, length in enumerate(dataset.shape):
                    assert len(dataset.dims[axis][0]) == length, dataset.name
        assert file["fields/u"].dims[1][0] == file["fields/t"]
        assert file["metrics/train/loss"].dims[0][0] == file["metrics/train/iteration"]
        assert "mean squared" not in file["metrics/train/loss"].attrs["long_name"]
        assert "test set grid" in file["metrics/validation/relative_l2_grid"].attrs["long_name"]
    assert read_fields(path) and not any(name.startswith("fields") for name in record.series)


def test_a_label_or_an_override_that_changes_nothing_is_no_new_run(config, tmp_path, capsys):
    results = tmp_path / "results"
    run(config, results)
    changes = ["variants.adam.label=Adam again", "variants.adam_aadl.problem={num_points: 32}"]
    capsys.readouterr()
    assert run(config, results, *(text for change in changes for text in ("--set", change))) == 0
    assert "0 of 4 runs to do" in capsys.readouterr().err
    record = read_run(results / "burgers_2d" / "test" / "adam" / "seed-1.h5")
    assert record.attributes["label"] == record.config["variant"]["label"] == "Adam again"
    run(config, results, "--set", "baseline=adam_aadl", "--set", "variants=adam_aadl")
    assert "0 of 2 runs to do" in capsys.readouterr().err
    record = read_run(results / "burgers_2d" / "test" / "adam_aadl" / "seed-1.h5")
    assert record.attributes["baseline"] == "adam_aadl"  # brought up to date without a run
    run(config, results, "--set", "variants.adam_aadl.problem={num_points: 16}")
    assert "2 of 4 runs to do" in capsys.readouterr().err


def test_a_run_with_a_time_limit_reports_its_progress_by_time(monkeypatch, capsys):
    seconds = iter(range(10**6))
    monkeypatch.setattr("experiments.training.clock.time.perf_counter", lambda: next(seconds))
    limited = pinn_run(training={"iterations": 10**6, "evaluate_every": 1, "max_seconds": 60})
    problem = build(limited, Ranks())
    optimizer = torch.optim.Adam(problem.model.parameters())
    result = train(Training(problem, [Stage(optimizer)], Ranks(), show_progress=True))
    lines = capsys.readouterr().err.splitlines()
    assert result.stop_reason == "time" and len(result.iterations) > 11
    assert 5 <= len(lines) <= 10 and all("/1000000 iterations, " in line and "loss " in line for line in lines)


@pytest.mark.slow
def test_a_run_is_the_same_twice_and_in_worker_processes(tmp_path):
    experiment = parse_config(copy.deepcopy(PINN) | {"seeds": [3]})
    for name, jobs in (("one", 1), ("two", 2)):
        execute.execute_experiment(experiment, Ranks(), tmp_path / name, num_jobs=jobs)
    for path in (tmp_path / "one").rglob("*.h5"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert (read_run(path).series[LOSS] == read_run(other).series[LOSS]).all()


def test_a_single_run_prints_loss_error_and_speed(config, tmp_path, capsys):
    run(config, tmp_path / "results", "--set", "seeds=0", "--set", "variants=adam")
    lines = capsys.readouterr().err.splitlines()
    [last] = [line for line in lines if line.startswith("12/12 iterations")]
    assert "iterations/s" in last and "loss " in last and "error " in last
    assert lines[-1].startswith("next: python -m experiments summarize")


def test_a_degenerate_equation_is_named_in_every_output(tmp_path, capsys):
    raw = copy.deepcopy(PINN) | {"experiment": "burgers_100d", "seeds": [0]}
    raw["problem"] |= {"equation": "burgers_100d"}
    raw["variants"] = {"adam": raw["variants"]["adam"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert run(path, tmp_path / "results") == 0
    assert "degenerate" in capsys.readouterr().err
    (record,) = (tmp_path / "results").rglob("*.h5")
    assert "degenerate" in read_run(record).attributes["degenerate"]
    assert read_fields(record) == {}


def test_a_user_adds_an_equation_by_a_file(tmp_path, capsys):
    write_heat(tmp_path)
    raw = copy.deepcopy(PINN) | {"experiment": "my_heat", "seeds": [0]}
    raw["problem"] |= {"equation": "heat.py", "options": {"diffusivity": 0.2}}
    path, results = tmp_path / "config.yaml", tmp_path / "results"
    path.write_text(yaml.safe_dump(raw))
    assert run(path, results, "--set", "variants=adam") == 0
    config = load_config(path, ["variants=adam"])
    (expanded,) = expand_runs(config)
    record = run_path(results, expanded)
    assert record == results / "my_heat" / "test" / "adam" / "seed-0.h5"
    attributes = read_run(record).attributes
    assert attributes["equation"] == "heat equation, mode 1" and str(tmp_path) not in attributes["config"]
    assert state_of(record, expanded, describe(expanded.problem).digest, 1) == "finished"
    write_heat(tmp_path, HEAT.replace("u.time -", "2 * u.time -"))
    assert state_of(record, expanded, describe(expanded.problem).digest, 1) == "changed"
    capsys.readouterr()
    assert run(path, results, "--set", "problem.options.mode=x") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "Heat: conditions failed: TypeError" in line
    assert run(path, results, "--set", "problem.conditions=hard") == 2
    assert "problem: conditions must be soft, because heat equation, mode 1 offers no lift" in capsys.readouterr().err
    assert run(path, results, "--set", "problem.equation=cold.py") == 2
    assert "cold.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("uniform[:, :1]", "uniform[:0, :1]", "must yield points with soft conditions, got none for .*tions = 8"),
        ("points, self.exact(points)", "points, self.exact(points)[:3]", r"return points \(n, 2\) and values \(n, 1\)"),
    ],
)
def test_conditions_that_train_nothing_are_refused_before_training(tmp_path, right, wrong, message):
    write_heat(tmp_path, HEAT.replace(right, wrong))
    raw = copy.deepcopy(PINN) | {"experiment": "my_heat", "seeds": [0]}
    raw["problem"] |= {"equation": "heat.py"}
    with pytest.raises(ValueError, match=message):
        build(expand_runs(parse_config(raw, tmp_path))[0], Ranks())
