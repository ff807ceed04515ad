"""Linear output layer + softmax scale + negative-binomial log-likelihood over sparse counts (RNA, ADT)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from liam_scale.kernels import reference
from liam_scale.kernels.backends import backend_of
from liam_scale.kernels.gradients import Formed, attach, checked_buffer, make_targets
from liam_scale.kernels.options import (
    Impl,
    OutputLayer,
    Precision,
    check_choice,
    check_output_layer,
    check_shape,
    memory_of_tiles,
    precision_in_use,
    product_precision,
)
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
    tile_bytes: int | None = None,
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
        See `liam_scale.kernels.options` and `liam_scale.kernels.options`.
    grad_buffers
        Persistent tensors `weight` (F, H), `bias` (F,) and `log_theta` that the gradients are written into and
        adopted as `.grad`; None: ordinary autograd.

    Returns
    -------
    loss
        Scalar - sum_i cell_weight_i ll_i.
    log_likelihood
        (B,) ll_i, summed over features, detached; 0 for a cell of weight 0.

    Raises
    ------
    ValueError
        A shape, dtype or option does not fit.
    RuntimeError
        A gradient buffer still holds the gradient of an earlier step.
    """
    check_choice("impl", impl, Impl)
    check_output_layer(counts, hidden, weight, bias, cell_weight)
    check_shape("library", library, (counts.num_cells,))
    if log_theta.dim() not in (1, 2) or len(log_theta) != counts.num_features:
        raise ValueError(
            f"log_theta: got shape {tuple(log_theta.shape)} for {counts.num_features} features; "
            "give (features,) or (features, samples)"
        )
    if log_theta.dim() == 2:
        check_shape("sample", sample, (counts.num_cells,))
    layer = OutputLayer(counts, hidden, weight, bias, cell_weight)
    inputs = (hidden, weight, bias, library, log_theta)
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    used = precision_in_use(precision, with_gradients, impl=impl, weight=weight)
    if impl == "reference":
        return _reference(layer, library, log_theta, sample)
    named = {"weight": weight, "bias": bias, "log_theta": log_theta}
    buffers = [checked_buffer(grad_buffers, name, parameter) for name, parameter in named.items()]
    tile_bytes = memory_of_tiles(weight.device) if tile_bytes is None else tile_bytes
    backend = backend_of("negative_binomial", impl, weight.device)
    with torch.no_grad(), product_precision(used, weight.device):
        targets = make_targets(buffers, tuple(named.values())) if with_gradients else None
        parts = (library.detach(), log_theta.detach(), sample)
        log_likelihood, hidden_gradient, library_gradient = backend.evaluate(
            layer.detached(), *parts, used, tile_bytes, targets
        )
        loss = -(cell_weight.detach().double() * log_likelihood).sum().to(weight.dtype)
    if targets is None:
        return loss, log_likelihood.to(weight.dtype)
    weight_formed, bias_formed, theta_formed = targets.formed()
    formed = [Formed(hidden_gradient), weight_formed, bias_formed, Formed(library_gradient), theta_formed]
    return attach(loss, inputs, formed), log_likelihood.to(weight.dtype)


def _reference(layer: OutputLayer, library: Tensor, log_theta: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    dense = layer.counts.to_dense().to(layer.weight.dtype)
    logits = reference.linear_logits(layer.hidden, layer.weight, layer.bias)
    mean = library[:, None] * torch.softmax(logits, dim=1)
    theta = reference.theta_of(log_theta, sample)
    log_likelihood = reference.negative_binomial(dense, mean, theta).sum(dim=1)
    loss = -(layer.cell_weight * log_likelihood).sum()
    return loss, torch.where(layer.cell_weight != 0, log_likelihood.detach(), 0)
