"""A run that nothing happened to, and one to which something will."""

import pytest

from tests.reliability.runs import Run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted"))
    assert run.train() == [0, 0], run.printed(0)
    return run


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)
