"""Batch normalisation over the global minibatch, so that any number of ranks computes the same.

Shapes: B cells of this rank, H hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum over ranks is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def _over_ranks(local: Tensor) -> Tensor:
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return local
    return _SumOverRanks.apply(local)


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose statistics while training are those of all ranks' cells.

    Ranks may hold unequal numbers of cells, or none. (torch's SyncBatchNorm needs a GPU and a cell on every rank.)
    Momentum 0.01 and eps 1e-3 as in scvi-tools.
    """

    def __init__(self, num_hidden: int) -> None:
        super().__init__(num_hidden, momentum=0.01, eps=1e-3)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        ones_B1 = inputs.new_ones(len(inputs), 1)
        sums = _over_ranks(torch.cat([inputs, ones_B1], dim=1).sum(dim=0))
        count = sums[-1].detach().clamp(min=1.0)
        mean_H = sums[:-1] / count
        # Two passes: the sum of squares alone would lose a small variance beside a large mean.
        variance_H = _over_ranks(((inputs - mean_H) ** 2).sum(dim=0)) / count
        self._remember(mean_H.detach(), variance_H.detach() * count / (count - 1).clamp(min=1.0))
        return (inputs - mean_H) * torch.rsqrt(variance_H + self.eps) * self.weight + self.bias

    @torch.no_grad()
    def _remember(self, mean_H: Tensor, variance_H: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean_H, self.momentum)
        self.running_var.lerp_(variance_H, self.momentum)
        self.num_batches_tracked.add_(1)
