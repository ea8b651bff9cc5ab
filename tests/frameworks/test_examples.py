"""The scripts of examples/ that need a framework run as they stand, each in a process and a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from problem import framework

ROOT = Path(__file__).parents[2]
NEEDED = {
    "accelerate_loop": "accelerate",
    "deepxde_pinn": "deepxde",
    "fabric_loop": "lightning",
    "hf_trainer": "transformers",
    "ignite_trainer": "ignite",
    "lightning_module": "lightning",
}


@pytest.mark.parametrize("name", NEEDED)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    framework(NEEDED[name])
    command = [sys.executable, "-W", "error:::aadl", str(ROOT / "examples" / f"{name}.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_every_example_is_on_the_page():
    page = (ROOT / "docs" / "frameworks.md").read_text("utf-8")
    for name in NEEDED:
        assert f'--8<-- "examples/{name}.py"' in page
