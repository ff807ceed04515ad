"""What `precision` means, on every device and for every likelihood, and where it is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from liam_scale.kernels.options import Impl, check_choice

Precision = Literal["float32", "tf32", "bf16"]
"""Type in which a decoder's output layer multiplies while training: its logits, and the gradients of its weight and its
hidden state, that is every product over all features.

The rest keeps the dtype of the weights, whatever the precision: bias and library column, exponentials' sums,
logarithms, the loss, the encoders' sparse first layers, the small layers; and so does all of a loss that needs no
gradient (validation, ELBO). A precision that the device does not have is refused, never replaced by another.
"""


@functools.cache
def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere it would be slower than float32."""
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and is_supported is not None and bool(is_supported())


def precision_in_use(precision: Precision, with_gradients: bool, *, impl: Impl, weight: Tensor) -> Precision:
    """The precision of a call: float32 where no gradient is wanted, else what was asked for, which must be had."""
    check_choice("precision", precision, Precision)
    if not with_gradients:
        return "float32"
    check_precision(precision, impl=impl, device=weight.device, dtype=weight.dtype)
    return precision


def check_precision(
    precision: Precision, *, impl: Impl, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Refuse a precision that cannot be had.

    Raises
    ------
    ValueError
        Says why, and what to use.
    """
    reason = None if precision == "float32" else _lacks(precision, impl, device, dtype)
    if reason is not None:
        raise ValueError(f"precision: got {precision!r}, but {reason}; use 'float32'")


def _lacks(precision: Precision, impl: Impl, device: torch.device, dtype: torch.dtype) -> str | None:
    if impl == "reference":
        return "impl 'reference' multiplies in the dtype of the weights"
    if dtype != torch.float32:
        return f"the weights are {dtype}"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"{device} (capability {major}.{minor}) lacks it: A100 (8.0) and later have it"
    if impl == "triton":
        return None
    if precision == "tf32":
        return f"{device} lacks it: NVIDIA GPUs alone have it"
    if device.type == "cpu" and impl == "auto" and not has_bf16():
        return "this processor has no bfloat16 products"
    return None


@contextmanager
def product_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let CUDA multiply float32 in tf32 inside the block where `precision` says so; elsewhere nothing changes."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    # The older switch cannot even be read once a caller has used the newer one (torch >= 2.9).
    name, plain = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    fast = "tf32" if name == "fp32_precision" else True
    before = getattr(matmul, name)
    setattr(matmul, name, fast if precision == "tf32" else plain)
    try:
        yield
    finally:
        setattr(matmul, name, before)
