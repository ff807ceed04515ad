"""What follows the product of a hidden layer, in one launch each way where plain torch takes about thirty.

A program holds whole rows, so that the backward pass makes them again from the product: neither the normalised rows
nor the mask are kept. Shapes: B cells, H hidden units, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from liam_scale.kernels.cuda.launch import launch, load_table, store_table, width_of
from liam_scale.kernels.cuda.noise import hashed, on_device
from liam_scale.kernels.device import hidden_layer as plain
from liam_scale.kernels.device.noise import Dropout, signed

MAX_UNITS = 1024
"""Widest row that a program holds; wider layers take the plain path."""

NUMBERS = 512
"""Of the rows that a program holds: four a thread."""

CELLS_AT_ONCE = 64
UNITS_AT_ONCE = 64


def evaluate(
    linear: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    sample: Tensor | None,
    *,
    layer_norm: bool,
    dropout: Dropout | None,
) -> Tensor:
    """As `device.hidden_layer.evaluate`."""
    if linear.dtype != torch.float32 or linear.shape[1] > MAX_UNITS or not linear.numel():
        return plain.evaluate(linear, bias, sample_weight, sample, layer_norm=layer_norm, dropout=dropout)
    rows = _Rows(linear.shape, layer_norm, dropout)
    return _HiddenLayer.apply(rows, linear, bias, sample_weight, sample)


@dataclass(frozen=True)
class _Rows:
    """How the rows of a layer are cut into programs, and what is done with them."""

    shape: torch.Size
    layer_norm: bool
    dropout: Dropout | None

    def launch(self, kernel: Any, linear: Tensor, optional: tuple[Tensor | None, ...], *more: Tensor) -> None:
        cells, units = self.shape
        width = width_of(units)
        at_once = max(1, NUMBERS // width)
        # where a part is absent its pointer is not read
        given = [linear if tensor is None else tensor for tensor in optional]
        dropout = self.dropout if self.dropout is not None else Dropout(linear, linear, 0, 0.0)
        constants: dict[str, Any] = {"HAS_BIAS": optional[0] is not None, "HAS_SAMPLE": optional[1] is not None}
        constants |= {"HAS_NORM": self.layer_norm, "HAS_DROPOUT": self.dropout is not None}
        constants |= {
            "THRESHOLD": dropout.threshold,
            "SCALE": dropout.scale,
            "UNITS": units,
            "WIDTH": width,
            "ROWS": at_once,
        }
        key = on_device(dropout.key, linear.device)
        arguments = (linear, *given, dropout.place, key, *more, cells, signed(dropout.layer, 32))
        launch(kernel, (-(-cells // at_once),), arguments, **constants)


class _HiddenLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: _Rows,
        linear: Tensor,
        bias: Tensor | None,
        sample_weight: Tensor | None,
        sample: Tensor | None,
    ) -> Tensor:
        linear = linear.contiguous()
        hidden = torch.empty_like(linear)
        rows.launch(hidden_layer, linear, (bias, sample_weight, sample), hidden)
        ctx.rows = rows
        ctx.save_for_backward(linear, bias, sample_weight, sample)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        linear, *optional = ctx.saved_tensors
        bias, sample_weight, sample = optional
        gradient = torch.empty_like(linear)
        ctx.rows.launch(hidden_layer_gradient, linear, tuple(optional), upstream.contiguous(), gradient)
        of_samples = None if sample_weight is None else _sums_by_sample(gradient, sample, len(sample_weight))
        of_bias = None if bias is None else (gradient if of_samples is None else of_samples).sum(dim=0)
        return None, gradient, of_bias, of_samples, None


def _sums_by_sample(rows: Tensor, sample: Tensor, num_samples: int) -> Tensor:
    """(S, H) sums of the rows of each sample."""
    cells, units = rows.shape
    sums = rows.new_empty(num_samples, units)
    grid = (num_samples, -(-units // UNITS_AT_ONCE))
    constants: dict[str, Any] = {"UNITS": units, "ROWS": CELLS_AT_ONCE, "WIDTH": UNITS_AT_ONCE}
    launch(sums_by_sample, grid, (rows, sample, sums, cells), **constants)
    return sums


@triton.jit
def _normalised(
    linear,
    bias,
    sample_weight,
    sample,
    own,
    num_cells,
    HAS_BIAS: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(ROWS, WIDTH) rows before the ReLU, zeros outside, and (ROWS,) one over their deviation."""
    k = tl.arange(0, WIDTH)
    rows = load_table(linear, own, num_cells, UNITS, WIDTH)
    if HAS_BIAS:
        rows += tl.load(bias + k, mask=k < UNITS, other=0.0)[None, :]
    if HAS_SAMPLE:
        of_cell = tl.load(sample + own, mask=own < num_cells, other=0)
        rows += load_table(sample_weight, of_cell, of_cell + 1, UNITS, WIDTH)
    inverse = tl.sum(rows, axis=1) * 0.0 + 1.0
    if HAS_NORM:
        rows = tl.where((k < UNITS)[None, :], rows - (tl.sum(rows, axis=1) / UNITS)[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(rows * rows, axis=1) / UNITS + 1e-5)
        rows *= inverse[:, None]
    return rows, inverse


@triton.jit
def _dropped(
    values, place, key, layer, own, num_cells, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr
):
    of_cell = tl.load(place + own, mask=own < num_cells, other=0)
    bits = hashed(of_cell[:, None], tl.arange(0, WIDTH)[None, :], key, layer)
    return tl.where(bits >= THRESHOLD, values * SCALE, 0.0)


@triton.jit(do_not_specialize=["num_cells", "layer"])
def hidden_layer(
    linear,
    bias,
    sample_weight,
    sample,
    place,
    key,
    hidden,
    num_cells,
    layer,
    HAS_BIAS: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """hidden (B, H); a program holds its rows."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, _ = _normalised(
        linear, bias, sample_weight, sample, own, num_cells, HAS_BIAS, HAS_SAMPLE, HAS_NORM, UNITS, WIDTH
    )
    # not maximum, which would make a 0 of a NaN
    rows = tl.where(rows <= 0.0, 0.0, rows)
    if HAS_DROPOUT:
        rows = _dropped(rows, place, key, layer, own, num_cells, THRESHOLD, SCALE, WIDTH)
    store_table(hidden, own, num_cells, rows, UNITS, WIDTH)


@triton.jit(do_not_specialize=["num_cells", "layer"])
def hidden_layer_gradient(
    linear,
    bias,
    sample_weight,
    sample,
    place,
    key,
    upstream,
    gradient,
    num_cells,
    layer,
    HAS_BIAS: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """gradient (B, H) of the product."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, inverse = _normalised(
        linear, bias, sample_weight, sample, own, num_cells, HAS_BIAS, HAS_SAMPLE, HAS_NORM, UNITS, WIDTH
    )
    slope = load_table(upstream, own, num_cells, UNITS, WIDTH)
    if HAS_DROPOUT:
        slope = _dropped(slope, place, key, layer, own, num_cells, THRESHOLD, SCALE, WIDTH)
    slope = tl.where(rows <= 0.0, 0.0, slope)
    if HAS_NORM:
        along = tl.sum(slope * rows, axis=1) / UNITS
        slope -= (tl.sum(slope, axis=1) / UNITS)[:, None] + rows * along[:, None]
        slope *= inverse[:, None]
    store_table(gradient, own, num_cells, slope, UNITS, WIDTH)


@triton.jit(do_not_specialize=["num_cells"])
def sums_by_sample(rows, sample, sums, num_cells, UNITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """sums (S, H); a program owns a sample and some units, and goes through all cells."""
    own, k = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, num_cells, ROWS):
        cells = first + tl.arange(0, ROWS)
        is_own = tl.load(sample + cells, mask=cells < num_cells, other=-1) == own
        at = cells.to(tl.int64)[:, None] * UNITS + k[None, :]
        total += tl.sum(tl.load(rows + at, mask=is_own[:, None] & (k < UNITS)[None, :], other=0.0), axis=0)
    tl.store(sums + own * UNITS + k, total, mask=k < UNITS)
