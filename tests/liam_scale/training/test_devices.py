"""The device of a process, on machines that are told to torch: which GPU, and what is refused with which cure."""

from pathlib import Path

import pytest
import torch

from liam_scale.kernels.backends import backend_of
from liam_scale.training import devices, distributed
from liam_scale.training.devices import check_device, device_of


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine on which torch sees some GPUs, and the driver others."""

    def of(*, visible: int = 0, local_rank: int = 0, has_nvidia: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(devices, "NVIDIA", tmp_path if has_nvidia else tmp_path / "none")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return of


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(1, 0, 0), (1, 3, 0), (4, 0, 0), (4, 3, 3)])
def test_a_process_takes_the_only_gpu_it_sees_or_that_of_its_place(machine, visible, local_rank, index):
    machine(visible=visible, local_rank=local_rank)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", index)
    assert device_of("cpu") == torch.device("cpu")


def test_more_processes_than_gpus_are_refused_with_both_numbers(machine):
    machine(visible=2, local_rank=2)
    with pytest.raises(ValueError, match=r"number 2 .*sees 2 GPUs; start at most 2 processes"):
        device_of("auto")
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_see_is_never_passed_over(machine, monkeypatch, tmp_path, device):
    machine(has_nvidia=True)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"without CUDA; pip install torch --index-url \S+/cu126; .*--device cpu"):
        check_device(device)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01\nGCC version")
    monkeypatch.setattr(devices, "DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"CUDA 13\.0, the driver is .*535\.183\.01 .*update the driver, or pip"):
        check_device(device)
    check_device("cpu")


def test_a_gpu_that_was_hidden_on_purpose_is_not_missed(machine, monkeypatch):
    machine(has_nvidia=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_of("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="sees no CUDA device"):
        check_device("cuda")


def test_a_device_without_float64_is_refused():
    """Apple's: likelihoods are summed in float64 everywhere."""
    with pytest.raises(ValueError, match="mps, which has no float64"):
        backend_of("sparse", "auto", torch.device("mps"))


@pytest.mark.parametrize(
    ("serves", "compiles", "kernels"), [(True, True, "Triton"), (False, True, "compiled"), (False, False, "plain")]
)
def test_the_first_line_says_which_kernels_serve(monkeypatch, serves, compiles, kernels):
    monkeypatch.setattr(distributed, "triton_serves", lambda device: serves)
    monkeypatch.setattr(distributed, "can_compile", lambda kind: compiles)
    monkeypatch.setattr(distributed, "name_of", str)
    line = distributed.describe(distributed.World(device=torch.device("cuda", 0)))
    assert line == f"cuda:0, 1 rank, {kernels} kernels"
