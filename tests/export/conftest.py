"""One set of small federations for all tests of exports."""

import pytest
from federations import Federations


@pytest.fixture(scope="session")
def federations(tmp_path_factory: pytest.TempPathFactory) -> Federations:
    return Federations(tmp_path_factory.mktemp("federations"))
