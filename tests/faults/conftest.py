"""The site of the faults, whose runs without any fault all tests compare with."""

import pytest
from fault_site import Site


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("faults"))
