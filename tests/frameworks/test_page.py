"""The examples of docs/frameworks.md run as they stand, each after the problem that they share."""

from pathlib import Path

import pytest
from problem import framework
from snippets import examples

TEXT = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text("utf-8")
SHARED, *SECTIONS = TEXT.split("\n## ")
NEEDED = {
    "Lightning": "lightning",
    "Lightning Fabric": "lightning",
    "HF Accelerate": "accelerate",
    "HF Trainer": "transformers",
    "PyTorch Ignite": "ignite",
    "DeepXDE": "deepxde",
}
TITLES = [section.partition("\n")[0] for section in SECTIONS]


@pytest.mark.parametrize("section", SECTIONS, ids=TITLES)
def test_the_example_of_a_section_runs(section, tmp_path, monkeypatch):
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    framework(NEEDED[section.partition("\n")[0]])
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    found = [*examples(SHARED), *examples(section)]
    assert len(found) >= 2
    for _, code, _ in found:
        exec(compile(code, "docs/frameworks.md", "exec"), names)


def test_every_section_is_one_of_a_framework():
    assert sorted(NEEDED) == sorted(TITLES)
