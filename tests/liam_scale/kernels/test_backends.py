import os

import pytest
import torch

from liam_scale.kernels import backends
from liam_scale.kernels.backends import backend_of, lacks_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh():
    backends.triton_serves.cache_clear()
    yield
    backends.triton_serves.cache_clear()


def test_each_device_has_its_kernels(monkeypatch):
    monkeypatch.setattr(backends, "lacks_triton", lambda device: "Triton is not installed")
    rooms = {("auto", CPU): "cpu", ("plain", CPU): "device", ("auto", CUDA): "device", ("plain", CUDA): "device"}
    for (impl, device), room in rooms.items():
        assert backend_of("negative_binomial", impl, device).__name__ == f"liam_scale.kernels.{room}.negative_binomial"
    with pytest.raises(ValueError, match="impl: got 'triton', but Triton is not installed; use 'auto'"):
        backend_of("sparse", "triton", CUDA)


def test_the_environment_leaves_triton_out(monkeypatch):
    monkeypatch.setattr(backends, "lacks_triton", lambda device: None)
    monkeypatch.setenv("LIAM_SCALE_TRITON", "0")
    assert backend_of("sparse", "auto", CUDA).__name__ == "liam_scale.kernels.device.sparse"


@pytest.mark.parametrize(
    ("device", "environment", "capability", "reason"),
    [
        ("cpu", "0", (9, 0), "cpu is no NVIDIA GPU"),
        ("cpu", "1", (9, 0), None),
        ("mps", "1", (9, 0), "mps is no NVIDIA GPU"),
        ("cuda:0", "0", (7, 5), r"cuda:0 (capability 7.5) is older than A100 (8.0)"),
        ("cuda:0", "0", (8, 0), None),
    ],
)
def test_where_triton_cannot_run_is_said(monkeypatch, device, environment, capability, reason):
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", environment)
    assert lacks_triton(torch.device(device)) == reason


def test_without_triton_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert lacks_triton(CUDA) == "Triton is not installed"
