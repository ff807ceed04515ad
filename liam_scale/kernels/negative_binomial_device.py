"""The negative binomial in plain torch, for devices without kernels of their own (CUDA).

Cells in groups; within a group torch's autograd differentiates the dense part and the non-zeros' part.

Shapes: B cells, C cells of a group, F features, N non-zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liam_scale.kernels.compiled import dense_log_likelihood
from liam_scale.kernels.device import cell_of_entries
from liam_scale.kernels.options import OutputLayer
from liam_scale.kernels.reference import NB_EPSILON, theta_of

TEMPORARIES = 10
"""Arrays of C x F that torch holds at once."""


def cells_at_once(layer: OutputLayer, tile_bytes: int) -> int:
    row = max(1, TEMPORARIES * len(layer.weight) * layer.weight.element_size())
    return max(1, min(len(layer.hidden), tile_bytes // row))


def log_likelihood(layer: OutputLayer, library: Tensor, log_theta: Tensor, sample: Tensor, cells: slice) -> Tensor:
    """(C,) float64 log-likelihood of some cells, differentiable."""
    logits = torch.addmm(layer.bias, layer.hidden[cells], layer.weight.T)
    mean = library[cells, None] * torch.softmax(logits, dim=1)
    theta = theta_of(log_theta, sample[cells])
    dense = dense_log_likelihood(mean, theta, mean.new_tensor(NB_EPSILON))
    counts = layer.counts
    owner = cell_of_entries(counts)
    features, x = counts.indices.long(), counts.values
    if mean.shape[0] < counts.num_cells:
        # the number of entries of a group is not known without asking the device; a minibatch is one group as a rule
        inside = (owner >= cells.start) & (owner < cells.stop)
        owner, features, x = owner[inside] - cells.start, features[inside], x[inside]
    # float64: in float32 the two lgamma of a theta of 10^5 leave no digit to their difference
    mean_N, x = mean[owner, features].double(), x.double()
    theta_N = (theta[features] if theta.dim() == 1 else theta[owner, features]).double()
    entry = (
        x * (torch.log(mean_N + NB_EPSILON) - torch.log(theta_N + mean_N + NB_EPSILON))
        + torch.lgamma(x + theta_N)
        - torch.lgamma(theta_N)
        - torch.lgamma(x + 1)
    )
    return dense.double().index_add(0, owner, entry)
