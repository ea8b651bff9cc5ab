import pytest
import yaml
from suite_cases import PINN


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ONLY"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(PINN))
    return path
