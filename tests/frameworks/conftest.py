"""Warnings in the tests of frameworks: those of aadl are errors, those of the frameworks themselves are let pass."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore", "error:::aadl"), append=False)
