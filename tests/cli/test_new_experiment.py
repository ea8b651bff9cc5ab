"""docs/new_experiment.md: its files are written as they stand, and its commands run, with fewer iterations."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from paths import ROOT
from test_layout import upward_imports

from experiments.__main__ import main
from experiments.pinn.equations import load_equation
from experiments.records.reading import read_run

PAGE = (ROOT / "docs" / "new_experiment.md").read_text("utf-8")
HEAT, DIGITS = PAGE.split("\n## Another kind of experiment\n")


def blocks(language, part=HEAT):
    return re.findall(rf"^```{language}\n(.*?)^```$", part, flags=re.DOTALL | re.MULTILINE)


def commands(part=HEAT):
    """Arguments of every `python -m experiments` of a part of the page."""
    lines = [line for block in blocks("sh", part) for line in block.splitlines()]
    assert all(line.startswith("python -m experiments ") for line in lines)
    return [shlex.split(line)[3:] for line in lines]


@pytest.fixture
def folder(plainly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    equation, check, _ = blocks("python")
    (settings,) = blocks("yaml")
    (tmp_path / "heat").mkdir()
    for name, text in (("heat.py", equation), ("check.py", check), ("heat.yaml", settings)):
        (tmp_path / "heat" / name).write_text(text, "utf-8")
    return tmp_path / "heat"


def run_check(folder):
    command = [sys.executable, "-W", "error", str(folder / "check.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def test_the_solution_solves_the_equation_and_a_wrong_sign_is_found(folder):
    right = run_check(folder)
    assert right.returncode == 0, right.stderr
    text = (folder / "heat.py").read_text("utf-8")
    (folder / "heat.py").write_text(text.replace("u.time - self.kappa", "u.time + self.kappa"), "utf-8")
    wrong = run_check(folder)
    assert wrong.returncode == 1 and "assert residual < 1e-12" in wrong.stderr


def test_the_commands_of_the_page_learn_and_draw(folder, capsys):
    run, figures, summarize, hard = commands()
    few = ["--jobs", "1", "--set", "seeds=0", "--set", "training.iterations=400"]
    few += ["--set", "training.scheduler.T_max=400"]
    assert main(run + few) == 0
    assert main(hard + few) == 0
    results = folder.parent / "results" / "heat"
    errors = {path.parts[-3:-1]: read_run(path).attributes["relative_l2_grid"] for path in results.rglob("*.h5")}
    names = yaml.safe_load((folder / "heat.yaml").read_text("utf-8"))["variants"]
    assert set(errors) == {*(("laptop", name) for name in names), ("hard", "adam")}
    assert errors["laptop", "adam"] < 0.05 and errors["laptop", "lbfgs"] < 0.02 and errors["hard", "adam"] < 0.01
    values = {}
    exec(blocks("python")[2], values)
    points = torch.rand(50, 2)
    solution = load_equation("heat.py", {"kappa": 0.1}, folder).exact(points)
    assert (values["network"](points) - solution).norm() < 0.1 * solution.norm()
    assert main(figures) == 0
    assert main(summarize) == 0
    printed = capsys.readouterr().out
    assert "heat equation, kappa = 0.1, compared with Adam" in printed and "no network: zero" in printed
    drawn = {path.name for path in (results / "laptop" / "figures").iterdir()}
    named = set(re.findall(r"`figures/(\w+\.png)`", HEAT))
    assert drawn == named - {"predictors.png"}  # the equation has a grid
    assert (results / "laptop" / "summary.md").is_file()


def test_a_mistake_is_named(folder, capsys):
    assert main([*commands()[0], "--set", "problem.options.kappa=0"]) == 2
    assert "kappa must be > 0, got 0" in capsys.readouterr().err


# ---- another kind of experiment --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the suite with the package, the line and the configuration of the page."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "experiments", root / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in files():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, "utf-8")
    catalog = root / "experiments" / "catalog.py"
    before, opening, after = catalog.read_text("utf-8").partition("EXPERIMENTS = {\n")
    (line,) = (block for block in blocks("python", DIGITS) if block.count("\n") == 1)
    catalog.write_text(before + opening + line + after, "utf-8")
    return root


def files():
    """(name, text) of every file that the part on digits says to save."""
    save = r"Save this as\s`(experiments/\S+)`:\n\n(?:<!-- not run -->\n)?```\w+\n(.*?)^```$"
    return re.findall(save, DIGITS, flags=re.DOTALL | re.MULTILINE)


def suite(checkout, *arguments):
    """A command of the suite in the copy of the checkout."""
    command = [sys.executable, "-m", "experiments", *arguments]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "ONLY")}
    env |= {"PYTHONPATH": os.pathsep.join([str(checkout), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=600)


def test_a_new_kind_of_experiment_is_one_package_and_one_line(checkout):
    package = [text for name, text in files() if name.startswith("experiments/digits/")]
    assert len(package) == 3 and sum(text.count("\n") for text in package) <= 200
    assert not list(upward_imports(checkout))
    lint = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "experiments/digits"]
    assert not subprocess.run(lint, cwd=checkout, capture_output=True, text=True).returncode


def test_a_new_kind_of_experiment_runs_and_has_figures_and_a_table(checkout):
    run, figures, summarize = commands(DIGITS)
    few = ["--jobs", "1", "--set", "seeds=0", "--set", "variants=sgd,sgd_aadl", "--set", "training.epochs=2"]
    done = suite(checkout, *run, *few)
    assert done.returncode == 0, done.stderr
    assert "validation top1 at the end, the best first:" in done.stderr
    folder = checkout / "results" / "digits" / "laptop"
    plain, accelerated = (read_run(folder / name / "seed-0.h5") for name in ("sgd", "sgd_aadl"))
    for one in (plain, accelerated):
        assert one.places.tolist() == [0, 1, 2] and one.series["metrics/validation/top1"][-1] > 0.8
    assert accelerated.series["acceleration/attempts"][-1] > 0
    drawn = suite(checkout, *figures)
    assert drawn.returncode == 0, drawn.stderr
    assert {path.name for path in (folder / "figures").iterdir()} == {"loss.png", "acceleration.png"}
    table = suite(checkout, *summarize)
    assert table.returncode == 0 and "final training cross entropy" in table.stdout
    assert "experiments/configs/digits/laptop.yaml" in table.stdout and (folder / "summary.md").is_file()


def test_a_new_kind_of_experiment_refuses_its_bad_settings(checkout):
    (run, *_) = commands(DIGITS)
    wrong = suite(checkout, *run, "--set", "training.batch_size=2000")
    assert wrong.returncode == 2 and "training.batch_size must be at most 1438, got 2000" in wrong.stderr
    unknown = suite(checkout, *run, "--set", "problem.hidden=3")
    assert unknown.returncode == 2 and "did you mean hidden_sizes?" in unknown.stderr


def test_a_package_that_an_experiment_needs_is_named(checkout):
    (checkout / "sklearn.py").write_text("import not_installed_here\n", "utf-8")
    (run, *_) = commands(DIGITS)
    missing = suite(checkout, *run)
    (checkout / "sklearn.py").unlink()
    assert missing.returncode == 2
    assert "experiment digits needs the package not_installed_here, which is not installed" in missing.stderr
