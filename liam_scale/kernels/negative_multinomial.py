"""Linear output layer + negative-multinomial log-likelihood over sparse counts (ATAC)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from liam_scale.kernels import reference
from liam_scale.kernels.options import (
    TILE_BYTES,
    Impl,
    Likelihood,
    Precision,
    check_choice,
    check_output_layer,
    check_shape,
)
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
        (B,) ll_i, detached. For `original` its coupled sums run over the cells of this rank.
    """
    check_choice("impl", impl, Impl)
    check_choice("likelihood", likelihood, Likelihood)
    check_choice("precision", precision, Precision)
    check_output_layer(counts, hidden, weight, bias, cell_weight)
    if r.dim() > 0:
        check_shape("r", r, (counts.num_cells,))
    dense = counts.to_dense().to(weight.dtype)
    logits = reference.linear_logits(hidden, weight, bias)
    if likelihood == "per-cell":
        log_likelihood = reference.negative_multinomial(dense, logits, r)
        return -(cell_weight * log_likelihood).sum(), log_likelihood.detach()
    own, zero, gamma = reference.original_terms(dense, logits, r)
    coupling = _coupling_weight(cell_weight, num_global_with, cell_scale)
    share = 1.0 if r.dim() > 0 or num_global is None else counts.num_cells / num_global
    loss = -(cell_weight * own).sum() - coupling * (zero.sum() - share * gamma.sum())
    return loss, (own + zero.sum() - gamma.sum()).detach()


def _coupling_weight(cell_weight: Tensor, num_global_with: int | None, cell_scale: float | None) -> Tensor:
    """Sum of the weights of all cells of the global minibatch: the weight of the original's coupled terms."""
    if num_global_with is None:
        return cell_weight.sum()
    if cell_scale is not None:
        return cell_weight.new_tensor(num_global_with * cell_scale)
    return num_global_with * cell_weight.amax() if len(cell_weight) else torch.zeros_like(cell_weight.sum())
