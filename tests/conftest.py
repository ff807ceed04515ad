"""What all tests share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small products gain nothing from threads, and sums keep one order."""
    torch.set_num_threads(1)
