"""Products of counts with the encoders' feature-major weights: dense tiles on tensor cores, or a gather by cell.

Shapes: B cells, F features, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liam_scale.kernels.cuda.counts import dense_bytes, dense_counts
from liam_scale.kernels.cuda.launch import (
    MAX_WIDTH,
    Tile,
    add_product,
    cut,
    launch,
    load_counts,
    load_table,
    log1p,
    split,
    store_table,
    width_of,
)
from liam_scale.kernels.device import sparse as plain
from liam_scale.kernels.options import memory_of_tiles
from loaders.minibatch import SparseCounts

DENSE_FROM = 0.017
"""Density from which three bfloat16 products of dense tiles cost less than rows read from the L2 cache (estimated)."""

PRODUCT = Tile(cells=64, features=32, warps=8, stages=2)
GRADIENT = Tile(cells=32, features=64, warps=8, stages=2)

GATHER_ROWS = 16
"""Rows of the weight in flight at once."""
GATHER_PARTS = 8
"""Programs that share the entries of a cell."""


@dataclass(frozen=True)
class Entries:
    """Counts, or their log(1 + counts), for weights of one dtype."""

    counts: SparseCounts
    dtype: torch.dtype
    log1p: bool

    def plain(self) -> SparseCounts:
        return plain.entries(self.counts, self.dtype, log1p=self.log1p)

    def takes_kernels(self, table: Tensor) -> bool:
        return self.dtype == torch.float32 and table.shape[1] <= MAX_WIDTH and self.counts.num_cells > 0

    @property
    def is_dense(self) -> bool:
        """The number of entries is known without asking the device."""
        counts = self.counts
        density = len(counts.indices) / max(1, counts.num_cells * counts.num_features)
        return density >= DENSE_FROM and dense_bytes(counts) <= memory_of_tiles(counts.values.device)


def entries(counts: SparseCounts, dtype: torch.dtype, *, log1p: bool) -> Entries:
    return Entries(counts, dtype, log1p)


def product(entries: Entries, weight: Tensor) -> Tensor:
    """(B, O) = counts weight."""
    if not entries.takes_kernels(weight):
        return plain.product(entries.plain(), weight)
    num_features, outputs = weight.shape
    constants: dict[str, Any] = {"IS_LOG": entries.log1p, "INPUTS": outputs, "WIDTH": width_of(outputs)}
    if not entries.is_dense:
        counts = entries.counts
        partial = weight.new_empty(GATHER_PARTS, counts.num_cells, outputs)
        if counts.is_padded:
            partial[:, -1].zero_()
        launch(
            gather_product,
            (counts.num_cells - counts.is_padded, GATHER_PARTS),
            (counts.indptr, counts.indices, counts.values, weight, partial, counts.num_cells),
            ROWS=GATHER_ROWS,
            **constants,
        )
        return partial.sum(dim=0)
    dense = dense_counts(entries.counts)
    grid = split(dense.num_cells, num_features, PRODUCT)
    partial = weight.new_empty(grid.splits, dense.num_cells, outputs)
    arguments = (dense.values, dense.stride, weight, partial, dense.num_cells, num_features, grid.length, grid.tiles)
    constants["IS_EXACT"] = dense.is_exact and not entries.log1p
    launch(dense_product, (grid.cells, grid.splits), arguments, PRODUCT, **constants)
    return partial.sum(dim=0)


def write_gradient(entries: Entries, upstream: Tensor, gradient: Tensor) -> None:
    """gradient (F, O) = counts^T upstream."""
    if not (entries.takes_kernels(upstream) and entries.is_dense):
        plain.write_gradient(entries.plain(), upstream, gradient)
        return
    dense, outputs = dense_counts(entries.counts), upstream.shape[1]
    launch(
        dense_gradient,
        (-(-dense.num_features // GRADIENT.features),),
        (dense.values, dense.stride, upstream, gradient, dense.num_cells, dense.num_features),
        GRADIENT,
        IS_LOG=entries.log1p,
        IS_EXACT=dense.is_exact and not entries.log1p,
        INPUTS=outputs,
        WIDTH=width_of(outputs),
    )


@triton.jit(do_not_specialize=["num_cells"])
def gather_product(
    indptr,
    indices,
    values,
    weight,
    partial,
    num_cells,
    ROWS: tl.constexpr,
    IS_LOG: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """partial[part, cell] = sum of value x weight row over a part of the cell's entries."""
    cell, part = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(indptr + cell), tl.load(indptr + cell + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(start + part * ROWS, end, tl.num_programs(1) * ROWS):
        at = first + tl.arange(0, ROWS)
        y = tl.load(values + at, mask=at < end, other=0).to(tl.float32)
        if IS_LOG:
            y = log1p(y)
        features = tl.load(indices + at, mask=at < end, other=0x7FFFFFFF)
        total += tl.sum(load_table(weight, features, 0x7FFFFFFF, INPUTS, WIDTH) * y[:, None], axis=0)
    k = tl.arange(0, WIDTH)
    tl.store(partial + (part * num_cells + cell).to(tl.int64) * INPUTS + k, total, mask=k < INPUTS)


@triton.jit(do_not_specialize=["num_cells", "length", "tiles"])
def dense_product(
    dense,
    stride,
    weight,
    partial,
    num_cells,
    num_features,
    length,
    tiles,
    IS_LOG: tl.constexpr,
    IS_EXACT: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """partial[split] (B, O) = counts weight over a range of features."""
    rows, part = tl.program_id(0) * CELLS + tl.arange(0, CELLS), tl.program_id(1)
    total = tl.zeros((CELLS, WIDTH), tl.float32)
    for tile in range(part * length, tl.minimum(part * length + length, tiles)):
        cols = tile * FEATURES + tl.arange(0, FEATURES)
        y = load_counts(dense, stride, rows, cols)
        if IS_LOG:
            y = log1p(y)
        table = cut(load_table(weight, cols, num_features, INPUTS, WIDTH), "float32")
        total = add_product(total, cut(y, "float32"), table, "float32", IS_EXACT)
    here = partial + part.to(tl.int64) * num_cells * INPUTS
    store_table(here, rows, num_cells, total, INPUTS, WIDTH)


@triton.jit(do_not_specialize=["num_cells"])
def dense_gradient(
    dense,
    stride,
    upstream,
    gradient,
    num_cells,
    num_features,
    IS_LOG: tl.constexpr,
    IS_EXACT: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """gradient (F, O) = counts^T upstream; a program owns its features and writes them once."""
    cols = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((FEATURES, WIDTH), tl.float32)
    for first in range(0, num_cells, CELLS):
        rows = first + tl.arange(0, CELLS)
        y = load_counts(dense, stride, rows, cols)
        if IS_LOG:
            y = log1p(y)
        values = cut(load_table(upstream, rows, num_cells, INPUTS, WIDTH), "float32")
        total = add_product(total, cut(tl.trans(y), "float32"), values, "float32", IS_EXACT)
    store_table(gradient, cols, num_features, total, INPUTS, WIDTH)
