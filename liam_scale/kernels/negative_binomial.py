"""Linear output layer + softmax scale + negative-binomial log-likelihood over sparse counts (RNA, ADT)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from liam_scale.kernels import negative_binomial_cpu as cpu
from liam_scale.kernels import negative_binomial_device as device
from liam_scale.kernels import reference
from liam_scale.kernels.device import with_values
from liam_scale.kernels.gradients import Formed, Targets, attach, checked_buffer, make_targets
from liam_scale.kernels.options import (
    TILE_BYTES,
    Impl,
    OutputLayer,
    Precision,
    check_choice,
    check_output_layer,
    check_shape,
    product_precision,
)
from liam_scale.kernels.products import has_bf16
from liam_scale.kernels.sparse_walk import by_feature
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
        (B,) ll_i, summed over features, detached; 0 for a cell of weight 0.

    Raises
    ------
    ValueError
        A shape, dtype or option does not fit.
    RuntimeError
        A gradient buffer still holds the gradient of an earlier step.
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
    if log_theta.dim() == 2:
        check_shape("sample", sample, (counts.num_cells,))
    layer = OutputLayer(counts, hidden, weight, bias, cell_weight)
    if impl == "reference":
        return _reference(layer, library, log_theta, sample)
    inputs = (hidden, weight, bias, library, log_theta)
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    named = {"weight": weight, "bias": bias, "log_theta": log_theta}
    buffers = [checked_buffer(grad_buffers, name, parameter) for name, parameter in named.items()]
    evaluate = _evaluate_cpu if weight.device.type == "cpu" else _evaluate_device
    with torch.no_grad(), product_precision(precision, weight.device):
        targets = make_targets(buffers, tuple(named.values())) if with_gradients else None
        parts = (library.detach(), log_theta.detach(), sample)
        log_likelihood, hidden_gradient, library_gradient = evaluate(layer, *parts, precision, tile_bytes, targets)
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


def _evaluate_cpu(
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
    weight, bias = layer.weight.detach().contiguous(), layer.bias.detach().contiguous()
    entries, is_bf16 = by_feature(layer.counts, dtype), precision == "bf16" and dtype == torch.float32 and has_bf16()
    chosen = layer.cell_weight.nonzero()[:, 0]  # the others have no part in the loss
    log_likelihood = torch.zeros(num_cells, dtype=torch.float64)
    hidden_gradient, library_gradient = torch.zeros_like(layer.hidden), torch.zeros_like(library)
    theta_gradient = None
    if targets is not None:
        theta_gradient = targets.tensors[2].zero_().view(slope_theta.shape)
        if not len(chosen):
            targets.tensors[0].zero_()
            targets.tensors[1].zero_()
    at_once = cpu.cells_at_once(len(chosen), layer.weight, tile_bytes)
    for first, cells in enumerate(chosen.split(at_once) if len(chosen) else ()):
        column = np.full(num_cells, -1, np.int32)
        column[cells.numpy()] = np.arange(len(cells), dtype=np.int32)
        hidden, cell_weight = layer.hidden.detach()[cells].contiguous(), layer.cell_weight.detach()[cells]
        tiled = (entries, column, hidden, weight, bias, is_bf16)
        group = cpu.Group(*tiled, slope_theta, sample[cells], library[cells], cell_weight)
        found = cpu.softmax(group)
        sums = cpu.likelihood(group, found, theta_gradient)
        log_likelihood[cells] = sums.log_likelihood
        if targets is not None:
            library_gradient[cells] = (-group.cell_weight * sums.pull / group.library).to(dtype)
            hidden_gradient[cells] = cpu.gradients(group, found, sums, *targets.tensors[:2], is_first=first == 0)
    return log_likelihood, hidden_gradient, library_gradient


def _evaluate_device(
    layer: OutputLayer,
    library: Tensor,
    log_theta: Tensor,
    sample: Tensor,
    precision: Precision,
    tile_bytes: int,
    targets: Targets | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch on any device; products in float32 or tf32 (bf16 is read as tf32)."""
    counts = with_values(layer.counts, layer.weight.dtype)
    leaves = [t.detach().requires_grad_() for t in (layer.hidden, layer.weight, layer.bias, library, log_theta)]
    plain = OutputLayer(counts, leaves[0], leaves[1], leaves[2], layer.cell_weight.detach())
    at_once = device.cells_at_once(plain, tile_bytes)
    log_likelihood = torch.zeros(counts.num_cells, dtype=torch.float64, device=library.device)
    gradients = [torch.zeros_like(leaf) for leaf in leaves] if targets is not None else []
    for first in range(0, counts.num_cells, at_once):
        cells = slice(first, min(first + at_once, counts.num_cells))
        with torch.set_grad_enabled(targets is not None):
            part = device.log_likelihood(plain, leaves[3], leaves[4], sample, cells)
            loss = -(plain.cell_weight[cells] * part).sum()
        log_likelihood[cells] = torch.where(plain.cell_weight[cells] != 0, part.detach(), 0).double()
        if targets is not None:
            for total, gradient in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
                total += gradient
    if targets is None:
        return log_likelihood, torch.zeros_like(layer.hidden), torch.zeros_like(library)
    for target, gradient in zip(targets.tensors, (gradients[1], gradients[2], gradients[4]), strict=True):
        target.copy_(gradient)
    return log_likelihood, gradients[0], gradients[3]
