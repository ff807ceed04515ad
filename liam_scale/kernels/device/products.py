"""Matrix products of the plain path."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(left: Tensor, right: Tensor, *, is_bf16: bool) -> Tensor:
    """(M, N) left right in the dtype of `left`, differentiable; with `is_bf16` also its gradients take bfloat16."""
    if not is_bf16:
        return torch.mm(left, right)
    return torch.mm(left.to(torch.bfloat16), right.to(torch.bfloat16)).to(left.dtype)
