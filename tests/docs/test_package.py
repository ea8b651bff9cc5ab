"""The source distribution and the wheel build, pass twine's check, and work where they are installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = os.environ.get("AADL_TORCH", "")
"""The folder of site-packages that holds torch, which this environment has not: `make test-docs` names it."""


def run(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both archives; the wheel is built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return {path.suffix: path for path in folder.iterdir()}


def test_the_archives_pass_their_checks_and_hold_the_library_alone(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built.values())
    with tarfile.open(built[".gz"]) as archive:
        names = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert not names & {"tests", "experiments", "docs", "examples", "benchmarks", "jobs", "data_loaders"}
    with zipfile.ZipFile(built[".whl"]) as wheel:
        packages = {name.split("/")[0] for name in wheel.namelist()}
        assert "aadl/py.typed" in wheel.namelist()
    assert all(name == "aadl" or name.endswith(".dist-info") for name in packages)


def test_the_page_of_the_package_has_absolute_links_alone(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        page = wheel.read(name).decode()
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert not [target for target in targets if not target.startswith("https://")]
    address = re.search(r"^Project-URL: Repository, (\S+)$", page, flags=re.MULTILINE)[1]
    assert {f"{address}/raw/main/docs/figures/where_it_pays.png", f"{address}/blob/main/CITATION.cff"} <= set(targets)


@pytest.mark.parametrize(
    ("tag", "changed", "version"),
    [("v0.1.0", True, r"{next}\.dev1\+g\w+"), ("v0.2.0", False, r"0\.2\.0"), (None, True, r"{next}\.dev2\+g\w+")],
)
def test_the_version_follows_the_tags(tmp_path, tag, changed, version):
    for name in ("setup.py", "pyproject.toml", "README.md", "aadl/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def git(*command):
        run("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *command, cwd=tmp_path)

    def packaged():
        return run(sys.executable, "setup.py", "--quiet", "--version", cwd=tmp_path).split()[-1]

    next_release = re.search(r'^__version__ = "(.+)"', (tmp_path / "aadl/__init__.py").read_text(), re.MULTILINE)[1]
    assert packaged() == next_release
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    if tag:
        git("tag", tag)
    if changed:
        git("commit", "--quiet", "--allow-empty", "--message", "second")
    assert re.fullmatch(version.format(next=re.escape(next_release)), packaged())


@pytest.mark.skipif(not TORCH, reason="needs torch: AADL_TORCH=.venv/lib/python3.x/site-packages (make test-docs)")
def test_the_wheel_works_in_an_environment_of_its_own(built, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[".whl"])
    script = f"""
        import sys
        sys.path.append({TORCH!r})
        import torch
        import aadl
        assert "venv" in aadl.__file__.replace({TORCH!r}, "")
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = aadl.accelerate(torch.optim.SGD([parameter], lr=0.1), store_each_nth=1, frequency=2)
        for _ in range(20):
            optimizer.zero_grad()
            (parameter * parameter * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
            optimizer.step()
        assert aadl.accelerator_of(optimizer).statistics["accepted"] > 0
        print(aadl.__version__)
    """
    assert built[".whl"].name.split("-")[1].startswith(run(python, "-c", textwrap.dedent(script), cwd=tmp_path).strip())
