import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from every_experiment import EXPERIMENTS, write_config
from paths import ROOT
from suite_cases import RAW

from experiments.__main__ import main
from experiments.admissions.experiment import AdmissionsExperiment
from experiments.catalog import parse_config
from experiments.commands import figures
from experiments.distributed.ranks import Ranks
from experiments.records.reading import read_run, read_weights
from experiments.runs import execute
from experiments.runs.config import expand_runs

pytestmark = pytest.mark.smoke


def run(config, results, *options):
    return main(["run", str(config), "--results", str(results), "--jobs", "1", *options])


def test_run_figures_summarize(config, tmp_path, capsys):
    results = tmp_path / "results"
    assert run(config, results, "--set", "training.epochs=3") == 0
    records = sorted(path.relative_to(results).as_posix() for path in results.rglob("*.h5"))
    names = [f"{name}/seed-{seed}.h5" for name in ("sgd", "sgd_aadl") for seed in (0, 1)]
    assert records == [f"graduate_admissions/test/{name}" for name in names]
    assert len(read_run(results / records[0]).series["metrics/train/loss"]) == 4
    printed = capsys.readouterr().err
    assert "4 of 4 runs to do" in printed and "--force" not in printed
    written, merit, *variants, following = printed.splitlines()[-5:]
    assert written == f"written: 4 records in {results}/graduate_admissions/test"
    assert merit == "validation loss at the end, the best first:"
    assert [line.split()[0] for line in sorted(variants)] == ["sgd", "sgd_aadl"] and "median of 2 seeds" in variants[0]
    summarize = f"python -m experiments summarize --results {results} --only graduate_admissions"
    assert following == f"next: {summarize}, and the same with figures"
    assert main(["figures", "--results", str(results)]) == 0
    assert "loss.png" in capsys.readouterr().out
    assert main(["summarize", "--results", str(results)]) == 0
    assert "plain SGD" in capsys.readouterr().out


def test_an_import_error_within_the_suite_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise ImportError("a fault of the suite")

    monkeypatch.setattr(figures, "main", fail)
    with pytest.raises(ImportError, match="a fault of the suite"):
        main(["figures"])


def test_finished_runs_are_left_and_broken_ones_made_again(config, tmp_path, capsys):
    results = tmp_path / "results"
    run(config, results)
    records = sorted(results.rglob("*.h5"))
    before = {path: path.stat().st_mtime_ns for path in records}
    records[0].write_bytes(b"killed while writing")
    capsys.readouterr()
    assert run(config, results) == 0
    printed = capsys.readouterr().err
    assert "made again, because the record is damaged or incomplete: 1" in printed and "1 of 4 runs to do" in printed
    read_run(records[0])
    assert all(path.stat().st_mtime_ns == before[path] for path in records[1:])
    run(config, results, "--set", "seeds=0-2")
    assert "2 of 6 runs to do" in capsys.readouterr().err
    run(config, results, "--set", "training.epochs=5", "--set", "variants=sgd")
    assert "another number of ranks: 2" in capsys.readouterr().err
    run(config, results, "--force")
    printed = capsys.readouterr().err
    assert "4 of 4 runs to do" in printed and printed.count("; world size: 1\n") == 1


def test_one_folder_hides_no_other(config, tmp_path, capsys):
    """An unfinished one, a damaged one and a foreign one stand before a good one."""
    results = tmp_path / "results"
    run(config, results, "--set", "training.epochs=3", "--set", "variants=sgd")
    good = results / "graduate_admissions" / "test" / "sgd"
    for name in ("a_unfinished", "b_damaged", "c_foreign"):
        shutil.copytree(good, results / name / "test" / "sgd")
    for path in results.rglob("a_unfinished/**/*.h5"):
        with h5py.File(path, "r+") as file:
            del file.attrs["complete"]
    for path in results.rglob("b_damaged/**/*.h5"):
        os.truncate(path, 3000)
    for path in results.rglob("c_foreign/**/*.h5"):
        with h5py.File(path, "w") as file:
            file["x"] = 1
    (good / "seed-7.h5").write_bytes(b"")
    for command, shown in (("summarize", "graduate_admissions, test"), ("figures", "loss.png")):
        capsys.readouterr()
        assert main([command, "--results", str(results)]) == 2
        printed = capsys.readouterr()
        assert shown in printed.out and "b_damaged" not in printed.out
        causes = ("a_unfinished/test is finished", "truncated file", "no record of this suite", "seed-7.h5 is damaged")
        lines = printed.err.splitlines()
        assert len(lines) == 4
        for line, cause in zip(lines, causes, strict=True):
            assert line.startswith("left out: ") and cause in line


def test_names_and_labels_are_data(config, tmp_path, capsys, monkeypatch):
    """Dollar signs, bars, underscores and letters that the font lacks."""
    raw = yaml.safe_load(config.read_text())
    optimizer = raw["variants"]["sgd"]["optimizer"]
    plain, accelerated = "$x_1^$ 漢字 | b_c_", r"_a |b| $\frac$ *c*"
    raw["variants"] = {
        "sgd": {"label": plain, "optimizer": optimizer},
        "sgd_aadl": {"label": accelerated, "optimizer": optimizer, "acceleration": {"frequency": 3}},
    }
    config.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    results = tmp_path / "results"
    assert run(config, results, "--set", "training.epochs=3") == 0
    shown = []
    original = plt.Figure.legend

    def legend(figure, handles, names, **more):
        shown.extend(names)
        return original(figure, handles, names, **more)

    monkeypatch.setattr(plt.Figure, "legend", legend)
    assert main(["figures", "--results", str(results)]) == 0
    assert accelerated.replace("$", r"\$") in shown  # which matplotlib draws as a dollar sign
    capsys.readouterr()
    assert main(["summarize", "--results", str(results)]) == 0
    printed = capsys.readouterr().out
    assert plain in printed and accelerated in printed
    rows = [line for line in next(results.rglob("summary.md")).read_text("utf-8").splitlines() if line[:2] == "| "]
    assert len(rows) == 4 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def reads_as_a_colleague(results, folder):
    """Figures and tables of results that this process may only read."""
    # before the interpreter's folder is closed
    for name in ("catalog", "admissions.experiment", "commands.report", "records.figures"):
        importlib.import_module(f"experiments.{name}")
    if os.getuid() == 0:
        os.setuid(65534)
    os.chdir(folder)
    for command in ("summarize", "figures", "report"):
        assert main([command, "--results", str(results)]) == 2


def test_results_of_a_colleague_are_shown(config, tmp_path):
    with tempfile.TemporaryDirectory() as parent:  # that of pytest is closed to others
        os.chmod(parent, 0o755)
        results, own, log = Path(parent, "results"), Path(parent, "own"), Path(parent, "log")
        assert run(config, results, "--set", "training.epochs=3") == 0
        closed = results / "closed"
        closed.mkdir()
        own.mkdir()
        os.chmod(own, 0o777)
        for path in (results, *results.rglob("*")):
            os.chmod(path, 0 if path == closed else 0o555 if path.is_dir() else 0o444)
        script = "import sys; import test_cli; test_cli.reads_as_a_colleague(*sys.argv[1:])"
        with log.open("w") as file:
            command = [sys.executable, "-c", script, str(results), str(own)]
            environment = os.environ | {"MPLCONFIGDIR": str(own), "PYTHONPATH": os.pathsep.join(sys.path)}
            assert subprocess.run(command, stdout=file, stderr=file, env=environment).returncode == 0, log.read_text()
        printed = log.read_text()
        assert f"left out: {closed} is closed to this account" in printed
        assert "plain SGD" in printed and "summary.md cannot be written: Permission denied" in printed
        assert (own / "figures" / "graduate_admissions" / "test" / "loss.png").is_file()
        assert "the figures are in figures/graduate_admissions/test" in printed
        assert f"report.html cannot be written: Permission denied: the report is in {own / 'report.html'}" in printed
        assert (own / "report.html").is_file()
        for path in (results, *results.rglob("*")):
            os.chmod(path, 0o755)


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_all_files_follow_the_umask(config, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert run(config, tmp_path / "results", "--set", "training.epochs=3", "--set", "variants=sgd") == 0
        for command in ("summarize", "figures"):
            assert main([command, "--results", str(tmp_path / "results")]) == 0
    finally:
        os.umask(before)
    paths = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == {".h5", ".md", ".png"}
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o666 & ~umask}


def test_a_failed_run_is_named(config, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(execute, "train", fail)
    assert run(config, tmp_path / "results") == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1] == "error: run sgd, seed 0 failed: ZeroDivisionError: a mistake of ours"
    assert "Traceback" not in printed


@pytest.mark.parametrize("results", ["FILE", "FILE/below", "/proc/foo"])
def test_results_that_cannot_be_written_are_refused_before_training(config, monkeypatch, capsys, results):
    monkeypatch.setattr(execute, "train", lambda *args, **kwargs: pytest.fail("training began"))
    assert run(config, results.replace("FILE", str(config))) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and re.match("error: the results folder .* cannot be written", printed[0])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_record_holds_the_weights_that_were_evaluated_last(config, tmp_path, capsys, experiment):
    """The averaged ones; of images with the statistics computed again."""
    path = write_config(experiment, tmp_path)
    raw = yaml.safe_load(path.read_text())
    ((name, variant), *_) = raw["variants"].items()
    raw |= {"variants": {name: variant | {"ema_decay": 0.9}}}
    path.write_text(yaml.safe_dump(raw))
    results = tmp_path / "results"
    for setting, printed in (
        ("false", "1 of 1 runs"),
        ("true", "the record has no weights (save)"),
        ("false", "0 of 1"),
    ):
        assert run(path, results, "--set", f"save.weights={setting}") == 0
        assert printed in capsys.readouterr().err
    [record] = results.rglob("seed-0.h5")
    [expanded] = expand_runs(parse_config(raw, path.parent))
    problem = expanded.kind.build(expanded, Ranks())
    with torch.no_grad():
        if experiment == "burgers_2d":
            problem.points(problem.model, 0)
        before = problem.evaluate(problem.model)
        problem.model.load_state_dict(read_weights(record))
        after = problem.evaluate(problem.model)
    metrics = [name for name in after if name.startswith("metrics/") and "stale" not in name]
    recorded = read_run(record).series
    assert [after[name] for name in metrics] == [recorded[name][-1] for name in metrics]
    assert before["metrics/train/loss" if experiment != "imagenet" else "metrics/validation/loss"] not in after.values()
    if experiment == "imagenet":  # where the statistics computed again are those of the network
        assert after["metrics/validation/loss"] == after["metrics/validation/stale_loss"]
        begun = replace(expanded, problem=expanded.problem.model_copy(update={"initial_weights": str(record)}))
        begun_weights = begun.kind.build(begun, Ranks()).model.state_dict()
        assert all(torch.equal(begun_weights[name], value) for name, value in read_weights(record).items())


def test_sigterm_ends_a_command_as_an_interrupt_does(monkeypatch, capsys):
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)  # without a handler of ours, nothing happens
    try:
        with monkeypatch.context() as patch:
            patch.setattr(figures, "main", lambda options: signal.raise_signal(signal.SIGTERM))
            assert main(["figures"]) == 143
        assert "interrupted" in capsys.readouterr().err
    finally:
        ours = signal.signal(signal.SIGTERM, previous)
    assert ours is not None and ours.__name__ == "<lambda>"  # restored
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["figures", "--results", "nowhere"])))
    thread.start()
    thread.join()
    assert codes == [2]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_while_the_data_is_read_stops_before_the_first_run(config, tmp_path, monkeypatch, capsys, jobs):
    describe = AdmissionsExperiment.describe

    def described(self, problem):
        signal.raise_signal(signal.SIGUSR1)
        return describe(self, problem)

    monkeypatch.setattr(AdmissionsExperiment, "describe", described)
    assert main(["run", str(config), "--results", str(tmp_path / "results"), "--jobs", jobs]) == 75
    assert "stopped by SIGUSR1" in capsys.readouterr().err
    assert not list((tmp_path / "results").rglob("*.h5"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "missing.yaml"),
        (["run", "CONFIG", "--set", "training.epochs=0"], "training.epochs must be greater than 0, got 0"),
        (["run", "CONFIG", "--jobs", "0"], "--jobs must be an integer >= 1, got 0"),
        (["run", "CONFIG", "--set", "problem.data_path=missing.csv"], "missing.csv does not exist"),
        (["run", "CONFIG", "--set", "problem.validation_fraction=0.999"], "leaves none for training"),
        (["run", "CONFIG", "--set", "training.batch_size=1000"], "a batch of 1000 rows is larger"),
        (["reproduce", "--only", "imagenets"], "--only must be one of burgers_100d, burgers_2d, graduate_admissions"),
        (["figures", "--results", "nowhere"], "no results in nowhere"),
        (["summarize", "--results", "nowhere"], "no results in nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(config, capsys, arguments, message):
    assert main([str(config) if argument == "CONFIG" else argument for argument in arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed and printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed


def test_reproduce_says_what_it_will_run(config, tmp_path, monkeypatch, capsys):
    configs = tmp_path / "configs" / "graduate_admissions"
    configs.mkdir(parents=True)
    (configs / "laptop.yaml").write_text(yaml.safe_dump(RAW | {"expected_minutes": 2, "seeds": 0}))
    monkeypatch.setattr("experiments.settings.config_files.CONFIGS", configs.parent)
    monkeypatch.setenv("ONLY", "graduate_admissions")
    assert main(["reproduce", "--results", str(tmp_path / "results"), "--jobs", "1"]) == 0
    printed = capsys.readouterr()
    assert "graduate_admissions: 2 variants, 1 seeds, about 2 minutes" in printed.err
    assert printed.err.index("This will run") < printed.err.index("runs to do")
    assert "loss.png" in printed.out and "epochs to plain's final loss" in printed.out
    monkeypatch.setenv("ONLY", "burgers")
    assert main(["reproduce", "--results", str(tmp_path / "results")]) == 2


def test_the_module_runs_from_the_checkout():
    command = [sys.executable, "-W", "error", "-m", "experiments", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "reproduce" in done.stdout and not done.stderr


def test_a_label_with_letters_that_the_locale_lacks_is_printed(config, tmp_path):
    label = ["--set", "variants.sgd.label=Größe →", "--set", "seeds=0", "--set", "variants=sgd"]
    assert run(config, tmp_path / "results", *label) == 0
    command = [sys.executable, "-m", "experiments", "summarize", "--results", str(tmp_path / "results")]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and r"Gr\xf6\xdfe \u2192" in done.stdout, done.stderr


def test_torchrun(config, tmp_path):
    """Two ranks, one record."""
    env = {key: value for key, value in os.environ.items() if key != "AADL_DATA_DIR"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "experiments",
               "run", str(config), "--results", str(tmp_path / "results"), "--set", "seeds=0"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths = sorted((tmp_path / "results").rglob("*.h5"))
    assert [path.parent.name for path in paths] == ["sgd", "sgd_aadl"]
    attributes = read_run(paths[0]).attributes
    assert attributes["world_size"] == 2 and attributes["launcher"] == "torchrun"
