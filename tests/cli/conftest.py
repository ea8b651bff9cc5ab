"""A small configuration that commands run, without the variables of any launcher or site."""

import pytest
import yaml
from suite_cases import RAW


@pytest.fixture
def plainly(monkeypatch):
    """No variable of a launcher or of the user says what runs."""
    for name in ("RANK", "WORLD_SIZE", "ONLY", "AADL_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(plainly, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RAW))
    return path
