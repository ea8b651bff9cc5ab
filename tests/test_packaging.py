"""What stands in several files is the same in all: the repository's address, the version, the statistics."""

import os
import re
import subprocess

import torch
from paths import CONFIGS, ROOT

import aadl


def text(name):
    return (ROOT / name).read_text("utf-8")


def found(pattern, name):
    return set(re.findall(pattern, text(name), flags=re.MULTILINE))


def test_the_address_of_the_repository_is_that_of_pyproject():
    (address,) = found(r'^Repository = "([^"]+)"', "pyproject.toml")
    assert found(r'^repository-code: "([^"]+)"', "CITATION.cff") == {address}
    for name in ("README.md", "docs/install.md"):
        assert found(r"pip install git\+(\S+)", name) == {address}
    assert all(url.startswith(address) for url in found(r'^Changelog = "([^"]+)"', "pyproject.toml"))


def test_the_version_is_cited_and_has_its_changes():
    assert found(r"^version: (\S+)", "CITATION.cff") == {aadl.__version__}
    assert aadl.__version__ in found(r"^## (\S+)", "CHANGELOG.md")


def test_the_page_of_the_interface_names_every_statistic_and_function():
    page = text("docs/api.md")
    named = found(r"^\| (`[a-z_`, ]+`) \|", "docs/api.md")
    listed = {name for cell in named for name in re.findall(r"[a-z_]+", cell)}
    layer = torch.nn.Linear(2, 1)
    kept = set()
    for kind in ("anderson", "nonlinear_gmres"):
        optimizer = aadl.accelerate(torch.optim.SGD(layer.parameters(), lr=0.1), kind)
        kept |= set(aadl.accelerator_of(optimizer).statistics)
        aadl.remove_acceleration(optimizer)
    assert kept <= listed
    assert set(aadl.__all__) <= set(re.findall(r"^::: aadl\.(\w+)$", page, flags=re.MULTILINE))


def test_every_study_and_table_of_make_studies_exists():
    environment = os.environ | {"JOBS": "8"}  # a name that many export, which changes nothing
    command = ["make", "--dry-run", "studies"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    configurations = re.findall(r"-m experiments run (\S+)(?: --jobs 1)? *$", done.stdout, flags=re.MULTILINE)
    benchmarks = re.findall(r"-m benchmarks\.(\w+) ", done.stdout)
    assert len(configurations) > 9 and all((CONFIGS / f"{name}.yaml").exists() for name in configurations)
    assert len(benchmarks) > 6 and all((ROOT / "benchmarks" / f"{name}.py").exists() for name in benchmarks)


def test_the_first_page_is_short():
    assert len(text("README.md").splitlines()) <= 200
    assert len(text("docs/results.md").split()) <= 1800
