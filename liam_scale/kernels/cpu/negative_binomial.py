"""The fused negative binomial on the CPU: cells in groups whose softmax over all features fits into memory.

Per group three walks over tiles of features: exponentials and their sums; log-likelihood, slopes in theta, and the
sum over features that the softmax's gradient needs; gradients of weight, bias and hidden state. The dense part of an
entry is - theta log1p(mu / (theta + eps)), one logarithm; gamma functions are met at the non-zeros only.

Shapes: B cells, C cells of a group, F features, H hidden units, S samples (1 if theta is common), T features of a tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liam_scale.kernels.cpu import threads
from liam_scale.kernels.cpu.softmax_tiles import (
    Cache,
    TiledLayer,
    as_array,
    augmented,
    exponentiate,
    gradient_products,
    make_cache,
    merge,
    tile_features,
)
from liam_scale.kernels.cpu.sparse import by_feature
from liam_scale.kernels.cpu.vector_math import FAST_MATH, count_terms, log
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import OutputLayer, Precision
from liam_scale.kernels.reference import NB_EPSILON, THETA_FLOOR
from loaders.csr import compiled


@dataclass(frozen=True)
class Group(TiledLayer):
    """Some cells of a minibatch, and the output layer.

    Attributes
    ----------
    slope_theta
        (F, S) exp(log_theta): theta without its floor, and d theta / d log_theta.
    sample
        (C,) int64 column of slope_theta.
    library, cell_weight
        (C,) in the weight's dtype.
    """

    slope_theta: Tensor
    sample: Tensor
    library: Tensor
    cell_weight: Tensor


@dataclass(frozen=True)
class Softmax:
    """(tiles, T, C) exponentials, and (C,) float64 logarithm of their sum over all features."""

    cache: Cache
    normalizer: Tensor

    def scale(self, tile: int) -> Tensor:
        """(C,) factor that makes a tile's exponentials probabilities."""
        return torch.exp(self.cache.maxima[tile].double() - self.normalizer).to(self.cache.maxima.dtype)


@dataclass(frozen=True)
class Sums:
    """Per cell, (C,) float64: log-likelihood, and sum over features of mu * d ll / d mu."""

    log_likelihood: Tensor
    pull: Tensor


def _cells_at_once(num_cells: int, layer_weight: Tensor, tile_bytes: int) -> int:
    """Cells of a group, so that softmax and tiles stay below tile_bytes (at least one cell)."""
    features, width = layer_weight.shape
    item = layer_weight.element_size()
    tile = tile_features(num_cells, features)
    # beside the softmax a worker holds logits, slopes and their bfloat16 copy, and two results of products
    by_worker = 3 * tile + 2 * (width + 1)
    fixed = threads.num_workers() * 2 * tile * (width + 1) * item
    return max(1, min(num_cells, (tile_bytes - fixed) // (item * (features + threads.num_workers() * by_worker))))


def _softmax(group: Group) -> Softmax:
    """First walk."""
    dtype, cells = group.weight.dtype, group.num_cells
    cache = make_cache(group.num_tiles, group.tile, cells, dtype, dtype, 2**62)
    num = max(1, min(threads.num_workers(), group.num_tiles))
    maxima, sums = np.full((num, cells), -np.inf), np.zeros((num, cells))
    tasks = [
        functools.partial(_exponential_tiles, group, range(k, group.num_tiles, num), cache, maxima[k], sums[k])
        for k in range(num)
    ]
    threads.run(tasks)
    normalizer = torch.logsumexp(torch.from_numpy(maxima) + torch.from_numpy(sums).log(), dim=0)
    return Softmax(cache, normalizer)


def _exponential_tiles(group: Group, tiles: range, cache: Cache, total_maxima: Any, total_sums: Any) -> None:
    sums, part = (np.empty(group.num_cells, as_array(group.bias).dtype) for _ in range(2))
    for tile in tiles:
        features = group.features(tile)
        logits = group.product(features).to(group.weight.dtype).numpy()
        maxima = cache.maxima[tile].numpy()
        exponentiate(logits, group.bias[features].numpy(), cache.exponentials[tile].numpy(), maxima, sums, part)
        merge(maxima, sums, total_maxima, total_sums)


def _likelihood(group: Group, found: Softmax, theta_gradient: Tensor | None) -> Sums:
    """Second walk; adds to d loss / d log_theta (F, S) where asked for."""
    num = max(1, min(threads.num_workers(), group.num_tiles))
    sums = np.zeros((num, 2, group.num_cells))
    slopes = torch.empty(0, group.slope_theta.shape[1], dtype=group.weight.dtype)
    target = slopes if theta_gradient is None else theta_gradient
    tasks = [
        functools.partial(_likelihood_tiles, group, range(k, group.num_tiles, num), found, sums[k], target)
        for k in range(num)
    ]
    threads.run(tasks)
    total = torch.from_numpy(sums.sum(axis=0))
    return Sums(total[0], total[1])


def _likelihood_tiles(group: Group, tiles: range, found: Softmax, sums: Any, theta_gradient: Tensor) -> None:
    entries, dtype = group.entries, as_array(group.bias).dtype
    rows = np.empty((5, group.num_cells), dtype)
    for tile in tiles:
        features = group.features(tile)
        _likelihood_tile(
            found.cache.exponentials[tile].numpy(),
            (found.scale(tile) * group.library).numpy(),
            group.slope_theta.numpy(),
            group.sample.numpy(),
            group.cell_weight.numpy(),
            entries.indptr,
            entries.cells,
            entries.values,
            group.column,
            features.start,
            features.stop,
            rows,
            sums,
            theta_gradient.numpy(),
        )


@compiled(fastmath=FAST_MATH, error_model="numpy")
def _likelihood_tile(
    exponentials: Any,
    scale: Any,
    slope_theta: Any,
    sample: Any,
    cell_weight: Any,
    indptr: Any,
    cells: Any,
    values: Any,
    column: Any,
    first: int,
    last: int,
    rows: Any,
    sums: Any,
    theta_gradient: Any,
) -> None:
    """A tile's part of the log-likelihood, of sum mu d ll / d mu, and of d loss / d log_theta."""
    number = exponentials.dtype.type
    one, epsilon, floor = number(1), number(NB_EPSILON), number(THETA_FLOOR)
    num_cells = exponentials.shape[1]
    theta, inverse, slope, fit, pull = rows[0], rows[1], rows[2], rows[3], rows[4]
    for b in range(num_cells):
        fit[b] = 0
        pull[b] = 0
    for f in range(first, last):
        for b in range(num_cells):
            theta[b] = slope_theta[f, sample[b]] + floor
        for b in range(num_cells):
            inverse[b] = one / (theta[b] + epsilon)
        for b in range(num_cells):
            mean = exponentials[f - first, b] * scale[b]
            ratio = mean * inverse[b]
            raised = one + ratio
            share = one / raised
            # log1p: the logarithm of the rounded 1 + ratio, put right by what rounding took away
            log_raised = log(raised) - ((raised - one) - ratio) * share
            part = ratio * share
            fit[b] -= theta[b] * log_raised
            pull[b] -= theta[b] * part
            slope[b] = theta[b] * inverse[b] * part - log_raised
        for j in range(np.uint64(indptr[f]), np.uint64(indptr[f + 1])):
            place = column[np.uint64(cells[j])]
            if place < 0:
                continue
            at = np.uint64(place)
            mean = np.float64(exponentials[f - first, at] * scale[at])
            x, shape = np.float64(values[j]), np.float64(theta[at])
            both = 1.0 / (shape + mean + NB_EPSILON)
            constant, theta_slope = count_terms(x, shape)
            sums[0, at] += x * math.log((mean + NB_EPSILON) * both) + constant
            sums[1, at] += x * (mean / (mean + NB_EPSILON) - mean * both)
            slope[at] += number(theta_slope - x * both)
        if len(theta_gradient) > 0:
            for b in range(num_cells):
                s = sample[b]
                theta_gradient[f, s] -= cell_weight[b] * slope[b] * slope_theta[f, s]
        if (f - first) % 32 == 31 or f == last - 1:
            for b in range(num_cells):
                sums[0, b] += fit[b]
                sums[1, b] += pull[b]
                fit[b] = 0
                pull[b] = 0


def _gradients(
    group: Group, found: Softmax, sums: Sums, weight_gradient: Tensor, bias_gradient: Tensor, *, is_first: bool
) -> Tensor:
    """Third walk: write (first group) or add the gradients of weight and bias; returns (C, H) of the hidden state."""
    num = max(1, min(threads.num_workers(), group.num_tiles))
    hidden = torch.zeros(num, group.weight.shape[1], group.num_cells, dtype=group.weight.dtype)
    tasks = [
        functools.partial(
            _gradient_tiles,
            group,
            range(k, group.num_tiles, num),
            found,
            sums,
            weight_gradient,
            bias_gradient,
            hidden[k],
            is_first,
        )
        for k in range(num)
    ]
    threads.run(tasks)
    return hidden.sum(dim=0).T


def _gradient_tiles(
    group: Group,
    tiles: range,
    found: Softmax,
    sums: Sums,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    hidden: Tensor,
    is_first: bool,
) -> None:
    dtype, width, entries = group.weight.dtype, group.weight.shape[1], group.entries
    hidden_T, stored = augmented(group.hidden), torch.bfloat16 if group.is_bf16 else dtype
    plain = threads.workspace("slopes", (group.tile, group.num_cells), dtype)
    rows = np.empty((2, group.num_cells), as_array(group.bias).dtype)
    pull = sums.pull.to(dtype).numpy()
    for tile in tiles:
        features = group.features(tile)
        weight = group.weight[features]
        slopes = plain[: len(weight)]
        _slope_tile(
            found.cache.exponentials[tile].numpy(),
            found.scale(tile).numpy(),
            group.library.numpy(),
            group.slope_theta.numpy(),
            group.sample.numpy(),
            group.cell_weight.numpy(),
            pull,
            entries.indptr,
            entries.cells,
            entries.values,
            group.column,
            features.start,
            rows,
            slopes.numpy(),
        )
        product, part = gradient_products(slopes.to(stored), hidden_T, weight)
        hidden += part.to(dtype)
        if is_first:
            weight_gradient[features] = product[:, :width]
            bias_gradient[features] = product[:, width]
        else:
            weight_gradient[features] += product[:, :width]
            bias_gradient[features] += product[:, width]


@compiled(fastmath=FAST_MATH, error_model="numpy")
def _slope_tile(
    exponentials: Any,
    scale: Any,
    library: Any,
    slope_theta: Any,
    sample: Any,
    cell_weight: Any,
    pull: Any,
    indptr: Any,
    cells: Any,
    values: Any,
    column: Any,
    first: int,
    rows: Any,
    slopes: Any,
) -> None:
    """slopes[t, b] = d loss / d logit = - cell weight * (mu d ll / d mu - probability * its sum over features)."""
    number = exponentials.dtype.type
    one, epsilon, floor = number(1), number(NB_EPSILON), number(THETA_FLOOR)
    num_cells = exponentials.shape[1]
    theta, inverse = rows[0], rows[1]
    for t in range(len(slopes)):
        f = first + t
        for b in range(num_cells):
            theta[b] = slope_theta[f, sample[b]] + floor
        for b in range(num_cells):
            inverse[b] = one / (theta[b] + epsilon)
        for b in range(num_cells):
            probability = exponentials[t, b] * scale[b]
            ratio = probability * library[b] * inverse[b]
            dense = theta[b] * ratio / (one + ratio)
            slopes[t, b] = cell_weight[b] * (dense + probability * pull[b])
        for j in range(np.uint64(indptr[f]), np.uint64(indptr[f + 1])):
            place = column[np.uint64(cells[j])]
            if place < 0:
                continue
            at = np.uint64(place)
            mean = np.float64(exponentials[t, at] * scale[at] * library[at])
            pulled = mean / (mean + NB_EPSILON) - mean / (np.float64(theta[at]) + mean + NB_EPSILON)
            slopes[t, at] -= number(cell_weight[at] * np.float64(values[j]) * pulled)


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
    num_cells, dtype = layer.counts.num_cells, layer.weight.dtype
    slope_theta = torch.exp(log_theta if log_theta.dim() == 2 else log_theta[:, None]).contiguous()
    sample = sample if log_theta.dim() == 2 else torch.zeros(num_cells, dtype=torch.int64)
    entries = by_feature(layer.counts, dtype)
    chosen = layer.cell_weight.nonzero()[:, 0]  # the others have no part in the loss
    log_likelihood = torch.zeros(num_cells, dtype=torch.float64)
    hidden_gradient, library_gradient = torch.zeros_like(layer.hidden), torch.zeros_like(library)
    theta_gradient = None
    if targets is not None:
        theta_gradient = targets.tensors[2].zero_().view(slope_theta.shape)
        if not len(chosen):
            targets.tensors[0].zero_()
            targets.tensors[1].zero_()
    at_once = _cells_at_once(len(chosen), layer.weight, tile_bytes)
    for first, cells in enumerate(chosen.split(at_once) if len(chosen) else ()):
        column = np.full(num_cells, -1, np.int32)
        column[cells.numpy()] = np.arange(len(cells), dtype=np.int32)
        tiled = (entries, column, layer.hidden[cells], layer.weight, layer.bias, precision == "bf16")
        group = Group(*tiled, slope_theta, sample[cells], library[cells], layer.cell_weight[cells])
        found = _softmax(group)
        sums = _likelihood(group, found, theta_gradient)
        log_likelihood[cells] = sums.log_likelihood
        if targets is not None:
            library_gradient[cells] = (-group.cell_weight * sums.pull / group.library).to(dtype)
            hidden_gradient[cells] = _gradients(group, found, sums, *targets.tensors[:2], is_first=first == 0)
    return log_likelihood, hidden_gradient, library_gradient
