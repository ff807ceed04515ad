"""Linear output layer + negative-multinomial log-likelihood over sparse counts (ATAC)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from liam_scale.kernels import negative_multinomial_cpu as cpu
from liam_scale.kernels import reference, workers
from liam_scale.kernels.gradients import Formed, attach, checked_buffer
from liam_scale.kernels.negative_multinomial_terms import Cells, Coupling, coupled_terms, per_cell_terms
from liam_scale.kernels.options import (
    TILE_BYTES,
    Impl,
    Likelihood,
    Precision,
    check_choice,
    check_output_layer,
    check_shape,
)
from liam_scale.kernels.sparse_walk import by_feature
from loaders.minibatch import SparseCounts


def negative_multinomial(
    counts: SparseCounts,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    *,
    cell_weight: Tensor,
    likelihood: Likelihood = "per-cell",
    num_global_with: int | None = None,
    num_global: int | None = None,
    cell_scale: float | None = None,
    impl: Impl = "auto",
    precision: Precision = "float32",
    tile_bytes: int = TILE_BYTES,
    grad_buffers: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood of a minibatch, and the log-likelihood of each cell.

    Parameters
    ----------
    counts
        B cells, F features.
    hidden, weight, bias
        (B, H), (F, H), (F,): logits = hidden weight^T + bias. Differentiable.
    r
        (B,) dispersion of each cell, or () one for all ('constant'). Differentiable.
    cell_weight
        (B,) weight of each cell's log-likelihood in the loss; 0 for a cell without the modality.
    likelihood
        `per-cell`: the formula of the paper. `original`: what the published code computes, whose r-terms are summed
        over all cells of the minibatch (docs/kernels.md).
    num_global_with, num_global, cell_scale
        Only for `original` on several ranks: cells with non-zero weight, and cells, of the global minibatch; and the
        weight of a cell that has the modality (a rank may hold none). None: this rank holds the whole minibatch.
    impl, precision, tile_bytes
        See `liam_scale.kernels.options`.
    grad_buffers
        Persistent tensors `weight` (F, H) and `bias` (F,) that the gradients are written into and adopted as
        `.grad`; None: ordinary autograd.

    Returns
    -------
    loss
        Scalar - sum_i cell_weight_i ll_i. For `original` on several ranks the losses of the ranks add up to the
        loss of the global minibatch.
    log_likelihood
        (B,) ll_i, detached; 0 for a cell of weight 0. For `original` its coupled sums run over the cells of this rank.

    Raises
    ------
    ValueError
        A shape, dtype or option does not fit.
    RuntimeError
        A gradient buffer still holds the gradient of an earlier step.
    """
    check_choice("impl", impl, Impl)
    check_choice("likelihood", likelihood, Likelihood)
    check_choice("precision", precision, Precision)
    check_output_layer(counts, hidden, weight, bias, cell_weight)
    if r.dim() > 0:
        check_shape("r", r, (counts.num_cells,))
    coupling = None
    if likelihood == "original":
        share = 1.0 if num_global is None else counts.num_cells / num_global
        coupling = Coupling(_coupling_weight(cell_weight, num_global_with, cell_scale), share)
    if impl == "reference":
        return _reference(counts, hidden, weight, bias, r, cell_weight, coupling)
    return _fused_cpu(counts, hidden, weight, bias, r, cell_weight, coupling, precision, tile_bytes, grad_buffers)


def _coupling_weight(cell_weight: Tensor, num_global_with: int | None, cell_scale: float | None) -> Tensor:
    """Sum of the weights of all cells of the global minibatch: the weight of the original's coupled terms."""
    if num_global_with is None:
        return cell_weight.sum()
    if cell_scale is not None:
        return cell_weight.new_tensor(num_global_with * cell_scale)
    return num_global_with * cell_weight.amax() if len(cell_weight) else cell_weight.sum()


def _reference(
    counts: SparseCounts,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    cell_weight: Tensor,
    coupling: Coupling | None,
) -> tuple[Tensor, Tensor]:
    dense = counts.to_dense().to(weight.dtype)
    logits = reference.linear_logits(hidden, weight, bias)
    if coupling is None:
        log_likelihood = reference.negative_multinomial(dense, logits, r)
        loss = -(cell_weight * log_likelihood).sum()
    else:
        own, zero, gamma = reference.original_terms(dense, logits, r)
        share = 1.0 if r.dim() > 0 else coupling.share
        loss = -(cell_weight * own).sum() - coupling.weight * (zero.sum() - share * gamma.sum())
        log_likelihood = own + zero.sum() - gamma.sum()
    return loss, torch.where(cell_weight != 0, log_likelihood.detach(), 0)


def _fused_cpu(
    counts: SparseCounts,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    cell_weight: Tensor,
    coupling: Coupling | None,
    precision: Precision,
    tile_bytes: int,
    grad_buffers: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    inputs = (hidden, weight, bias, r)
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    buffers = [checked_buffer(grad_buffers, "weight", weight), checked_buffer(grad_buffers, "bias", bias)]
    with torch.no_grad():
        # cells of weight 0 need no logits, except that the original's sums run over all cells
        chosen = torch.arange(counts.num_cells) if coupling is not None else cell_weight.nonzero()[:, 0]
        column = np.full(counts.num_cells, -1, np.int32)
        column[chosen.numpy()] = np.arange(len(chosen), dtype=np.int32)
        layer = cpu.Layer(
            entries=by_feature(counts, weight.dtype),
            column=column,
            hidden=hidden.detach()[chosen],
            weight=weight.detach().contiguous(),
            bias=bias.detach().contiguous(),
            is_bf16=cpu.allows_bf16(precision, weight.dtype),
        )
        cells = Cells(
            total=counts.totals().double()[chosen],
            r=r.detach().double()[chosen] if r.dim() else r.detach().double(),
            weight=cell_weight.detach().double()[chosen],
        )
        cache_bytes = tile_bytes - layer.scratch_bytes(workers.num_workers()) if with_gradients else 0
        found = cpu.first_walk(layer, cache_bytes=cache_bytes, with_entries=coupling is not None)
        if coupling is None:
            terms, coefficients = per_cell_terms(cells, found.fit, found.normalizer), layer.entries.values
        else:
            fit, slope = np.zeros(len(chosen)), np.zeros(len(chosen))
            entries, coefficients = layer.entries, found.at_entries
            cpu.original_fit(entries.cells, entries.values, column, coefficients, found.normalizer.numpy(), fit, slope)
            terms = coupled_terms(cells, torch.from_numpy(fit), torch.from_numpy(slope), found.normalizer, coupling)
        loss = terms.loss.to(weight.dtype)
        log_likelihood = torch.zeros_like(cell_weight)
        log_likelihood[chosen] = terms.log_likelihood.to(weight.dtype)
        if coupling is not None:
            log_likelihood[cell_weight == 0] = 0
        if not with_gradients:
            return loss, log_likelihood
        weight_gradient, bias_gradient = (
            torch.empty_like(t, memory_format=torch.contiguous_format) if b is None else b.detach()
            for t, b in zip((weight, bias), buffers, strict=True)
        )
        slopes = cpu.Slopes(terms.scale, coefficients, cells.weight)
        part = cpu.second_walk(layer, found, slopes, weight_gradient=weight_gradient, bias_gradient=bias_gradient)
        hidden_gradient = torch.zeros_like(hidden)
        hidden_gradient[chosen] = part
        r_gradient = torch.zeros_like(r)
        if r.dim():
            r_gradient[chosen] = terms.r_gradient.to(r.dtype)
        else:
            r_gradient = terms.r_gradient.to(r.dtype)
    formed = [
        Formed(hidden_gradient),
        Formed(weight_gradient, buffers[0] is not None),
        Formed(bias_gradient, buffers[1] is not None),
        Formed(r_gradient),
    ]
    return attach(loss, inputs, formed), log_likelihood
