"""Matrix products of the CPU kernels.

`torch.mm` in float32 goes to MKL, which runs at less than half speed on AMD processors: the three products of
128 x 116,490 x 129 take 143 ms there and 72 ms through oneDNN, which torch ships as well (one thread, Zen 5).
oneDNN also keeps to one thread on a worker thread, where MKL would start its own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def has_onednn() -> bool:
    """Whether torch hands out oneDNN's float32 product on this processor."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def multiply_transposed(left: Tensor, right: Tensor) -> Tensor:
    """(M, N) = left (M, K) right (N, K)^T, of CPU tensors."""
    if left.dtype == torch.float32 and has_onednn() and min(left.shape) and min(right.shape):
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return torch.mm(left, right.T)
