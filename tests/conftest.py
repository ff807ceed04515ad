"""What all tests share."""

import mudata
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small products gain nothing from threads, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _mudata_of_tomorrow() -> None:
    """mudata warns on every object made until its coming default is chosen."""
    mudata.set_options(pull_on_update=False)
