import os
import shutil
import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from liam_scale.kernels.device.compiled import _dense_log_likelihood, _softmax_slopes, can_compile, fused_on

SIZES = [(128, 2048), (127, 2048), (131, 2048), (128, 1794), (64, 300), (126, 301), (3, 7)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    can_compile.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()
    can_compile.cache_clear()


def arguments(cells, features):
    return torch.randn(cells, features), torch.randn(cells), torch.rand(cells)


def test_minibatches_that_differ_compile_at_most_three_graphs():
    slopes = fused_on("cpu", _softmax_slopes, backend="aot_eager")
    assert can_compile("cpu", backend="aot_eager")
    counters.clear()
    for cells, features in SIZES:
        given = arguments(cells, features)
        torch.testing.assert_close(slopes(*given), _softmax_slopes(*given))
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("by_cell", [False, True])
def test_the_differentiated_graph_compiles_at_most_three_times(by_cell):
    dense = fused_on("cpu", _dense_log_likelihood, backend="aot_eager")
    assert can_compile("cpu", backend="aot_eager")
    counters.clear()
    for cells, features in SIZES:
        mean = torch.rand(cells, features).requires_grad_()
        theta = torch.rand(*((cells, features) if by_cell else (features,))).add_(0.1).requires_grad_()
        found, wanted = (f(mean, theta) for f in (dense, _dense_log_likelihood))
        torch.testing.assert_close(found, wanted)
        for a, b in zip(*(torch.autograd.grad(y.sum(), (mean, theta)) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def no_compiler(graph, inputs):
    raise RuntimeError("no C++ compiler found")


def fails_at_launch(graph, inputs):
    def launch(*arguments):
        raise RuntimeError("no kernel image is available")

    return launch


def fails_backward(graph, inputs):
    return aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=no_compiler)(graph, inputs)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (no_compiler, r"no C\+\+ compiler found"),
        (fails_at_launch, "no kernel image is available"),
        (fails_backward, r"no C\+\+ compiler found"),
    ],
)
def test_where_compiling_fails_one_warning_and_the_plain_functions(backend, reason):
    slopes, dense = (fused_on("cpu", f, backend=backend) for f in (_softmax_slopes, _dense_log_likelihood))
    given = arguments(5, 9)
    with pytest.warns(RuntimeWarning, match=reason):
        found = slopes(*given)
    torch.testing.assert_close(found, _softmax_slopes(*given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slopes(*arguments(6, 9))
        dense(torch.rand(3, 4), torch.rand(4))


def test_the_environment_leaves_compiling_out(monkeypatch):
    monkeypatch.setenv("LIAM_SCALE_COMPILE", "0")
    slopes = fused_on("cpu", _softmax_slopes, backend=no_compiler)
    given = arguments(5, 9)
    torch.testing.assert_close(slopes(*given), _softmax_slopes(*given))


def test_the_real_compiler_works_under_the_warnings_of_this_suite():
    """A warning that torch gives while it imports its compiler was once read as a failure to compile."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    assert can_compile("cpu")


def test_other_devices_are_left_alone():
    slopes = fused_on("cuda", _softmax_slopes, backend="aot_eager")
    slopes(*arguments(5, 9))
    assert counters["stats"]["unique_graphs"] == 0
