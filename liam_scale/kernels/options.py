"""The options that all kernels share (`impl`, `precision`), and the checks of what a caller gave."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from loaders.minibatch import SparseCounts

Impl = Literal["auto", "plain", "triton", "reference"]
"""`auto`: tiles and sparse walks, by kernels made for the device where there are any (the CPU, NVIDIA GPUs), else
plain. `plain`: the same tiles in plain torch on any device. `triton`: the kernels for NVIDIA GPUs or an error, on CPU
tensors by Triton's interpreter. `reference`: the formula on dense tensors."""

Likelihood = Literal["per-cell", "original"]

Precision = Literal["float32", "tf32", "bf16"]
"""Type in which a decoder's output layer multiplies while training: its logits, and the gradients of its weight and its
hidden state, that is every product over all features.

The rest keeps the dtype of the weights, whatever the precision: bias and library column, exponentials' sums,
logarithms, the loss, the encoders' sparse first layers, the small layers; and so does all of a loss that needs no
gradient (validation, ELBO). A precision that the device does not have is refused, never replaced by another.
"""

TILE_BYTES = 64 * 2**20
"""Memory a likelihood may use beyond its inputs and gradients on the CPU: what is kept there should stay in cache."""

GPU_TILE_BYTES = 2 * 2**30
"""The same on CUDA, where each tile costs some 80 launches: 1,024 cells x 116,490 features are one."""


@functools.cache
def memory_of_tiles(device: torch.device) -> int:
    """Memory a likelihood may use there: on CUDA at most a sixteenth of the card.

    Of the whole card and not of what happens to be free, so that tiles, and with them the last bits of sums, are the
    same from run to run.
    """
    if device.type == "cpu":
        return TILE_BYTES
    return min(GPU_TILE_BYTES, torch.get_device_module(device).get_device_properties(device).total_memory // 16)


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

    def detached(self) -> Self:
        """The same outside autograd, contiguous."""
        tensors: dict[str, Any] = {
            name: t.detach().contiguous() for name, t in vars(self).items() if isinstance(t, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class SizedLayer(OutputLayer):
    """One that also reads the size of the cell: logits = hidden weight^T + library (x) library_weight + bias.

    Sizes reach the thousands and drive logits into the hundreds, where a product in tf32 or bfloat16 would be off by
    one: their part is never a matrix product, but added in the dtype of the weights.

    Attributes
    ----------
    library, library_weight
        (B,), (F,); zeros where sizes are not used.
    """

    library: Tensor
    library_weight: Tensor
