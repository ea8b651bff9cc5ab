"""Every Python example of README.md and docs/ runs as it stands, except those marked <!-- not run -->."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?P<mark><!-- not run -->\s*)?^```python\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def examples(text):
    """(line of the fence, code) of every block that is to run."""
    for match in BLOCK.finditer(text):
        if not match["mark"]:
            yield text.count("\n", 0, match.start()) + 1, match["code"]


def run(code, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if path.is_file()
}
EXAMPLES = [
    pytest.param(code, id=f"{name}:{line}") for name, text in DOCUMENTS.items() for line, code in examples(text)
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path):
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_readme_has_an_example_and_none_is_overlooked():
    assert list(examples(DOCUMENTS["README.md"]))
    for name, text in DOCUMENTS.items():
        assert len(re.findall(r"```\s*py", text)) == len(BLOCK.findall(text)), f"{name}: indented or not named python"


def test_examples_are_found_and_can_fail(tmp_path):
    text = "a\n```python\nx = 1\nassert x\n```\n```\nno\n```\n"
    text += "<!-- not run -->\n```python\nno\n```\n```python\n1 / 0\n```\n"
    assert list(examples(text)) == [(2, "x = 1\nassert x\n"), (13, "1 / 0\n")]
    assert [run(code, tmp_path).returncode for _, code in examples(text)] == [0, 1]
