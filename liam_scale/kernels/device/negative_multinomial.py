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
from liam_scale.kernels.device.products import multiply
from liam_scale.kernels.device.sparse import (
    cell_of_entries,
    entries,
    feature_of_entries,
    product,
    subtract_transposed_product,
    transposed_product,
    with_transpose,
)
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import Precision, SizedLayer
from liam_scale.kernels.reference import ORIGINAL_EPSILON
from liam_scale.kernels.terms import Cells, Coupling, InputGradients, Terms, coupled_terms, per_cell_terms
from loaders.minibatch import SparseCounts


@dataclass(frozen=True)
class Walker:
    """An output layer cut into tiles.

    Attributes
    ----------
    layer
        Detached; counts in the weight's dtype.
    tile_bytes
        Bound on temporaries.
    is_bf16
        Products in bfloat16.
    """

    layer: SizedLayer
    tile_bytes: int
    is_bf16: bool

    def tiles(self) -> Iterator[slice]:
        cells, features = len(self.layer.hidden), len(self.layer.weight)
        tile = max(1, self.tile_bytes // (4 * max(1, cells) * self.layer.weight.element_size()))
        for first in range(0, features, tile):
            yield slice(first, min(first + tile, features))

    def logits(self, features: slice) -> Tensor:
        """(B, T)."""
        layer = self.layer
        logits = multiply(layer.hidden, layer.weight[features].T, is_bf16=self.is_bf16).add_(layer.bias[features])
        return logits.addcmul_(layer.library[:, None], layer.library_weight[features])


def _normalizer(walker: Walker) -> Tensor:
    """(B,) float64 log(1 + sum_f exp l_f)."""
    result = torch.zeros(len(walker.layer.hidden), dtype=torch.float64, device=walker.layer.hidden.device)
    for features in walker.tiles():
        result = torch.logaddexp(result, torch.logsumexp(walker.logits(features), dim=1).double())
    return result


def _linear_fit(walker: Walker) -> Tensor:
    """(B,) float64 sum_f y_f l_f = h . (Y W) + library Y w + Y b."""
    layer = walker.layer
    fit = (product(layer.counts, layer.weight).double() * layer.hidden.double()).sum(dim=1)
    shift, slope = product(layer.counts, torch.stack([layer.bias, layer.library_weight], dim=1)).double().unbind(dim=1)
    return fit + layer.library.double() * slope + shift


def _original_fit(walker: Walker, normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) sum_f y_f log(p_f + eps), and (B,) its slope."""
    counts = walker.layer.counts
    cells = cell_of_entries(counts)
    p = torch.exp(_entry_logits(walker, cells, counts.indices.long()).double() - normalizer[cells])
    slopes = counts.values.double() * p / (p + ORIGINAL_EPSILON)
    fits = counts.values.double() * torch.log(p + ORIGINAL_EPSILON)
    # unsafe: a check of the lengths would wait for the device
    lengths = (counts.indptr[1:] - counts.indptr[:-1]).long()
    sums = torch.segment_reduce(
        torch.stack([fits, slopes], dim=1), "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True
    )
    fit, slope = sums.unbind(dim=1)
    return fit, slope


def _original_slopes(walker: Walker, normalizer: Tensor) -> SparseCounts:
    """The counts with y p / (p + eps) in their place, which is the slope of the original's fit."""
    counts = with_transpose(walker.layer.counts)
    assert counts.cells is not None
    assert counts.feature_values is not None

    def slopes(values: Tensor, cells: Tensor, features: Tensor) -> Tensor:
        p = torch.exp(_entry_logits(walker, cells, features).double() - normalizer[cells])
        return (values.double() * p / (p + ORIGINAL_EPSILON)).to(values.dtype)

    by_cell = slopes(counts.values, cell_of_entries(counts), counts.indices.long())
    by_feature = slopes(counts.feature_values, counts.cells.long(), feature_of_entries(counts))
    return replace(counts, values=by_cell, feature_values=by_feature)


def _entry_logits(walker: Walker, cells: Tensor, features: Tensor) -> Tensor:
    """(N,) logit of each entry, in pieces: gathering both rows of all entries at once would take N x 2H floats."""
    layer = walker.layer
    piece = max(1, walker.tile_bytes // (4 * layer.weight.shape[1] * layer.weight.element_size()))
    result = layer.bias[features] + layer.library[cells] * layer.library_weight[features]
    for first in range(0, len(cells), piece):
        c, f = cells[first : first + piece], features[first : first + piece]
        result[first : first + piece] += (layer.hidden[c] * layer.weight[f]).sum(dim=1)
    return result


def _second_walk(
    walker: Walker, normalizer: Tensor, scale: Tensor, slopes: SparseCounts, targets: Targets
) -> InputGradients:
    """Fill the gradients of weight, bias and library weight; returns those of the inputs."""
    layer, (weight_gradient, bias_gradient, library_weight_gradient) = walker.layer, targets.tensors
    hidden_gradient, library_gradient = torch.zeros_like(layer.hidden), torch.zeros_like(layer.library)
    shift, scale = normalizer.to(layer.weight.dtype), scale.to(layer.weight.dtype)
    for features in walker.tiles():
        slope = softmax_slopes(walker.logits(features), shift, scale)
        bias_gradient[features] = slope.sum(dim=0)
        weight_gradient[features] = multiply(slope.T, layer.hidden, is_bf16=walker.is_bf16)
        hidden_gradient += multiply(slope, layer.weight[features], is_bf16=walker.is_bf16)
        # sums and not products: tf32 would be off by the size of the cell times 2^-11
        library_weight_gradient[features] = (slope * layer.library[:, None]).sum(dim=0)
        library_gradient += (slope * layer.library_weight[features]).sum(dim=1)
    weights = layer.cell_weight[:, None]
    subtract_transposed_product(weight_gradient, slopes, weights * layer.hidden, walker.tile_bytes)
    factors = torch.cat([weights, weights * layer.library[:, None]], dim=1)
    bias, library_weight = transposed_product(slopes, factors).unbind(dim=1)
    bias_gradient -= bias
    library_weight_gradient -= library_weight
    hidden_gradient -= weights * product(slopes, layer.weight)
    library_gradient -= layer.cell_weight * product(slopes, layer.library_weight[:, None])[:, 0]
    return InputGradients(hidden_gradient, library_gradient)


def evaluate(
    layer: SizedLayer,
    r: Tensor,
    coupling: Coupling | None,
    precision: Precision,
    tile_bytes: int,
    targets: Targets | None,
) -> tuple[Terms, InputGradients]:
    """Terms of all cells, and the gradients of the inputs; fills the targets."""
    counts = entries(layer.counts, layer.weight.dtype)
    walker = Walker(replace(layer, counts=counts), tile_bytes, precision == "bf16")
    cells = Cells(layer.counts.totals().double(), r.double(), layer.cell_weight.double())
    normalizer = _normalizer(walker)
    if coupling is None:
        terms = per_cell_terms(cells, _linear_fit(walker), normalizer)
    else:
        terms = coupled_terms(cells, *_original_fit(walker, normalizer), normalizer, coupling)
    if targets is None:
        return terms, InputGradients(torch.zeros_like(layer.hidden), torch.zeros_like(layer.library))
    slopes = counts if coupling is None else _original_slopes(walker, normalizer)
    return terms, _second_walk(walker, normalizer, terms.scale, slopes, targets)
