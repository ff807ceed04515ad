"""Element-wise parts of the kernels for CUDA, fused by `torch.compile`; on the CPU numba does this."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from liam_scale.kernels.reference import NB_EPSILON

Elementwise = Callable[..., Tensor]
Backend = str | Callable

SWITCH = "LIAM_SCALE_COMPILE"
"""Environment variable; 0 leaves the plain functions everywhere."""


@functools.cache
def can_compile(device_type: str, *, backend: Backend = "inductor") -> bool:
    """Whether `torch.compile` works on such a device, tried once in a process: a 2 x 2 example, forward and backward.

    It may fail at the first call, at the first backward pass (compiled there) or at the first launch: without a C++
    compiler, Python's headers, a fitting Triton, or with a full /tmp. One warning then says so.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        example = torch.rand(2, 2, device=device_type, requires_grad=True)
        torch.compile(_example, dynamic=True, backend=backend)(example).backward()
        float(example.grad.sum())  # type: ignore[union-attr]  # waits for the launch
    except Exception as error:
        reason = " ".join(str(error).strip().split("\n\n")[0].split())
        warnings.warn(
            f"torch.compile: fails on {device_type} ({reason}); running without it, slower. Install a C++ compiler and "
            f"Triton, or set {SWITCH}=0 to leave it out without this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _example(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x)).sum()


def fused_on(device_type: str, function: Elementwise, *, backend: Backend = "inductor") -> Elementwise:
    """The function, compiled once with symbolic shapes where its first argument lives on such a device.

    Minibatches differ by a few cells and tiles by a few features, so no size may be compiled in.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True, backend=backend))

    @functools.wraps(function)
    def call(*arguments: Tensor) -> Tensor:
        if arguments[0].device.type != device_type or not can_compile(device_type, backend=backend):
            return function(*arguments)
        return compiled()(*arguments)

    return call


def _softmax_slopes(logits: Tensor, normalizer: Tensor, scale: Tensor) -> Tensor:
    """(B, T) scale * exp(logit - normalizer) of a tile."""
    return torch.exp(logits - normalizer[:, None]) * scale[:, None]


def _dense_log_likelihood(mean: Tensor, theta: Tensor) -> Tensor:
    """(B,) - sum over features of theta log1p(mu / (theta + eps))."""
    return -(theta * torch.log1p(mean / (theta + NB_EPSILON))).sum(dim=1)


softmax_slopes = fused_on("cuda", _softmax_slopes)
dense_log_likelihood = fused_on("cuda", _dense_log_likelihood)
