"""Linear output layer + softmax scale + negative-binomial log-likelihood over sparse counts (RNA, ADT)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from liam_scale.kernels import reference
from liam_scale.kernels.options import TILE_BYTES, Impl, Precision, check_choice, check_output_layer, check_shape
from loaders.minibatch import SparseCounts


def negative_binomial(
    counts: SparseCounts,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    library: Tensor,
    log_theta: Tensor,
    sample: Tensor,
    *,
    cell_weight: Tensor,
    impl: Impl = "auto",
    precision: Precision = "float32",
    tile_bytes: int = TILE_BYTES,
    grad_buffers: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood of a minibatch, and the log-likelihood of each cell.

    Parameters
    ----------
    counts
        B cells, F features; values need not be integers (CLR).
    hidden, weight, bias
        (B, H), (F, H), (F,): mean = library * softmax(hidden weight^T + bias). Differentiable.
    library
        (B,) size of each cell on the count scale. Differentiable.
    log_theta
        (F,), or (F, S) with one column a sample: theta = exp(log_theta) + 1e-4. Differentiable.
    sample
        (B,) int64 column of log_theta; not read where log_theta is (F,).
    cell_weight
        (B,) weight of each cell's log-likelihood in the loss; 0 for a cell without the modality.
    impl, precision, tile_bytes
        See `liam_scale.kernels.options`.
    grad_buffers
        Persistent tensors `weight` (F, H), `bias` (F,) and `log_theta` that the gradients are written into and
        adopted as `.grad`; None: ordinary autograd.

    Returns
    -------
    loss
        Scalar - sum_i cell_weight_i ll_i.
    log_likelihood
        (B,) ll_i, summed over features, detached.
    """
    check_choice("impl", impl, Impl)
    check_choice("precision", precision, Precision)
    check_output_layer(counts, hidden, weight, bias, cell_weight)
    check_shape("library", library, (counts.num_cells,))
    if log_theta.dim() not in (1, 2) or len(log_theta) != counts.num_features:
        raise ValueError(
            f"log_theta: got shape {tuple(log_theta.shape)} for {counts.num_features} features; "
            "give (features,) or (features, samples)"
        )
    dense = counts.to_dense().to(weight.dtype)
    mean = library[:, None] * torch.softmax(reference.linear_logits(hidden, weight, bias), dim=1)
    theta = reference.theta_of(log_theta, sample)
    log_likelihood = reference.negative_binomial(dense, mean, theta).sum(dim=1)
    return -(cell_weight * log_likelihood).sum(), log_likelihood.detach()
