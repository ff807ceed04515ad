"""The options that all kernels share, and the checks of what a caller gave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from loaders.minibatch import SparseCounts

Impl = Literal["auto", "plain", "reference"]
"""`auto`: tiles and sparse walks, by kernels made for the device where there are any (the CPU), else plain. `plain`:
the same tiles in plain torch on any device. `reference`: the formula on dense tensors."""

Precision = Literal["float32", "tf32", "bf16"]
"""Precision of matrix products; sums, logarithms and lgamma keep the dtype of the weights."""

Likelihood = Literal["per-cell", "original"]

TILE_BYTES = 64 * 2**20
"""Memory a likelihood may use beyond its inputs and gradients."""


def check_choice(name: str, value: str, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; use one of {', '.join(map(repr, allowed))}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, the other arguments ask for {shape}")


def check_output_layer(counts: SparseCounts, hidden: Tensor, weight: Tensor, bias: Tensor, cell_weight: Tensor) -> None:
    """Shapes and dtypes of a decoder's output layer against the counts it explains."""
    cells, features, width = counts.num_cells, counts.num_features, weight.shape[1]
    check_shape("hidden", hidden, (cells, width))
    check_shape("weight", weight, (features, width))
    check_shape("bias", bias, (features,))
    check_shape("cell_weight", cell_weight, (cells,))
    for name, tensor in (("hidden", hidden), ("bias", bias)):
        if tensor.dtype != weight.dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, weight is {weight.dtype}; cast one of them")
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"weight: got {weight.dtype}; keep weights in float32 (or float64) and choose precision='bf16'"
        )


def is_for_cpu(impl: Impl, device: torch.device) -> bool:
    """Whether the kernels made for the CPU are to be used."""
    return device.type == "cpu" and impl == "auto"


@dataclass(frozen=True)
class OutputLayer:
    """A decoder's output layer, the counts it explains, and what a cell weighs in the loss.

    Attributes
    ----------
    counts
        B cells, F features.
    hidden, weight, bias
        (B, H), (F, H), (F,).
    cell_weight
        (B,).
    """

    counts: SparseCounts
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    cell_weight: Tensor


@contextmanager
def product_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let CUDA multiply float32 in tf32 inside the block where `precision` allows it; elsewhere nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
