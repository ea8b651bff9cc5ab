"""Types: a user's script is clean under mypy --strict, and a wrong name or a wrong type is found there."""

import runpy
import textwrap
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("user_script.py")
WRONG = {
    'aadl.accelerate(optimizer, "andersen")': "arg-type",
    'aadl.accelerate(optimizer, average="sometimes")': "arg-type",
    'aadl.accelerate(optimizer, safeguard="both")': "arg-type",
    'aadl.accelerate(optimizer, state_coupling="all")': "arg-type",
    'aadl.accelerate(optimizer, momentum="double")': "arg-type",
    "adam: torch.optim.Adam = aadl.accelerate(optimizer)": "assignment",
    'aadl.accelerator_of(optimizer).statistics["acepted"]': "typeddict-item",
}


def test_the_script_of_a_user_runs():
    names = runpy.run_path(str(SCRIPT))
    assert names["accepted"] + sum(names["rejected"].values()) == names["statistics"]["attempts"] > 0
    assert names["same"] is names["plain"] is names["optimizer"]


@pytest.mark.slow
def test_types_of_a_user(tmp_path):
    api = pytest.importorskip("mypy.api")
    wrong = tmp_path / "wrong.py"
    head = """\
        import torch
        import aadl
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        """
    wrong.write_text(textwrap.dedent(head) + "\n".join(WRONG) + "\n", "utf-8")
    out, err, _ = api.run(["--strict", "--no-error-summary", "--hide-error-context", str(SCRIPT), str(wrong)])
    lines = out.splitlines()
    assert not err and not [line for line in lines if SCRIPT.name in line], out
    for number, (code, kind) in enumerate(WRONG.items(), 4):
        assert any(f"wrong.py:{number}: error" in line and f"[{kind}]" in line for line in lines), (code, out)
