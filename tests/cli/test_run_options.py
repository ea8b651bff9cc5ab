"""`run --dry-run` and `run --print-config`, and names that were meant otherwise."""

import argparse
import contextlib
import copy
import types
from pathlib import Path

import pytest
import yaml
from suite_cases import PINN, RAW, load_or_skip

from experiments.__main__ import main
from experiments.catalog import load_config, parse_config
from experiments.commands import running
from experiments.distributed.departure import Interrupted
from experiments.distributed.ranks import Ranks
from experiments.runs import execute
from experiments.runs.config import complete_settings, expand_runs
from experiments.settings.config_files import config_files
from experiments.settings.overrides import read_overridden
from experiments.settings.yaml_file import parse_yaml, to_yaml


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_an_override_leaves_out_is_said_once_by_all_ranks(monkeypatch, capsys):
    monkeypatch.setattr(running, "execute_here", lambda *_: None)
    for rank in (0, 1):
        ranks = Ranks(rank=rank, world_size=2, launcher="torchrun")
        running.execute(Path("a.yaml"), types.SimpleNamespace(num_ranks=2), ranks, argparse.Namespace(), ["a note"])
    assert capsys.readouterr().err == "a note\n"


def test_one_rank_says_that_a_run_was_stopped(monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(running, "end_on_failure", lambda ranks: contextlib.nullcontext())
    monkeypatch.setattr(running, "with_device", lambda ranks, launch: ranks)
    monkeypatch.setattr(running, "execute_experiment", stop)
    config = types.SimpleNamespace(num_ranks=2, launch=None)
    options = argparse.Namespace(jobs=1, force=False, results=None)
    for rank in (0, 1):
        mark = tmp_path / f"stopped-{rank}"
        monkeypatch.setenv("AADL_STOPPED_FILE", str(mark))
        ranks = Ranks(rank=rank, world_size=2, launcher="srun")
        code = running.resumable(lambda ranks=ranks: running.execute(Path("a.yaml"), config, ranks, options))
        assert code == 75 and mark.exists() == (rank == 0)  # for the job script
    assert capsys.readouterr().err == "stopped by SIGTERM: the same command goes on\n"


def test_torchrun_starts_the_command_that_was_typed(monkeypatch, tmp_path):
    lines = []

    class Launcher(contextlib.nullcontext):
        def wait(self, timeout):
            return 0

    monkeypatch.setattr(running.subprocess, "Popen", lambda line, env: lines.append(line) or Launcher(Launcher()))
    config = types.SimpleNamespace(num_ranks=2, experiment="a")
    options = argparse.Namespace(force=True, results=tmp_path, set=["seeds=0", "scale=b"])
    running.execute(Path("a.yaml"), config, Ranks(), options)
    start = lines[0].index("experiments")
    typed = ["run", "a.yaml", "--results", str(tmp_path), "--force", "--set", "seeds=0", "--set", "scale=b"]
    assert "--nproc-per-node=2" in lines[0][:start] and lines[0][start + 1 :] == typed


def test_a_dry_run_shows_the_runs_and_changes_nothing(config, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    command = ["run", str(config), "--results", str(results), "--jobs", "1"]
    assert main([*command, "--dry-run"]) == 0
    assert "4 of 4 runs to do on 1 rank, data: surrogate" in capsys.readouterr().out and not results.exists()
    assert main([*command, "--set", "variants=sgd"]) == 0
    before = files(results)
    monkeypatch.setattr(execute, "train", lambda *args, **kwargs: pytest.fail("training began"))
    capsys.readouterr()
    assert main([*command, "--dry-run", "--set", "seeds=0-2"]) == 0
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[0].startswith("graduate_admissions/test: 4 of 6 runs to do")
    assert "sgd 0-1 finished: left as it is" in lines and "sgd 2 not made yet" in lines
    assert "sgd_aadl 0-2 not made yet" in lines
    assert main([*command, "--dry-run", "--force"]) == 0
    assert "sgd 0-1 finished: made again by --force" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--dry-run", "--set", "training.epochs=9"]) == 0
    assert "other settings, data or number of ranks: made again" in capsys.readouterr().out
    assert files(results) == before


def test_a_dry_run_counts_the_ranks_that_would_be_started(config, capsys):
    assert main(["run", str(config), "--dry-run", "--set", "num_ranks=2"]) == 0
    assert "4 of 4 runs to do on 2 ranks" in capsys.readouterr().out


def test_the_printed_configuration_makes_the_same_runs(config, tmp_path, capsys):
    changes = ["--set", "training.epochs=7", "--set", "variants=sgd_aadl", "--set", "seeds=3-4"]
    assert main(["run", str(config), "--print-config", *changes]) == 0
    printed = capsys.readouterr().out
    raw = yaml.safe_load(printed)
    assert raw["training"]["epochs"] == 7 and raw["training"]["scheduler"] is None  # a default of the suite
    assert list(raw["variants"]) == ["sgd_aadl"] and raw["seeds"] == [3, 4]
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    runs = expand_runs(load_config(config, changes[1::2]))
    assert [run.identity() for run in expand_runs(load_config(again))] == [run.identity() for run in runs]
    assert main(["run", str(again), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("name", config_files())
def test_every_configuration_survives_its_print(name):
    path = config_files()[name]
    config = load_or_skip(path)
    raw = parse_yaml(to_yaml(complete_settings(config, *read_overridden(path))))
    again = parse_config(raw, path.parent)
    runs, runs_again = (expand_runs(one, num_rows=10**6) for one in (config, again))
    assert [run.identity() for run in runs_again] == [run.identity() for run in runs]
    assert (again.save, again.launch, again.num_ranks) == (config.save, config.launch, config.num_ranks)


def test_texts_that_look_like_numbers_stay_texts():
    settings = {
        "a": "1e-3",
        "b": "008",
        "c": 1e-05,
        "d": (1, 2.0),
        "e": "yes",
        "f": None,
        "g": {},
        "h": "null",
        "i": True,
    }
    assert parse_yaml(to_yaml(settings)) == settings | {"d": [1, 2.0]}


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (RAW, "variants=sgd_adl", "variants must be one of sgd, sgd_aadl, got 'sgd_adl'; did you mean sgd_aadl?"),
        (RAW, "baseline=sdg", "baseline must be one of sgd, sgd_aadl, got 'sdg'; did you mean sgd?"),
        (RAW, "training.epoch=3", "unknown key training.epoch; valid keys are: epochs"),
        (RAW, "training.epoch=3", "; did you mean epochs?"),
        (RAW, "experiment=graduate_admision", "as problem.equation; did you mean graduate_admissions?"),
        (RAW, "variants.sgd.optimizer.name=Adem", "got 'Adem'; did you mean Adam?"),
        (
            PINN,
            "problem.equation=burgers_20d",
            "or the path of a .py file, got 'burgers_20d'; did you mean burgers_2d?",
        ),
    ],
)
def test_the_name_that_was_meant_is_named(config, capsys, raw, change, message):
    config.write_text(yaml.safe_dump(copy.deepcopy(raw)))
    assert main(["run", str(config), "--dry-run", "--set", change]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith("error: ") and message in printed[-1]
