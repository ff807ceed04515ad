"""The walk over the logits that both likelihoods begin with: their maximum, sum of exponentials, and fit.

Logits stay on the chip: they are made again wherever they are needed. Shapes: B cells, F features, H hidden units.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liam_scale.kernels.cuda.counts import DenseCounts, dense_bytes, dense_counts
from liam_scale.kernels.cuda.launch import (
    MAX_WIDTH,
    Tile,
    add_product,
    launch,
    load_counts,
    load_pieces,
    pieces_of,
    split,
    transposed,
    width_of,
)
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import OutputLayer, Precision

FIRST: dict[Precision, Tile] = {
    "float32": Tile(cells=64, features=32, warps=8, stages=2),
    "tf32": Tile(cells=128, features=64, warps=8, stages=2),
    "bf16": Tile(cells=128, features=64, warps=8, stages=2),
}


@functools.cache
def capability(device: torch.device) -> int:
    """90 for an H100, and where the interpreter runs."""
    return 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 90


def takes_kernels(layer: OutputLayer, precision: Precision, tile_bytes: int, targets: Targets | None) -> bool:
    """Whether the kernels serve such a layer; else the plain path does.

    The float32 gradients do on an H100 alone. Hidden states in three pieces take 96 of a thread's registers on an A100,
    which would spill 1.5 KB, and 704 of the 512 columns of a B200's tensor memory.
    """
    fits = dense_bytes(layer.counts) <= tile_bytes and layer.weight.shape[1] <= MAX_WIDTH
    has_room = precision != "float32" or targets is None or capability(layer.weight.device) == 90
    return layer.weight.dtype == torch.float32 and fits and has_room and layer.counts.num_cells > 0


@dataclass(frozen=True)
class Walked:
    """What every walk over the logits of a minibatch reads.

    Attributes
    ----------
    hidden, weight
        In pieces, see `launch.pieces_of`.
    bias, dense, precision
        As they are.
    constants
        Of every kernel.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    dense: DenseCounts
    precision: Precision
    constants: dict[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        return self.dense.num_cells, self.dense.num_features


def walked(layer: OutputLayer, precision: Precision) -> Walked:
    inputs = layer.weight.shape[1]
    constants = {"PRECISION": precision, "INPUTS": inputs, "WIDTH": width_of(inputs)}
    hidden, weight = pieces_of(layer.hidden, precision), pieces_of(layer.weight, precision)
    return Walked(hidden, weight, layer.bias, dense_counts(layer.counts), precision, constants)


def first_walk(layer: Walked, library: Tensor, library_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) float64 log sum_f exp l_f, and (B,) float64 sum_f y_f l_f."""
    tile = FIRST[layer.precision]
    grid = split(*layer.size, tile)
    partial = library.new_empty(3, grid.splits, layer.size[0], dtype=torch.float64)
    tables = (layer.hidden, library, layer.weight, library_weight, layer.bias, layer.dense.values, layer.dense.stride)
    arguments = (*tables, partial, *layer.size, grid.length, grid.tiles)
    launch(softmax_first, (grid.cells, grid.splits), arguments, tile, **layer.constants)
    top, total, fit = partial.unbind()
    return torch.logsumexp(top + total.log(), dim=0), fit.sum(dim=0)


def rounded(normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) float32, and (B,) float64 factor that what is made with it lacks: at 788 float32 is 3e-5 off."""
    near = normalizer.float()
    return near, torch.exp(near.double() - normalizer)


@triton.jit
def load_features(weight, library_weight, bias, cols, end, PRECISION: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of the output layer; a bias far below any other where there is no feature."""
    of_library = tl.load(library_weight + cols, mask=cols < end, other=0.0)
    shift = tl.load(bias + cols, mask=cols < end, other=-1e30)
    return load_pieces(weight, cols, end, PRECISION, WIDTH), of_library, shift


@triton.jit
def tile_logits(a, of_a, b, of_b, shift, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) a b^T, plus sizes of cells x library weights, which are never rounded below float32."""
    logits = add_product(tl.zeros((ROWS, COLUMNS), tl.float32), a, transposed(b), PRECISION)
    return logits + of_a[:, None] * of_b[None, :] + shift


@triton.jit(do_not_specialize=["num_cells", "length", "tiles"])
def softmax_first(
    hidden,
    library,
    weight,
    library_weight,
    bias,
    dense,
    stride,
    partial,
    num_cells,
    num_features,
    length,
    tiles,
    PRECISION: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """partial (3, splits, B): maximum, sum of exponentials above it, sum of count x logit, over a range of features."""
    rows, part = tl.program_id(0) * CELLS + tl.arange(0, CELLS), tl.program_id(1)
    is_cell = rows < num_cells
    h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
    size = tl.load(library + rows, mask=is_cell, other=0.0)
    top = tl.full((CELLS,), -1e30, tl.float32)
    total, fit = tl.zeros((CELLS,), tl.float64), tl.zeros((CELLS,), tl.float64)
    for tile in range(part * length, tl.minimum(part * length + length, tiles)):
        cols = tile * FEATURES + tl.arange(0, FEATURES)
        table, sized, shift = load_features(weight, library_weight, bias, cols, num_features, PRECISION, WIDTH)
        logits = tile_logits(h, size, table, sized, shift[None, :], PRECISION, CELLS, FEATURES)
        y = load_counts(dense, stride, rows, cols)
        fit += tl.sum(y * logits, axis=1).to(tl.float64)
        higher = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp(top - higher).to(tl.float64)
        total += tl.sum(tl.exp(logits - higher[:, None]), axis=1).to(tl.float64)
        top = higher
    splits = tl.num_programs(1)
    at = part * num_cells + rows
    tl.store(partial + at, top.to(tl.float64), mask=is_cell)
    tl.store(partial + splits * num_cells + at, total, mask=is_cell)
    tl.store(partial + 2 * splits * num_cells + at, fit, mask=is_cell)
