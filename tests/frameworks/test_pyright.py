"""pyright finds nothing to complain of in aadl and in a user's script, and finds a wrong name (mypy: test_types.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pyright(*files):
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("pyright", reason="pyright is not installed: pip install -r tests/frameworks/requirements.txt")


def test_the_library_and_a_script_of_a_user_are_clean():
    result = pyright("aadl", "tests/unit/aadl/user_script.py")
    assert result.returncode == 0, result.stdout + result.stderr


def test_wrong_words_and_types_are_found(tmp_path):
    wrong = [
        'aadl.accelerate(optimizer, "andersen")',
        "adam: torch.optim.Adam = aadl.accelerate(optimizer)",
        'aadl.accelerator_of(optimizer).statistics["acepted"]',
    ]
    head = ["import torch", "import aadl", "optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)"]
    script = tmp_path / "wrong.py"
    script.write_text("\n".join([*head, *wrong]) + "\n", "utf-8")
    found = pyright(script).stdout
    assert all(f"wrong.py:{line}:" in found for line in range(4, 7)) and "3 errors" in found, found
