import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, alone and after any others; its fixtures do, too."""
    torch.manual_seed(0)
