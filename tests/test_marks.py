"""Which tests `make test` runs follows from their folders (tests/support/marks.py)."""

from pathlib import PurePosixPath

import pytest
from marks import FOLDERS, marks, place
from paths import ROOT


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("unit/aadl/test_mixing.py", set(), []),
        ("unit/aadl/test_mixing.py", {"slow"}, []),
        ("test_layout.py", set(), []),
        ("ranks/test_sharded.py", set(), ["ranks", "slow"]),
        ("ranks/test_sharded.py", {"smoke", "parametrize"}, ["ranks"]),
        ("cluster/slurm/test_slurm.py", set(), ["cluster", "slurm", "slow"]),
        ("cluster/slurm/test_slurm.py", {"smoke"}, ["cluster", "slurm"]),
        ("unit/test_faults", set(), []),
    ],
)
def test_marks_follow_from_the_folder(path, given, expected):
    assert marks(PurePosixPath(path), given) == expected


def test_ranks_are_slow_wherever_they_are_spawned():
    path = PurePosixPath("unit/aadl/test_memory.py")
    assert marks(path, set(), {"spawn_ranks", "tmp_path"}) == ["ranks", "slow"]
    assert marks(path, {"smoke"}, {"spawn_ranks"}) == ["ranks"]
    assert marks(path, set(), {"tmp_path"}) == []


def test_the_folders_exist_and_their_files_start_first():
    assert all((ROOT / "tests" / name).is_dir() for name in FOLDERS)
    paths = ["ranks/test_a.py", "unit/test_b.py", "cluster/lsf/test_c.py", "cli/test_d.py", "unit/cli.py"]
    found = sorted(paths, key=lambda path: place(PurePosixPath(path)))
    assert found == ["cluster/lsf/test_c.py", "cli/test_d.py", "ranks/test_a.py", "unit/test_b.py", "unit/cli.py"]


def test_every_way_to_run_is_tried_by_make_test():
    """Each folder whose other tests are slow has a test that is not."""
    for name in FOLDERS:
        texts = [path.read_text("utf-8") for path in (ROOT / "tests" / name).rglob("test_*.py")]
        assert any("mark.smoke" in text for text in texts), f"tests/{name} has no smoke test"
