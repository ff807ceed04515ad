"""The fused negative multinomial on the CPU: two walks over tiles of features, logits never stored as a whole.

First walk: logits of a tile (product 1), what the non-zeros need of them, maximum, exponentials, sum. Then L and all
that hangs on it, per cell. Second walk: exponentials (kept, or made again), gradient of the tile's weights
(product 2) with the softmax's scale folded into the small hidden matrix, gradient of the hidden state (product 3), and
the non-zeros' part of both while the tile's rows are in cache.

Shapes: B cells, C cells that count, F features, H hidden units, N non-zeros, T features of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    probabilities,
)
from liam_scale.kernels.cpu.sparse import by_feature
from liam_scale.kernels.cpu.vector_math import FAST_MATH, load
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import Precision, SizedLayer
from liam_scale.kernels.reference import ORIGINAL_EPSILON
from liam_scale.kernels.terms import Cells, Coupling, InputGradients, Terms, coupled_terms, per_cell_terms
from loaders.csr import compiled


@dataclass(frozen=True)
class Layer(TiledLayer):
    """The layer of the negative multinomial, which also reads the size of the cell.

    Attributes
    ----------
    library, library_weight
        (C,), (F,).
    """

    library: Tensor
    library_weight: Tensor

    def logits(self, features: slice) -> Tensor:
        """(T, C), without the bias; good until this thread's next call."""
        product, weight = self.product(features), self.library_weight[features].numpy()
        if not self.is_bf16:
            _add_library(product.numpy(), weight, self.library.numpy())
            return product
        logits = threads.workspace("logits", product.shape, self.weight.dtype)
        _widen_and_add_library(as_array(product), weight, self.library.numpy(), logits.numpy())
        return logits

    def scratch_bytes(self, *, with_entries: bool) -> int:
        """What the walks allocate beside the cache."""
        width = self.weight.shape[1] + 1
        elements = threads.num_workers() * (2 * self.tile * (self.num_cells + width) + 3 * self.num_cells * width)
        noted = len(self.entries.cells) if with_entries else 0
        return (elements + noted) * self.weight.dtype.itemsize


@compiled(fastmath=FAST_MATH)
def _add_library(logits: Any, weight: Any, library: Any) -> None:
    """In place, for 0.8 ms of the 97: a 129th input of the product would cost as much and break its alignment."""
    for t in range(len(logits)):
        for c in range(len(library)):
            logits[t, c] += weight[t] * library[c]


@compiled(fastmath=FAST_MATH)
def _widen_and_add_library(product: Any, weight: Any, library: Any, logits: Any) -> None:
    for t in range(len(logits)):
        for c in range(len(library)):
            logits[t, c] = load(product, t, c) + weight[t] * library[c]


@dataclass(frozen=True)
class Normalizers:
    """First walk's result.

    Attributes
    ----------
    normalizer
        (C,) float64 L = log(1 + sum_f exp l_f).
    fit
        (C,) float64 sum_f y_f l_f.
    at_entries
        (N,) logit of each non-zero where asked for, else empty.
    cache
        Exponentials of the first tiles.
    """

    normalizer: Tensor
    fit: Tensor
    at_entries: Any
    cache: Cache


def _first_walk(layer: Layer, *, cache_bytes: int, with_entries: bool) -> Normalizers:
    """Normalisers of all cells; keeps the exponentials of as many tiles as fit into cache_bytes."""
    dtype, cells = layer.weight.dtype, layer.num_cells
    stored = torch.bfloat16 if layer.is_bf16 else dtype
    cache = make_cache(layer.num_tiles, layer.tile, cells, dtype, stored, cache_bytes)
    at_entries = np.empty(len(layer.entries.cells) if with_entries else 0, layer.entries.values.dtype)
    num = max(1, min(threads.num_workers(), layer.num_tiles))
    maxima, sums, fit = np.zeros((num, cells)), np.zeros((num, cells)), np.zeros((num, cells))
    threads.run(
        [
            functools.partial(
                _first_tiles, layer, range(k, layer.num_tiles, num), cache, at_entries, maxima[k], sums[k], fit[k]
            )
            for k in range(num)
        ]
    )
    # the reference class has logit 0
    by_worker = torch.from_numpy(maxima) + torch.from_numpy(sums).log()
    normalizer = torch.logsumexp(torch.cat([by_worker, by_worker.new_zeros(1, cells)]), dim=0)
    return Normalizers(normalizer, torch.from_numpy(fit.sum(axis=0)), at_entries, cache)


def _first_tiles(
    layer: Layer, tiles: range, cache: Cache, at_entries: Any, total_maxima: Any, total_sums: Any, fit: Any
) -> None:
    sums, part, scratch_maxima = (np.empty(layer.num_cells, layer.entries.values.dtype) for _ in range(3))
    # exponentials go to other memory than the logits: with both in one array the loop does not vectorise (31 for 4 ms)
    scratch = threads.workspace("first tiles", (layer.tile, layer.num_cells), layer.weight.dtype).numpy()
    entries, bias = layer.entries, layer.bias.numpy()
    for tile in tiles:
        features = layer.features(tile)
        logits = layer.logits(features).numpy()
        _read_entries(
            logits, bias, entries.indptr, entries.cells, entries.values, layer.column, features.start, fit, at_entries
        )
        is_kept = tile < cache.num_tiles
        kept = as_array(cache.exponentials[tile]) if is_kept else scratch
        maxima = cache.maxima[tile].numpy() if is_kept else scratch_maxima
        exponentiate(logits, bias[features], kept, maxima, sums, part)
        merge(maxima, sums, total_maxima, total_sums)


@compiled(fastmath=FAST_MATH)
def _read_entries(
    logits: Any, bias: Any, indptr: Any, cells: Any, values: Any, column: Any, first: int, fit: Any, at_entries: Any
) -> None:
    """Add a tile's part of sum_f y_f l_f; note the logits of its non-zeros where at_entries is not empty."""
    is_noted = len(at_entries) > 0
    for t in range(len(logits)):
        f = np.uint64(first + t)
        for j in range(np.uint64(indptr[f]), np.uint64(indptr[f + np.uint64(1)])):
            place = column[np.uint64(cells[j])]
            if place < 0:
                continue
            logit = logits[t, np.uint64(place)] + bias[f]
            fit[np.uint64(place)] += np.float64(values[j]) * np.float64(logit)
            if is_noted:
                at_entries[j] = logit


def _original_fit(layer: Layer, found: Normalizers) -> tuple[Tensor, Tensor, Any]:
    """(C,) sum_f y_f log(p_f + eps), (C,) its slope, and (N,) y p / (p + eps) of each non-zero."""
    fit, fit_slope = np.zeros(layer.num_cells), np.zeros(layer.num_cells)
    entries, normalizer = layer.entries, found.normalizer.numpy()
    _fit_original(entries.cells, entries.values, layer.column, found.at_entries, normalizer, fit, fit_slope)
    return torch.from_numpy(fit), torch.from_numpy(fit_slope), found.at_entries


@compiled
def _fit_original(
    cells: Any, values: Any, column: Any, at_entries: Any, normalizer: Any, fit: Any, fit_slope: Any
) -> None:
    """sum_f y_f log(p_f + eps), its slope, and per non-zero y p / (p + eps), which replaces the logit noted there."""
    for j in range(len(cells)):
        place = column[np.uint64(cells[j])]
        if place < 0:
            continue
        p = np.exp(np.float64(at_entries[j]) - normalizer[place])
        slope = values[j] * p / (p + ORIGINAL_EPSILON)
        fit[place] += values[j] * np.log(p + ORIGINAL_EPSILON)
        fit_slope[place] += slope
        at_entries[j] = slope


@dataclass(frozen=True)
class Slopes:
    """What the second walk multiplies with.

    Attributes
    ----------
    scale
        (C,) d loss / d L.
    coefficients
        (N,) slope of the fit in the logit of each non-zero: the count itself, or the original's y p / (p + eps).
    cell_weight
        (C,) weight of each cell.
    """

    scale: Tensor
    coefficients: Any
    cell_weight: Tensor


def _second_walk(layer: Layer, found: Normalizers, slopes: Slopes, written: Sequence[Tensor]) -> InputGradients:
    """Fill `written`, the gradients of weight, bias and library weight; returns those of the inputs of the C cells."""
    width, cells, dtype = layer.weight.shape[1], layer.num_cells, layer.weight.dtype
    num = max(1, min(threads.num_workers(), layer.num_tiles))
    dense, sparse = torch.zeros(num, width, cells, dtype=dtype), torch.zeros(num, cells, width, dtype=dtype)
    # float64: the part of the softmax and that of the counts, each thousands of times their difference, cancel
    library = torch.zeros(num, cells, dtype=torch.float64)
    threads.run(
        [
            functools.partial(
                _second_tiles,
                layer,
                range(k, layer.num_tiles, num),
                found,
                slopes,
                written,
                dense[k],
                sparse[k],
                library[k],
            )
            for k in range(num)
        ]
    )
    return InputGradients(dense.sum(dim=0).T + sparse.sum(dim=0), library.sum(dim=0).to(dtype))


def _second_tiles(
    layer: Layer,
    tiles: range,
    found: Normalizers,
    slopes: Slopes,
    written: Sequence[Tensor],
    dense: Tensor,
    sparse: Tensor,
    library_gradient: Tensor,
) -> None:
    dtype, entries = layer.weight.dtype, layer.entries
    normalizer, weights = found.normalizer.to(dtype), slopes.cell_weight.to(dtype).numpy()
    inputs_T = augmented(layer.hidden, layer.library)
    arrays = (layer.hidden.numpy(), layer.library.numpy(), sparse.numpy(), library_gradient.numpy())
    pulled, pull_part = np.empty(layer.num_cells), np.empty(layer.num_cells, entries.values.dtype)
    for tile in tiles:
        features = layer.features(tile)
        weight, library_weight = layer.weight[features], layer.library_weight[features].numpy()
        if tile < found.cache.num_tiles:
            kept = found.cache.exponentials[tile, : len(weight)]
            scale = slopes.scale * torch.exp(found.cache.maxima[tile].double() - found.normalizer)
        else:
            kept, scale = _made_again(layer, features, normalizer), slopes.scale
        _pull(as_array(kept), library_weight, pull_part, pulled)
        library_gradient.addcmul_(torch.from_numpy(pulled), scale)
        scale = scale.to(dtype)
        product, part = gradient_products(kept, inputs_T * scale, weight)
        dense.addcmul_(part.to(dtype), scale)
        _write_tile(
            as_array(product),
            weight.numpy(),
            library_weight,
            entries.indptr,
            entries.cells,
            slopes.coefficients,
            layer.column,
            weights,
            *arrays,
            features.start,
            *(gradient[features].numpy() for gradient in written),
        )


@compiled(fastmath=FAST_MATH)
def _pull(kept: Any, weight: Any, part: Any, pulled: Any) -> None:
    """pulled[c] = sum over the tile of exponential times library weight, in float64 after every 32 features."""
    for c in range(len(pulled)):
        pulled[c] = 0
    for first in range(0, len(weight), 32):
        for c in range(len(part)):
            part[c] = 0
        for t in range(first, min(first + 32, len(weight))):
            for c in range(len(part)):
                part[c] += weight[t] * load(kept, t, c)
        for c in range(len(part)):
            pulled[c] += part[c]


def _made_again(layer: Layer, features: slice, normalizer: Tensor) -> Tensor:
    logits = layer.logits(features)
    kept = threads.workspace("second tiles", logits.shape, torch.bfloat16 if layer.is_bf16 else logits.dtype)
    probabilities(logits.numpy(), layer.bias[features].numpy(), normalizer.numpy(), as_array(kept))
    return kept


@compiled(fastmath=FAST_MATH)
def _write_tile(
    product: Any,
    weight: Any,
    library_weight: Any,
    indptr: Any,
    cells: Any,
    coefficients: Any,
    column: Any,
    cell_weight: Any,
    hidden: Any,
    library: Any,
    hidden_gradient: Any,
    library_gradient: Any,
    first: int,
    weight_gradient: Any,
    bias_gradient: Any,
    library_weight_gradient: Any,
) -> None:
    """Gradients of a tile's weights = product - counts^T (weights of the cells * inputs), and the counts' own pull."""
    width = weight.shape[1]
    for t in range(len(weight)):
        row, out = weight[t], weight_gradient[t]
        for h in range(width):
            out[h] = load(product, t, h)
        bias_slope, library_slope = load(product, t, width), load(product, t, width + 1)
        f = np.uint64(first + t)
        for j in range(np.uint64(indptr[f]), np.uint64(indptr[f + np.uint64(1)])):
            place = column[np.uint64(cells[j])]
            if place < 0:
                continue
            at = np.uint64(place)
            source, target = hidden[at], hidden_gradient[at]
            slope = coefficients[j] * cell_weight[at]
            for h in range(width):
                out[h] -= slope * source[h]
                target[h] -= slope * row[h]
            bias_slope -= slope
            library_slope -= slope * library[at]
            library_gradient[at] -= slope * library_weight[t]
        bias_gradient[t] = bias_slope
        library_weight_gradient[t] = library_slope


def evaluate(
    layer: SizedLayer,
    r: Tensor,
    coupling: Coupling | None,
    precision: Precision,
    tile_bytes: int,
    targets: Targets | None,
) -> tuple[Terms, InputGradients]:
    """Terms of all cells, and the gradients of the inputs; fills the targets."""
    num_cells, dtype = layer.counts.num_cells, layer.weight.dtype
    # cells of weight 0 need no logits, except that the original's sums run over all cells
    chosen = torch.arange(num_cells) if coupling is not None else layer.cell_weight.nonzero()[:, 0]
    column = np.full(num_cells, -1, np.int32)
    column[chosen.numpy()] = np.arange(len(chosen), dtype=np.int32)
    walk = Layer(
        entries=by_feature(layer.counts, dtype),
        column=column,
        hidden=layer.hidden[chosen],
        weight=layer.weight,
        bias=layer.bias,
        is_bf16=precision == "bf16",
        library=layer.library[chosen],
        library_weight=layer.library_weight,
    )
    cells = Cells(
        total=layer.counts.totals().double()[chosen],
        r=r.double()[chosen] if r.dim() else r.double(),
        weight=layer.cell_weight.double()[chosen],
    )
    with_entries = coupling is not None
    cache_bytes = tile_bytes - walk.scratch_bytes(with_entries=with_entries) if targets is not None else 0
    found = _first_walk(walk, cache_bytes=cache_bytes, with_entries=with_entries)
    coefficients = walk.entries.values
    if coupling is None:
        terms = per_cell_terms(cells, found.fit, found.normalizer)
    else:
        fit, slope, coefficients = _original_fit(walk, found)
        terms = coupled_terms(cells, fit, slope, found.normalizer, coupling)
    gradients = InputGradients(torch.zeros_like(layer.hidden), torch.zeros_like(layer.library))
    if targets is not None:
        own = _second_walk(walk, found, Slopes(terms.scale, coefficients, cells.weight), targets.tensors)
        gradients.hidden[chosen], gradients.library[chosen] = own.hidden, own.library
    return terms.placed(chosen, num_cells), gradients
