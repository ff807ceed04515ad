"""The negative binomial: four walks over the logits (normaliser, terms, gradients of features, gradients of cells).

With mean mu = library p and p the softmax of the logits, the slope of an entry is

    mu d ll / d mu = mu theta / (theta + mu + eps) (x / (mu + eps) - 1),

and a logit's gradient is that minus p times its sum over the cell. Shapes: B cells, F features, H hidden units, S
samples.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liam_scale.kernels.cuda.gamma import digamma_difference, log_gamma_difference
from liam_scale.kernels.cuda.launch import (
    Tile,
    add_product,
    cut,
    launch,
    load_counts,
    load_pieces,
    log1p,
    split,
    store_table,
    transposed,
)
from liam_scale.kernels.cuda.softmax import Walked, first_walk, rounded, takes_kernels, walked
from liam_scale.kernels.device import negative_binomial as plain
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import OutputLayer, Precision
from liam_scale.kernels.reference import NB_EPSILON, THETA_FLOOR

_EPSILON = tl.constexpr(NB_EPSILON)
_FLOOR = tl.constexpr(THETA_FLOOR)

TERMS = Tile(cells=64, features=16, warps=8, stages=2)
THETA_GRADIENT = Tile(cells=16, features=64, warps=8, stages=1)
WEIGHT_GRADIENT: dict[Precision, Tile] = {
    "float32": Tile(cells=32, features=64, warps=8, stages=2),
    "tf32": Tile(cells=16, features=64, warps=8, stages=2),
    "bf16": Tile(cells=64, features=64, warps=8, stages=2),
}
HIDDEN_GRADIENT: dict[Precision, Tile] = {
    "float32": Tile(cells=64, features=32, warps=8, stages=2),
    "tf32": Tile(cells=64, features=32, warps=8, stages=2),
    "bf16": Tile(cells=64, features=64, warps=8, stages=2),
}


def evaluate(
    layer: OutputLayer,
    library: Tensor,
    log_theta: Tensor,
    sample: Tensor,
    precision: Precision,
    tile_bytes: int,
    targets: Targets | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) float64 log-likelihood, gradients of hidden state and library; fills the targets."""
    if not takes_kernels(layer, precision, tile_bytes, targets):
        return plain.evaluate(layer, library, log_theta, sample, precision, tile_bytes, targets)
    own = walked(layer, precision)
    log_sum, _ = first_walk(own, torch.zeros_like(library), torch.zeros_like(layer.bias))
    tables = (own.hidden, own.weight, own.bias, own.dense.values, own.dense.stride)
    near, lacking = rounded(log_sum)
    shared = (*tables, near, (library * lacking).float(), log_theta.contiguous(), sample)
    samples = log_theta.shape[1] if log_theta.dim() == 2 else 0
    grid = split(*own.size, TERMS)
    partial = log_sum.new_empty(2, grid.splits, own.size[0])
    arguments = (*shared, partial, *own.size, grid.length, grid.tiles)
    launch(binomial_terms, (grid.cells, grid.splits), arguments, TERMS, SAMPLES=samples, **own.constants)
    found, pull = partial.sum(dim=1).unbind()
    pull = pull * lacking
    log_likelihood = torch.where(layer.cell_weight != 0, found, 0)
    if targets is None:
        return log_likelihood, torch.zeros_like(layer.hidden), torch.zeros_like(library)
    weighted = (*shared, layer.cell_weight, (library * pull * lacking).float())
    hidden_gradient = _gradients(own, weighted, samples, targets)
    _theta_gradient(own, weighted, samples, targets.tensors[2])
    return log_likelihood, hidden_gradient, (-layer.cell_weight * pull).float()


def _gradients(own: Walked, shared: tuple[Any, ...], samples: int, targets: Targets) -> Tensor:
    """Fills the gradients of weight and bias; returns that of the hidden state."""
    constants, (cells, features) = {"SAMPLES": samples, **own.constants}, own.size
    tile = WEIGHT_GRADIENT[own.precision]
    blocks = -(-features // tile.features)
    launch(binomial_weight_gradient, (blocks,), (*shared, *targets.tensors[:2], *own.size), tile, **constants)
    tile = HIDDEN_GRADIENT[own.precision]
    grid = split(*own.size, tile)
    hidden = own.bias.new_empty(grid.splits, cells, own.constants["INPUTS"])
    arguments = (*shared, hidden, *own.size, grid.length, grid.tiles)
    launch(binomial_hidden_gradient, (grid.cells, grid.splits), arguments, tile, **constants)
    return hidden.sum(dim=0)


def _theta_gradient(own: Walked, shared: tuple[Any, ...], samples: int, gradient: Tensor) -> None:
    order, starts = _cells_by_sample(shared[8], samples)
    arguments, blocks = (*shared, order, starts, gradient, *own.size), -(-own.size[1] // THETA_GRADIENT.features)
    constants = {"SAMPLES": samples, **own.constants}
    launch(binomial_theta_gradient, (blocks, max(1, samples)), arguments, THETA_GRADIENT, **constants)


def _cells_by_sample(sample: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(B,) cells sorted by sample, and (S + 1,) where each begins; in their order if one theta serves all samples."""
    if not samples:
        return torch.arange(len(sample), device=sample.device), torch.arange(2, device=sample.device) * len(sample)
    ordered, order = torch.sort(sample, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(samples + 1, device=sample.device))


@triton.jit
def _load_theta(log_theta, sample, rows, cols, num_cells, num_features, SAMPLES: tl.constexpr):
    """exp(log_theta) of a tile, without its floor; 1 where there is no feature. Rows or columns lie either way."""
    if SAMPLES == 0:
        found = tl.load(log_theta + cols, mask=cols < num_features, other=0.0)
    else:
        column = tl.load(sample + rows, mask=rows < num_cells, other=0)
        found = tl.load(log_theta + cols.to(tl.int64) * SAMPLES + column, mask=cols < num_features, other=0.0)
    return tl.exp(found)


@triton.jit
def _load_shift(bias, cols, num_features):
    return tl.load(bias + cols, mask=cols < num_features, other=-1e30)


@triton.jit
def _shares(a, b, shift, norm, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) softmax of a b^T + shift, 0 where there is no feature."""
    return tl.exp(add_product(tl.zeros((ROWS, COLUMNS), tl.float32), a, transposed(b), PRECISION) + shift - norm)


@triton.jit
def _slopes(p, mean, y, theta):
    """p d ll / d mu of each entry."""
    return p * theta / (theta + mean + _EPSILON) * (y / (mean + _EPSILON) - 1.0)


@triton.jit(do_not_specialize=["num_cells", "length", "tiles"])
def binomial_terms(
    hidden,
    weight,
    bias,
    dense,
    stride,
    normalizer,
    library,
    log_theta,
    sample,
    partial,
    num_cells,
    num_features,
    length,
    tiles,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """partial (2, splits, B): log-likelihood, and d ll / d library, over a range of features."""
    rows, part = tl.program_id(0) * CELLS + tl.arange(0, CELLS), tl.program_id(1)
    is_cell = rows < num_cells
    h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
    size = tl.load(library + rows, mask=is_cell, other=0.0)[:, None]
    norm = tl.load(normalizer + rows, mask=is_cell, other=1e30)
    likelihood, pull = tl.zeros((CELLS,), tl.float64), tl.zeros((CELLS,), tl.float64)
    for tile in range(part * length, tl.minimum(part * length + length, tiles)):
        cols = tile * FEATURES + tl.arange(0, FEATURES)
        table, shift = load_pieces(weight, cols, num_features, PRECISION, WIDTH), _load_shift(bias, cols, num_features)
        p = _shares(h, table, shift[None, :], norm[:, None], PRECISION, CELLS, FEATURES)
        y = load_counts(dense, stride, rows, cols)
        theta = _load_theta(log_theta, sample, rows[:, None], cols[None, :], num_cells, num_features, SAMPLES) + _FLOOR
        mean = p * size
        entries = y * tl.log((mean + _EPSILON) / (theta + mean + _EPSILON)) - theta * log1p(mean / (theta + _EPSILON))
        entries += log_gamma_difference(theta, y) - log_gamma_difference(1.0, y)
        likelihood += tl.sum(entries, axis=1).to(tl.float64)
        pull += tl.sum(_slopes(p, mean, y, theta), axis=1).to(tl.float64)
    at = part * num_cells + rows
    tl.store(partial + at, likelihood, mask=is_cell)
    tl.store(partial + tl.num_programs(1) * num_cells + at, pull, mask=is_cell)


@triton.jit
def _logit_slopes(p, y, size, theta, weights, pull):
    """d loss / d logits."""
    return weights * (p * pull - size * _slopes(p, p * size, y, theta))


@triton.jit(do_not_specialize=["num_cells"])
def binomial_weight_gradient(
    hidden,
    weight,
    bias,
    dense,
    stride,
    normalizer,
    library,
    log_theta,
    sample,
    cell_weight,
    pulls,
    weight_gradient,
    bias_gradient,
    num_cells,
    num_features,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradients of weight and bias; a program owns its features and writes them once."""
    cols = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    table, shift = load_pieces(weight, cols, num_features, PRECISION, WIDTH), _load_shift(bias, cols, num_features)
    total, of_bias = tl.zeros((FEATURES, WIDTH), tl.float32), tl.zeros((FEATURES,), tl.float64)
    for first in range(0, num_cells, CELLS):
        rows = first + tl.arange(0, CELLS)
        is_cell = rows < num_cells
        h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
        norm = tl.load(normalizer + rows, mask=is_cell, other=1e30)
        p = _shares(table, h, shift[:, None], norm[None, :], PRECISION, FEATURES, CELLS)
        size = tl.load(library + rows, mask=is_cell, other=0.0)
        weights = tl.load(cell_weight + rows, mask=is_cell, other=0.0)
        pull = tl.load(pulls + rows, mask=is_cell, other=0.0)
        theta = _load_theta(log_theta, sample, rows[None, :], cols[:, None], num_cells, num_features, SAMPLES) + _FLOOR
        y = tl.trans(load_counts(dense, stride, rows, cols))
        slopes = _logit_slopes(p, y, size[None, :], theta, weights[None, :], pull[None, :])
        total = add_product(total, cut(slopes, PRECISION), h, PRECISION)
        of_bias += tl.sum(slopes, axis=1).to(tl.float64)
    store_table(weight_gradient, cols, num_features, total, INPUTS, WIDTH)
    tl.store(bias_gradient + cols, of_bias.to(tl.float32), mask=cols < num_features)


@triton.jit(do_not_specialize=["num_cells", "length", "tiles"])
def binomial_hidden_gradient(
    hidden,
    weight,
    bias,
    dense,
    stride,
    normalizer,
    library,
    log_theta,
    sample,
    cell_weight,
    pulls,
    hidden_gradient,
    num_cells,
    num_features,
    length,
    tiles,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradient of the hidden state (splits, B, H) from a range of features."""
    rows, part = tl.program_id(0) * CELLS + tl.arange(0, CELLS), tl.program_id(1)
    is_cell = rows < num_cells
    h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
    size = tl.load(library + rows, mask=is_cell, other=0.0)
    norm = tl.load(normalizer + rows, mask=is_cell, other=1e30)
    weights = tl.load(cell_weight + rows, mask=is_cell, other=0.0)
    pull = tl.load(pulls + rows, mask=is_cell, other=0.0)
    total = tl.zeros((CELLS, WIDTH), tl.float32)
    for tile in range(part * length, tl.minimum(part * length + length, tiles)):
        cols = tile * FEATURES + tl.arange(0, FEATURES)
        table, shift = load_pieces(weight, cols, num_features, PRECISION, WIDTH), _load_shift(bias, cols, num_features)
        p = _shares(h, table, shift[None, :], norm[:, None], PRECISION, CELLS, FEATURES)
        theta = _load_theta(log_theta, sample, rows[:, None], cols[None, :], num_cells, num_features, SAMPLES) + _FLOOR
        y = load_counts(dense, stride, rows, cols)
        slopes = _logit_slopes(p, y, size[:, None], theta, weights[:, None], pull[:, None])
        total = add_product(total, cut(slopes, PRECISION), table, PRECISION)
    store_table(hidden_gradient + part.to(tl.int64) * num_cells * INPUTS, rows, num_cells, total, INPUTS, WIDTH)


@triton.jit(do_not_specialize=["num_cells"])
def binomial_theta_gradient(
    hidden,
    weight,
    bias,
    dense,
    stride,
    normalizer,
    library,
    log_theta,
    sample,
    cell_weight,
    pulls,
    order,
    starts,
    theta_gradient,
    num_cells,
    num_features,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradient of log_theta; a program owns its features of one sample, whose cells stand side by side in `order`."""
    cols, own = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES), tl.program_id(1)
    is_feature = cols < num_features
    table, shift = load_pieces(weight, cols, num_features, PRECISION, WIDTH), _load_shift(bias, cols, num_features)
    columns = SAMPLES if SAMPLES > 0 else 1
    at = cols.to(tl.int64) * columns + own
    above = tl.exp(tl.load(log_theta + at, mask=is_feature, other=0.0))
    theta = (above + _FLOOR)[:, None]
    total = tl.zeros((FEATURES,), tl.float64)
    end = tl.load(starts + own + 1)
    for first in range(tl.load(starts + own), end, CELLS):
        place = first + tl.arange(0, CELLS)
        is_cell = place < end
        rows = tl.load(order + place, mask=is_cell, other=num_cells)
        h = load_pieces(hidden, rows, num_cells, PRECISION, WIDTH)
        norm = tl.load(normalizer + rows, mask=is_cell, other=1e30)
        p = _shares(table, h, shift[:, None], norm[None, :], PRECISION, FEATURES, CELLS)
        mean = p * tl.load(library + rows, mask=is_cell, other=0.0)[None, :]
        here = dense + rows.to(tl.int64)[None, :] * stride + cols[:, None]
        y = tl.load(here, mask=is_cell[None, :], other=0).to(tl.float32)
        ratio = mean / (theta + _EPSILON)
        slopes = theta * ratio / (theta + mean + _EPSILON) - log1p(ratio)
        slopes += digamma_difference(theta, y) - y / (theta + mean + _EPSILON)
        weights = tl.load(cell_weight + rows, mask=is_cell, other=0.0)
        total -= tl.sum(weights[None, :] * slopes, axis=1).to(tl.float64)
    tl.store(theta_gradient + at, (total * above).to(tl.float32), mask=is_feature)
