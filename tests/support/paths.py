"""Folders of the checkout, for tests that read files of the product or start its commands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "experiments" / "configs"
SUPPORT = ROOT / "tests" / "support"
