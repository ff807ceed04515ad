"""The negative multinomial: one walk for the terms of the loss, two for the gradients, no logits in memory.

Shapes: B cells, F features, H hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liam_scale.kernels.cuda.launch import Tile, add_product, cut, launch, load_counts, load_pieces, split, store_table
from liam_scale.kernels.cuda.softmax import (
    Walked,
    first_walk,
    load_features,
    rounded,
    takes_kernels,
    tile_logits,
    walked,
)
from liam_scale.kernels.device import negative_multinomial as plain
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import Precision, SizedLayer
from liam_scale.kernels.reference import ORIGINAL_EPSILON
from liam_scale.kernels.terms import Cells, Coupling, InputGradients, Terms, coupled_terms, per_cell_terms

WEIGHT_GRADIENT: dict[Precision, Tile] = {
    "float32": Tile(cells=32, features=64, warps=8, stages=2),
    "tf32": Tile(cells=32, features=64, warps=8, stages=2),
    "bf16": Tile(cells=64, features=64, warps=8, stages=2),
}
ORIGINAL = Tile(cells=64, features=16, warps=8, stages=2)
HIDDEN_GRADIENT: dict[Precision, Tile] = {
    "float32": Tile(cells=64, features=32, warps=8, stages=2),
    "tf32": Tile(cells=64, features=64, warps=8, stages=2),
    "bf16": Tile(cells=64, features=64, warps=8, stages=2),
}


def evaluate(
    layer: SizedLayer,
    r: Tensor,
    coupling: Coupling | None,
    precision: Precision,
    tile_bytes: int,
    targets: Targets | None,
) -> tuple[Terms, InputGradients]:
    """Terms of all cells, and the gradients of the inputs; fills the targets."""
    if not takes_kernels(layer, precision, tile_bytes, targets):
        return plain.evaluate(layer, r, coupling, precision, tile_bytes, targets)
    own = walked(layer, precision)
    cells = Cells(layer.counts.totals().double(), r.double(), layer.cell_weight.double())
    log_sum, fit = first_walk(own, layer.library, layer.library_weight)
    normalizer = torch.logaddexp(log_sum, torch.zeros_like(log_sum))
    tables = (own.hidden, layer.library, own.weight, layer.library_weight, own.bias, own.dense.values, own.dense.stride)
    near, lacking = rounded(normalizer)
    shared = (*tables, near)
    if coupling is None:
        terms = per_cell_terms(cells, fit, normalizer)
    else:
        fit, slope = _original_fit(own, shared)
        terms = coupled_terms(cells, fit + slope * lacking.log(), slope, normalizer, coupling)
    if targets is None:
        return terms, InputGradients(torch.zeros_like(layer.hidden), torch.zeros_like(layer.library))
    epsilon = 0.0 if coupling is None else ORIGINAL_EPSILON
    return terms, _gradients(own, (*shared, (terms.scale * lacking).float(), layer.cell_weight), epsilon, targets)


def _original_fit(own: Walked, shared: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(B,) sum_f y_f log(p_f + eps), and (B,) its slope."""
    grid = split(*own.size, ORIGINAL)
    partial = own.bias.new_empty(2, grid.splits, own.size[0], dtype=torch.float64)
    arguments = (*shared, partial, *own.size, grid.length, grid.tiles)
    constants = {"EPSILON": ORIGINAL_EPSILON, **own.constants}
    launch(multinomial_original, (grid.cells, grid.splits), arguments, ORIGINAL, **constants)
    fit, slope = partial.sum(dim=1).unbind()
    return fit, slope


def _gradients(own: Walked, shared: tuple[Any, ...], epsilon: float, targets: Targets) -> InputGradients:
    """Fills the targets; returns the gradients of the inputs."""
    constants, (cells, features) = {"EPSILON": epsilon, **own.constants}, own.size
    tile = WEIGHT_GRADIENT[own.precision]
    blocks = -(-features // tile.features)
    launch(multinomial_weight_gradient, (blocks,), (*shared, *targets.tensors, *own.size), tile, **constants)
    tile = HIDDEN_GRADIENT[own.precision]
    grid = split(*own.size, tile)
    hidden = own.bias.new_empty(grid.splits, cells, own.constants["INPUTS"])
    library = own.bias.new_empty(grid.splits, cells, dtype=torch.float64)
    arguments = (*shared, hidden, library, *own.size, grid.length, grid.tiles)
    launch(multinomial_hidden_gradient, (grid.cells, grid.splits), arguments, tile, **constants)
    return InputGradients(hidden.sum(dim=0), library.sum(dim=0).float())


@triton.jit(do_not_specialize=["num_cells", "length", "tiles"])
def multinomial_original(
    hidden,
    library,
    weight,
    library_weight,
    bias,
    dense,
    stride,
    normalizer,
    partial,
    num_cells,
    num_features,
    length,
    tiles,
    PRECISION: tl.constexpr,
    EPSILON: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """partial (2, splits, B): sum of y log(p + eps) and of y p / (p + eps) over a range of features."""
    rows, part = tl.program_id(0) * CELLS + tl.arange(0, CELLS), tl.program_id(1)
    is_cell = rows < num_cells
    h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
    size = tl.load(library + rows, mask=is_cell, other=0.0)
    norm = tl.load(normalizer + rows, mask=is_cell, other=1e30)
    fit, slope = tl.zeros((CELLS,), tl.float64), tl.zeros((CELLS,), tl.float64)
    for tile in range(part * length, tl.minimum(part * length + length, tiles)):
        cols = tile * FEATURES + tl.arange(0, FEATURES)
        table, sized, shift = load_features(weight, library_weight, bias, cols, num_features, PRECISION, WIDTH)
        logits = tile_logits(h, size, table, sized, shift[None, :], PRECISION, CELLS, FEATURES)
        y = load_counts(dense, stride, rows, cols)
        p = tl.exp(logits - norm[:, None])
        fit += tl.sum(y * tl.log(p + EPSILON), axis=1).to(tl.float64)
        slope += tl.sum(y * p / (p + EPSILON), axis=1).to(tl.float64)
    at = part * num_cells + rows
    tl.store(partial + at, fit, mask=is_cell)
    tl.store(partial + tl.num_programs(1) * num_cells + at, slope, mask=is_cell)


@triton.jit
def _slopes(logits, y, norm, scale, cell_weight, EPSILON: tl.constexpr):
    """d loss / d logits: scale p - w y, with y p / (p + eps) in the place of y for the original's formula."""
    p = tl.exp(logits - norm)
    if EPSILON != 0.0:
        y = y * p / (p + EPSILON)
    return p * scale - cell_weight * y


@triton.jit(do_not_specialize=["num_cells"])
def multinomial_weight_gradient(
    hidden,
    library,
    weight,
    library_weight,
    bias,
    dense,
    stride,
    normalizer,
    scale,
    cell_weight,
    weight_gradient,
    bias_gradient,
    library_weight_gradient,
    num_cells,
    num_features,
    PRECISION: tl.constexpr,
    EPSILON: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradients of weight, bias and library weight; a program owns its features and writes them once."""
    cols = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    table, sized, shift = load_features(weight, library_weight, bias, cols, num_features, PRECISION, WIDTH)
    total = tl.zeros((FEATURES, WIDTH), tl.float32)
    of_bias, of_library = tl.zeros((FEATURES,), tl.float64), tl.zeros((FEATURES,), tl.float64)
    for first in range(0, num_cells, CELLS):
        rows = first + tl.arange(0, CELLS)
        is_cell = rows < num_cells
        h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
        size = tl.load(library + rows, mask=is_cell, other=0.0)
        # feature by cell, so that the slopes are multiplied as they lie
        logits = tile_logits(table, sized, h, size, shift[:, None], PRECISION, FEATURES, CELLS)
        norm = tl.load(normalizer + rows, mask=is_cell, other=1e30)
        of_cell = tl.load(scale + rows, mask=is_cell, other=0.0)
        weights = tl.load(cell_weight + rows, mask=is_cell, other=0.0)
        y = tl.trans(load_counts(dense, stride, rows, cols))
        slopes = _slopes(logits, y, norm[None, :], of_cell[None, :], weights[None, :], EPSILON)
        total = add_product(total, cut(slopes, PRECISION), h, PRECISION)
        of_bias += tl.sum(slopes, axis=1).to(tl.float64)
        of_library += tl.sum(slopes * size[None, :], axis=1).to(tl.float64)
    store_table(weight_gradient, cols, num_features, total, INPUTS, WIDTH)
    tl.store(bias_gradient + cols, of_bias.to(tl.float32), mask=cols < num_features)
    tl.store(library_weight_gradient + cols, of_library.to(tl.float32), mask=cols < num_features)


@triton.jit(do_not_specialize=["num_cells", "length", "tiles"])
def multinomial_hidden_gradient(
    hidden,
    library,
    weight,
    library_weight,
    bias,
    dense,
    stride,
    normalizer,
    scale,
    cell_weight,
    hidden_gradient,
    library_gradient,
    num_cells,
    num_features,
    length,
    tiles,
    PRECISION: tl.constexpr,
    EPSILON: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradients of hidden state (splits, B, H) and library (splits, B) from a range of features."""
    rows, part = tl.program_id(0) * CELLS + tl.arange(0, CELLS), tl.program_id(1)
    is_cell = rows < num_cells
    h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
    size = tl.load(library + rows, mask=is_cell, other=0.0)
    norm = tl.load(normalizer + rows, mask=is_cell, other=1e30)
    of_cell = tl.load(scale + rows, mask=is_cell, other=0.0)
    weights = tl.load(cell_weight + rows, mask=is_cell, other=0.0)
    total, of_library = tl.zeros((CELLS, WIDTH), tl.float32), tl.zeros((CELLS,), tl.float64)
    for tile in range(part * length, tl.minimum(part * length + length, tiles)):
        cols = tile * FEATURES + tl.arange(0, FEATURES)
        table, sized, shift = load_features(weight, library_weight, bias, cols, num_features, PRECISION, WIDTH)
        logits = tile_logits(h, size, table, sized, shift[None, :], PRECISION, CELLS, FEATURES)
        y = load_counts(dense, stride, rows, cols)
        slopes = _slopes(logits, y, norm[:, None], of_cell[:, None], weights[:, None], EPSILON)
        total = add_product(total, cut(slopes, PRECISION), table, PRECISION)
        of_library += tl.sum(slopes * sized[None, :], axis=1).to(tl.float64)
    store_table(hidden_gradient + part.to(tl.int64) * num_cells * INPUTS, rows, num_cells, total, INPUTS, WIDTH)
    tl.store(library_gradient + part * num_cells + rows, of_library, mask=is_cell)
