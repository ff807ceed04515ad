"""Which kernels serve a call: those made for the CPU, Triton's for NVIDIA GPUs, or plain torch."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch

from liam_scale.kernels.options import Impl

Operation = Literal["sparse", "negative_multinomial", "negative_binomial", "hidden_layer", "noise"]

PLAIN_ON_CPU = ("hidden_layer", "noise")
"""Operations without kernels of their own there."""

SWITCH = "LIAM_SCALE_TRITON"
"""Environment variable; 0 leaves the plain path on GPUs."""


def backend_of(operation: Operation, impl: Impl, device: torch.device) -> ModuleType:
    """The module that computes an operation on such a device.

    Raises
    ------
    ValueError
        `impl="triton"` where it cannot run, and a device that nothing here can run on.
    """
    room = room_of(impl, device)
    return _module(operation, "device" if room == "cpu" and operation in PLAIN_ON_CPU else room)


@functools.cache
def _module(operation: Operation, room: str) -> ModuleType:
    return importlib.import_module(f"liam_scale.kernels.{room}.{operation}")


def room_of(impl: Impl, device: torch.device) -> Literal["cpu", "cuda", "device"]:
    """The folder of the kernels that serve such a device; plain torch is `device`."""
    if device.type == "mps":
        raise ValueError("device: got mps, which has no float64, in which losses are summed; move the model to the cpu")
    if impl == "triton":
        check_triton(device)
        return "cuda"
    if impl == "auto" and device.type == "cpu":
        return "cpu"
    return "cuda" if impl == "auto" and device.type == "cuda" and triton_serves(device) else "device"


def check_triton(device: torch.device) -> None:
    """Refuse `impl="triton"` where it cannot run.

    Raises
    ------
    ValueError
        Says why, and what to use.
    """
    reason = lacks_triton(device)
    if reason is not None:
        raise ValueError(f"impl: got 'triton', but {reason}; use 'auto'")


def lacks_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, or None. On CPU tensors its interpreter runs them, for tests."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device} is no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"{device} (capability {major}.{minor}) is older than A100 (8.0)"


@functools.cache
def triton_serves(device: torch.device) -> bool:
    """Whether Triton's kernels work there, tried once in a process: a small step, against plain torch.

    They may fail at import, at the first compilation or at the first launch (driver, ptxas, a full /tmp), and one
    warning then says so.
    """
    if os.environ.get(SWITCH) == "0" or lacks_triton(device) is not None:
        return False
    try:
        importlib.import_module("liam_scale.kernels.cuda.trial").run(device)
    except Exception as error:
        reason = " ".join(str(error).strip().split("\n\n")[0].split())
        warnings.warn(
            f"Triton: its kernels fail on {device} ({type(error).__name__}: {reason}); running plain torch, slower. "
            f"Set {SWITCH}=0 to leave them out without this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
