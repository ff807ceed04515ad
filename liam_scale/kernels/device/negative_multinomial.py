"""The negative multinomial by tiles in plain torch, for devices without kernels of their own (CUDA).

The same two walks as on the CPU; nothing is kept between them, no synchronisation with the host.

Shapes: B cells, F features, H hidden units, N non-zeros, T features of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liam_scale.kernels.device.compiled import softmax_slopes
from liam_scale.kernels.device.sparse import (
    cell_of_entries,
    entries,
    product,
    subtract_transposed_product,
    transposed_product,
)
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import OutputLayer, Precision
from liam_scale.kernels.reference import ORIGINAL_EPSILON
from liam_scale.kernels.terms import Cells, Coupling, Terms, coupled_terms, per_cell_terms
from loaders.minibatch import SparseCounts


@dataclass(frozen=True)
class Walker:
    """An output layer cut into tiles.

    Attributes
    ----------
    layer
        Detached; counts in the weight's dtype and with their transpose.
    tile_bytes
        Bound on temporaries.
    is_bf16
        Products of the gradients in bfloat16.
    """

    layer: OutputLayer
    tile_bytes: int
    is_bf16: bool

    def tiles(self) -> Iterator[slice]:
        cells, features = len(self.layer.hidden), len(self.layer.weight)
        tile = max(1, self.tile_bytes // (4 * max(1, cells) * self.layer.weight.element_size()))
        for first in range(0, features, tile):
            yield slice(first, min(first + tile, features))

    def logits(self, features: slice) -> Tensor:
        """(B, T)."""
        return torch.addmm(self.layer.bias[features], self.layer.hidden, self.layer.weight[features].T)


def _normalizer(walker: Walker) -> Tensor:
    """(B,) float64 log(1 + sum_f exp l_f)."""
    result = torch.zeros(len(walker.layer.hidden), dtype=torch.float64, device=walker.layer.hidden.device)
    for features in walker.tiles():
        result = torch.logaddexp(result, torch.logsumexp(walker.logits(features), dim=1).double())
    return result


def _linear_fit(walker: Walker) -> Tensor:
    """(B,) float64 sum_f y_f l_f = h . (Y W) + Y b."""
    layer = walker.layer
    fit = product(layer.counts, layer.weight)
    shift = product(layer.counts, layer.bias[:, None])[:, 0]
    return (fit.double() * layer.hidden.double()).sum(dim=1) + shift.double()


def _original_fit(walker: Walker, normalizer: Tensor) -> tuple[Tensor, Tensor, SparseCounts]:
    """sum_f y_f log(p_f + eps), its slope, and the counts with y p / (p + eps) in their place."""
    layer = walker.layer
    counts = layer.counts
    by_cell = _entry_logits(walker, cell_of_entries(counts), counts.indices.long())
    p = torch.exp(by_cell.double() - normalizer[cell_of_entries(counts)])
    slopes = counts.values.double() * p / (p + ORIGINAL_EPSILON)
    fits = counts.values.double() * torch.log(p + ORIGINAL_EPSILON)
    changed = replace(counts, values=torch.stack([fits, slopes], dim=1))
    fit, slope = _sum_by_cell(changed).unbind(dim=1)
    assert counts.feature_indptr is not None
    assert counts.cells is not None
    assert counts.feature_values is not None
    sizes = (counts.feature_indptr[1:] - counts.feature_indptr[:-1]).long()
    arange = torch.arange(counts.num_features, device=sizes.device)
    features = torch.repeat_interleave(arange, sizes, output_size=len(counts.cells))
    by_feature = _entry_logits(walker, counts.cells.long(), features)
    p = torch.exp(by_feature.double() - normalizer[counts.cells.long()])
    feature_slopes = counts.feature_values.double() * p / (p + ORIGINAL_EPSILON)
    dtype = layer.weight.dtype
    return fit, slope, replace(counts, values=slopes.to(dtype), feature_values=feature_slopes.to(dtype))


def _sum_by_cell(counts: SparseCounts) -> Tensor:
    lengths = (counts.indptr[1:] - counts.indptr[:-1]).long()
    return torch.segment_reduce(counts.values, "sum", lengths=lengths, axis=0, initial=0.0)


def _entry_logits(walker: Walker, cells: Tensor, features: Tensor) -> Tensor:
    """(N,) logit of each entry, in pieces: gathering both rows of all entries at once would take N x 2H floats."""
    layer = walker.layer
    piece = max(1, walker.tile_bytes // (4 * layer.weight.shape[1] * layer.weight.element_size()))
    result = torch.empty(len(cells), dtype=layer.weight.dtype, device=cells.device)
    for first in range(0, len(cells), piece):
        c, f = cells[first : first + piece], features[first : first + piece]
        result[first : first + piece] = (layer.hidden[c] * layer.weight[f]).sum(dim=1) + layer.bias[f]
    return result


def _second_walk(
    walker: Walker,
    normalizer: Tensor,
    scale: Tensor,
    slopes: SparseCounts,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
) -> Tensor:
    """Fill the gradients of weight and bias; returns (B, H) that of the hidden state."""
    layer = walker.layer
    dtype = layer.weight.dtype
    factor = torch.bfloat16 if walker.is_bf16 else dtype
    hidden, hidden_gradient = layer.hidden.to(factor), torch.zeros_like(layer.hidden)
    shift, scale = normalizer.to(dtype), scale.to(dtype)
    for features in walker.tiles():
        slope = softmax_slopes(walker.logits(features), shift, scale)
        bias_gradient[features] = slope.sum(dim=0)
        slope = slope.to(factor)
        weight_gradient[features] = torch.mm(slope.T, hidden).to(dtype)
        hidden_gradient += torch.mm(slope, layer.weight[features].to(factor)).to(dtype)
    weights = layer.cell_weight[:, None]
    subtract_transposed_product(weight_gradient, slopes, weights * layer.hidden, walker.tile_bytes)
    bias_gradient -= transposed_product(slopes, weights)[:, 0]
    return hidden_gradient - weights * product(slopes, layer.weight)


def evaluate(
    layer: OutputLayer,
    r: Tensor,
    coupling: Coupling | None,
    precision: Precision,
    tile_bytes: int,
    targets: Targets | None,
) -> tuple[Terms, Tensor]:
    """The same in plain torch on any device."""
    counts, dtype = entries(layer.counts, layer.weight.dtype), layer.weight.dtype
    tensors = (t.detach() for t in (layer.hidden, layer.weight, layer.bias, layer.cell_weight))
    walker = Walker(OutputLayer(counts, *tensors), tile_bytes, precision == "bf16" and dtype == torch.float32)
    cells = Cells(counts.totals().double(), r.double(), layer.cell_weight.detach().double())
    normalizer = _normalizer(walker)
    if coupling is None:
        slopes, terms = counts, per_cell_terms(cells, _linear_fit(walker), normalizer)
    else:
        fit, slope, slopes = _original_fit(walker, normalizer)
        terms = coupled_terms(cells, fit, slope, normalizer, coupling)
    hidden_gradient = torch.zeros_like(layer.hidden)
    if targets is not None:
        hidden_gradient = _second_walk(walker, normalizer, terms.scale, slopes, *targets.tensors)
    return terms, hidden_gradient
