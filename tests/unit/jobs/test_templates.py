"""The shell helpers of job scripts: the end of a rank, and what is copied to the disks of the nodes."""

import os
import subprocess

import pytest
from paths import ROOT

TEMPLATES = ROOT / "jobs" / "templates"
STAGE = ["bash", str(TEMPLATES / "stage.sh")]


def test_a_rank_that_stopped_early_looks_like_a_success_and_leaves_a_mark_for_the_script(tmp_path):
    for rank, code, expected, is_marked in ((0, 75, 0, True), (1, 75, 0, False), (0, 3, 3, False), (0, 0, 0, False)):
        mark = tmp_path / f"stopped-{rank}-{code}"
        env = {"PATH": os.environ["PATH"], "SLURM_PROCID": str(rank), "AADL_STOPPED_FILE": str(mark)}
        command = ["bash", str(TEMPLATES / "rank.sh"), "bash", "-c", f"exit {code}"]
        assert subprocess.run(command, env=env, check=False).returncode == expected
        assert mark.exists() == is_marked


def test_staging_leaves_no_half_copies(tmp_path):
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a file").write_text("1")
    local = tmp_path / "local"
    failed = subprocess.run([*STAGE, "environment", tmp_path / "bad.tar.gz", local / "env"], capture_output=True)
    assert failed.returncode != 0 and not list(local.iterdir())
    for _ in range(2):  # the second time it is there already
        subprocess.run([*STAGE, "data", tmp_path / "data", local / "data"], check=True)
        assert (local / "data" / "a file").read_text() == "1"
        assert sorted(path.name for path in local.iterdir()) == ["data", "data.staged"]


@pytest.mark.parametrize("end", ["exit 1", "kill -KILL $PPID"])
def test_an_environment_that_was_not_unpacked_to_the_end_is_made_again(tmp_path, end):
    """conda-unpack fails, or all is killed while it runs; the next start must not take that for an environment."""
    local = tmp_path / "local" / "environment"
    stage = [*STAGE, "environment", str(tmp_path / "packed.tar.gz"), str(local)]
    (tmp_path / "bin").mkdir()
    unpack = tmp_path / "bin" / "conda-unpack"
    # As the real one, it must run in the final place, and once: it replaces the placeholder by that path.
    unpack.write_text(
        '#!/bin/sh\nplace=$(cd "$(dirname "$0")/.." && pwd)\n'
        f'echo "$place" >>{tmp_path}/calls\necho half >"$place/half"\n[ -e {tmp_path}/go ] || {{ {end}; sleep 1; }}\n'
        'rm "$place/half"\necho "$place" >"$place/prefix"\n'
    )
    unpack.chmod(0o755)
    subprocess.run(["tar", "-czf", tmp_path / "packed.tar.gz", "-C", tmp_path, "bin"], check=True)
    assert subprocess.run(stage, check=False).returncode != 0
    (tmp_path / "go").touch()
    for _ in range(2):  # the second time it is whole
        subprocess.run(stage, check=True)
        assert (local / "prefix").read_text() == f"{local}\n" and not (local / "half").exists()
    assert (tmp_path / "calls").read_text().split() == [str(local)] * 2
