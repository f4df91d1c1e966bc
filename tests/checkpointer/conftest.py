"""A disk that fills up."""

import pytest

from tests.disks import mounted_disk


@pytest.fixture
def small_disk(tmp_path):
    """A mounted disk of 1 MiB."""
    with mounted_disk(tmp_path / "disk", megabytes=1) as disk:
        yield disk
