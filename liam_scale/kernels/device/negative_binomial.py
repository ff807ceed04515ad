"""The negative binomial in plain torch, for devices without kernels of their own (CUDA).

Cells in groups; within a group torch's autograd differentiates the dense part and the non-zeros' part.

Shapes: B cells, C cells of a group, F features, N non-zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liam_scale.kernels.device.compiled import dense_log_likelihood
from liam_scale.kernels.device.products import multiply
from liam_scale.kernels.device.sparse import cell_of_entries, entries
from liam_scale.kernels.gradients import Targets
from liam_scale.kernels.options import OutputLayer, Precision
from liam_scale.kernels.reference import NB_EPSILON, theta_of

TEMPORARIES = 10
"""Arrays of C x F that torch holds at once."""


def _cells_at_once(layer: OutputLayer, tile_bytes: int) -> int:
    row = max(1, TEMPORARIES * len(layer.weight) * layer.weight.element_size())
    return max(1, min(len(layer.hidden), tile_bytes // row))


def _log_likelihood(
    layer: OutputLayer, library: Tensor, log_theta: Tensor, sample: Tensor, cells: slice, is_bf16: bool
) -> Tensor:
    """(C,) float64 log-likelihood of some cells, differentiable."""
    logits = multiply(layer.hidden[cells], layer.weight.T, is_bf16=is_bf16) + layer.bias
    mean = library[cells, None] * torch.softmax(logits, dim=1)
    theta = theta_of(log_theta, sample[cells])
    dense = dense_log_likelihood(mean, theta)
    counts = layer.counts
    owner = cell_of_entries(counts)
    features, x = counts.indices.long(), counts.values
    is_part = len(mean) < counts.num_cells
    if is_part:
        # Which entries are a group's the host does not know: all are looked at, and the others count nothing. A
        # minibatch is one group as a rule.
        inside = (owner >= cells.start) & (owner < cells.stop)
        owner = (owner - cells.start).clamp_(0, len(mean) - 1)
    # float64: in float32 the two lgamma of a theta of 10^5 leave no digit to their difference
    mean_N, x = mean[owner, features].double(), x.double()
    theta_N = (theta[features] if theta.dim() == 1 else theta[owner, features]).double()
    entry = (
        x * (torch.log(mean_N + NB_EPSILON) - torch.log(theta_N + mean_N + NB_EPSILON))
        + torch.lgamma(x + theta_N)
        - torch.lgamma(theta_N)
        - torch.lgamma(x + 1)
    )
    return dense.double().index_add(0, owner, torch.where(inside, entry, 0.0) if is_part else entry)


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
    counts = entries(layer.counts, layer.weight.dtype)
    leaves = [t.detach().requires_grad_() for t in (layer.hidden, layer.weight, layer.bias, library, log_theta)]
    plain = OutputLayer(counts, leaves[0], leaves[1], leaves[2], layer.cell_weight)
    at_once = _cells_at_once(plain, tile_bytes)
    log_likelihood = torch.zeros(counts.num_cells, dtype=torch.float64, device=library.device)
    gradients = [torch.zeros_like(leaf) for leaf in leaves] if targets is not None else []
    for first in range(0, counts.num_cells, at_once):
        cells = slice(first, min(first + at_once, counts.num_cells))
        with torch.set_grad_enabled(targets is not None):
            part = _log_likelihood(plain, leaves[3], leaves[4], sample, cells, precision == "bf16")
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
