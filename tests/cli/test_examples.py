"""The scripts of examples/ run as they stand; those of frameworks, and the notebook, run in make test-frameworks.

docs/ shows scripts by lines such as `--8<-- "examples/ddp.py"`, which must name one.
"""

import json
import re

import pytest
from paths import ROOT
from test_readme import run

FOLDER = ROOT / "examples"
PLAIN = ["plain_loop", "least_squares"]
RANKS = ["ddp", "fsdp2", "local_sgd"]
FRAMEWORKS = ["accelerate_loop", "deepxde_pinn", "fabric_loop", "hf_trainer", "ignite_trainer", "lightning_module"]
NOTEBOOK = FOLDER / "first_five_minutes.ipynb"


@pytest.mark.parametrize(("name", "ranks"), [(name, 1) for name in PLAIN] + [(name, 2) for name in RANKS])
def test_the_example_runs(name, ranks, tmp_path):
    result = run((FOLDER / f"{name}.py").read_text("utf-8"), tmp_path, ranks)
    assert result.returncode == 0, result.stderr


def test_every_example_is_short_and_run_by_a_test():
    scripts = {path.stem: path.read_text("utf-8").count("\n") for path in FOLDER.glob("*.py")}
    assert sorted(scripts) == sorted(PLAIN + RANKS + FRAMEWORKS)
    assert max(scripts.values()) < 60


def test_the_pages_show_examples_that_exist():
    pages = [path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r'^--8<-- "([^"]+)"$', page, flags=re.MULTILINE)}
    assert shown and all((ROOT / name).is_file() for name in shown)


def test_the_notebook_is_stored_without_outputs():
    """Its code is run by nbmake: make test-frameworks."""
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"])
