"""Linear output layer + negative-multinomial log-likelihood over sparse counts (ATAC)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from liam_scale.kernels import reference
from liam_scale.kernels.cpu import negative_multinomial as cpu
from liam_scale.kernels.device import negative_multinomial as device
from liam_scale.kernels.gradients import Formed, attach, checked_buffer, make_targets
from liam_scale.kernels.options import (
    TILE_BYTES,
    Impl,
    Likelihood,
    OutputLayer,
    Precision,
    check_choice,
    check_output_layer,
    check_shape,
    is_for_cpu,
    product_precision,
)
from liam_scale.kernels.terms import Coupling
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
    layer = OutputLayer(counts, hidden, weight, bias, cell_weight)
    if impl == "reference":
        return _reference(layer, r, coupling)
    inputs = (hidden, weight, bias, r)
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    buffers = [checked_buffer(grad_buffers, "weight", weight), checked_buffer(grad_buffers, "bias", bias)]
    backend = cpu if is_for_cpu(impl, weight.device) else device
    with torch.no_grad(), product_precision(precision, weight.device):
        targets = make_targets(buffers, (weight, bias)) if with_gradients else None
        terms, hidden_gradient = backend.evaluate(layer, r.detach(), coupling, precision, tile_bytes, targets)
        loss, log_likelihood = terms.loss.to(weight.dtype), terms.log_likelihood.to(weight.dtype)
    if targets is None:
        return loss, log_likelihood
    formed = [Formed(hidden_gradient), *targets.formed(), Formed(terms.r_gradient.to(r.dtype))]
    return attach(loss, inputs, formed), log_likelihood


def _coupling_weight(cell_weight: Tensor, num_global_with: int | None, cell_scale: float | None) -> Tensor:
    """Sum of the weights of all cells of the global minibatch: the weight of the original's coupled terms."""
    if num_global_with is None:
        return cell_weight.sum()
    if cell_scale is not None:
        return cell_weight.new_tensor(num_global_with * cell_scale)
    return num_global_with * cell_weight.amax() if len(cell_weight) else cell_weight.sum()


def _reference(layer: OutputLayer, r: Tensor, coupling: Coupling | None) -> tuple[Tensor, Tensor]:
    dense = layer.counts.to_dense().to(layer.weight.dtype)
    logits = reference.linear_logits(layer.hidden, layer.weight, layer.bias)
    if coupling is None:
        log_likelihood = reference.negative_multinomial(dense, logits, r)
        loss = -(layer.cell_weight * log_likelihood).sum()
    else:
        own, zero, gamma = reference.original_terms(dense, logits, r)
        share = 1.0 if r.dim() > 0 else coupling.share
        loss = -(layer.cell_weight * own).sum() - coupling.weight * (zero.sum() - share * gamma.sum())
        log_likelihood = own + zero.sum() - gamma.sum()
    return loss, torch.where(layer.cell_weight != 0, log_likelihood.detach(), 0)
