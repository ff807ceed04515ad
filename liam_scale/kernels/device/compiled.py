"""Element-wise parts of the kernels for CUDA, fused by `torch.compile`; on the CPU numba does this."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Elementwise = Callable[..., Tensor]


def fused_on(device_type: str, function: Elementwise, *, backend: str | Callable = "inductor") -> Elementwise:
    """The function, compiled once with symbolic shapes where its first argument lives on such a device.

    Minibatches differ by a few cells and tiles by a few features, so no size may be compiled in. Where compiling fails
    (no compiler on the machine), one warning says so and the plain function serves from then on.
    """
    state: dict[str, Elementwise] = {}

    @functools.wraps(function)
    def call(*arguments: Tensor) -> Tensor:
        if arguments[0].device.type != device_type:
            return function(*arguments)
        if "chosen" not in state:
            state["chosen"] = torch.compile(function, dynamic=True, backend=backend)
        try:
            return state["chosen"](*arguments)
        except Exception as error:
            if not _is_of_the_compiler(error):
                raise
            reason = " ".join(str(error).strip().split("\n\n")[0].split())
            warnings.warn(
                f"{function.__name__}: torch.compile failed on {device_type} ({reason}); running without it, slower. "
                "Install a C++ compiler and Triton to fuse it",
                RuntimeWarning,
                stacklevel=2,
            )
            state["chosen"] = function
            return function(*arguments)

    return call


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # loaded by torch.compile; at import it would take a second

    return isinstance(error, TorchDynamoException)


def _softmax_slopes(logits: Tensor, normalizer: Tensor, scale: Tensor) -> Tensor:
    """(B, T) scale * exp(logit - normalizer) of a tile."""
    return torch.exp(logits - normalizer[:, None]) * scale[:, None]


def _dense_log_likelihood(mean: Tensor, theta: Tensor, epsilon: Tensor) -> Tensor:
    """(B,) - sum over features of theta log1p(mu / (theta + eps))."""
    return -(theta * torch.log1p(mean / (theta + epsilon))).sum(dim=1)


softmax_slopes = fused_on("cuda", _softmax_slopes)
dense_log_likelihood = fused_on("cuda", _dense_log_likelihood)
