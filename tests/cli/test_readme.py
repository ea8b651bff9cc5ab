"""Every Python example of README.md and docs/ that is to run (snippets.py) runs as it stands.

Those marked <!-- 2 ranks --> run on two ranks of torchrun.
"""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT
from snippets import BLOCK, examples


def run(code, folder, ranks=1):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    if ranks > 1:
        # Warnings of torch's own parts are not ours to mend, nor that gloo aborts now and then at the interpreter's end
        # ("terminate called without an active exception").
        code += "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
        (folder / "example.py").write_text(code, "utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, "example.py"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.is_file()
}
EXAMPLES = [
    pytest.param(code, ranks, id=f"{name}:{line}")
    for name, text in DOCUMENTS.items()
    for line, code, ranks in examples(text)
]


@pytest.mark.parametrize(("code", "ranks"), EXAMPLES)
def test_example_runs(code, ranks, tmp_path):
    result = run(code, tmp_path, ranks)
    assert result.returncode == 0, result.stderr


def test_the_readme_has_an_example_and_none_is_overlooked():
    assert list(examples(DOCUMENTS["README.md"]))
    for name, text in DOCUMENTS.items():
        assert len(re.findall(r"```\s*py", text)) == len(BLOCK.findall(text)), f"{name}: indented or not named python"
        shown = re.findall(r"^``` *\{ *\.python *\}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        assert all(re.fullmatch(r'--8<-- "examples/\w+\.py"\n', code) for code in shown), f"{name}: no test runs this"
        assert "<!-- not run -->" not in text or name == "docs/new_experiment.md"  # test_new_experiment.py runs these


def test_examples_are_found_and_can_fail(tmp_path):
    text = "a\n```python\nx = 1\nassert x\n```\n```\nno\n```\n"
    text += "<!-- not run -->\n```python\nno\n```\n```python\n1 / 0\n```\n"
    text += "<!-- 2 ranks -->\n```python\nimport os\nassert os.environ['RANK'] != '1'\n```\n"
    found = [(2, "x = 1\nassert x\n", 1), (13, "1 / 0\n", 1), (16, "import os\nassert os.environ['RANK'] != '1'\n", 2)]
    assert list(examples(text)) == found
    assert [bool(run(code, tmp_path, ranks).returncode) for _, code, ranks in found] == [False, True, True]
    assert run("import os\nassert os.environ['WORLD_SIZE'] == '2'", tmp_path, 2).returncode == 0


def test_the_site_file_of_the_page_makes_a_script(tmp_path):
    """docs/hpc.md shows what a copy of generic-slurm.yaml may hold beside the rest."""
    (shown,) = re.findall(r"^```yaml\n(node: .*?)^```$", DOCUMENTS["docs/hpc.md"], flags=re.DOTALL | re.MULTILINE)
    generic = (ROOT / "jobs" / "sites" / "generic-slurm.yaml").read_text("utf-8")
    rest = [line for line in generic.splitlines() if not line.startswith(("node:", "ranks:"))]
    site = tmp_path / "my-cluster.yaml"
    site.write_text("\n".join([*rest, shown]), "utf-8")
    config = "experiments/configs/graduate_admissions/laptop.yaml"
    request = [
        config,
        "--site",
        str(site),
        "--nodes",
        "1",
        "--time",
        "0:30:00",
        "--results",
        str(tmp_path),
        "--dry-run",
    ]
    result = subprocess.run([sys.executable, "-m", "jobs.submit", *request], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "#SBATCH --partition=gpu\n" in result.stdout and "module load python/3.11 cuda\n" in result.stdout
