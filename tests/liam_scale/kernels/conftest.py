import importlib.util
import os

import numpy as np
import pytest


@pytest.fixture
def interpreter():
    """Triton's interpreter runs kernels on CPU tensors, and on the way numbers overflow as they may on a GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install liam-scale[gpu]")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here, on which pytest -m gpu runs the kernels")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield


@pytest.fixture(params=["auto", "plain", "triton"])
def impl(request):
    """The kernels made for the CPU, those for any device, and those for NVIDIA GPUs by Triton's interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param


@pytest.fixture(params=["auto", "plain"])
def fast_impl(request):
    """Those of them that are fast on a CPU."""
    return request.param
