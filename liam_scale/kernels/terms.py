"""What hangs on a cell's normaliser alone: its log-likelihood, and the scalars that its gradients need.

Everything here is (C,) in float64: at n = 10^6 counts lgamma(n + r) - lgamma(r) and (n + r) L are of the order of
10^7 and cancel. Shapes: C cells that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liam_scale.kernels.reference import ORIGINAL_EPSILON


@dataclass(frozen=True)
class Cells:
    """The cells that count, all (C,) float64 (r also () for one dispersion of all cells).

    Attributes
    ----------
    total
        Sum of the counts.
    r
        Dispersion.
    weight
        Weight in the loss.
    """

    total: Tensor
    r: Tensor
    weight: Tensor


@dataclass(frozen=True)
class InputGradients:
    """d loss / d hidden (B, H) and d loss / d library (B,)."""

    hidden: Tensor
    library: Tensor


@dataclass(frozen=True)
class Coupling:
    """How the original's sums over the minibatch enter the loss of this rank.

    Attributes
    ----------
    weight
        () sum of the weights of all cells of the global minibatch.
    share
        Share of this rank in a term that the minibatch has once (lgamma of a dispersion common to all cells).
    """

    weight: Tensor | float
    share: float


@dataclass(frozen=True)
class Terms:
    """
    Attributes
    ----------
    loss
        ().
    log_likelihood
        (C,).
    scale
        (C,) d loss / d L: factor of the softmax probabilities in the gradient of the logits.
    r_gradient
        d loss / d r, shape of r.
    """

    loss: Tensor
    log_likelihood: Tensor
    scale: Tensor
    r_gradient: Tensor

    def placed(self, chosen: Tensor, num_cells: int) -> Terms:
        """The same for all cells, 0 for those that were not chosen."""

        def place(values: Tensor) -> Tensor:
            return values.new_zeros(num_cells).index_copy_(0, chosen, values)

        r_gradient = place(self.r_gradient) if self.r_gradient.dim() else self.r_gradient
        return Terms(self.loss, place(self.log_likelihood), place(self.scale), r_gradient)


def per_cell_terms(cells: Cells, fit: Tensor, normalizer: Tensor) -> Terms:
    """From fit = sum_f y_f l_f and L = log(1 + sum_f exp l_f): log NM = fit - (n + r) L + lgamma(n + r) - lgamma(r)."""
    sum_ = cells.total + cells.r
    log_likelihood = fit - sum_ * normalizer + torch.lgamma(sum_) - torch.lgamma(cells.r)
    r_gradient = -cells.weight * (torch.digamma(sum_) - torch.digamma(cells.r) - normalizer)
    return Terms(
        loss=-(cells.weight * log_likelihood).sum(),
        log_likelihood=torch.where(cells.weight != 0, log_likelihood, 0),
        scale=cells.weight * sum_,
        r_gradient=r_gradient if cells.r.dim() else r_gradient.sum(),
    )


def coupled_terms(cells: Cells, fit: Tensor, fit_slope: Tensor, normalizer: Tensor, coupling: Coupling) -> Terms:
    """The original's formula, from fit = sum_f y_f log(p_f + eps) and fit_slope = - d fit / d L."""
    zero_probability = torch.exp(-normalizer)
    log_zero = torch.log(zero_probability + ORIGINAL_EPSILON)
    share = torch.ones_like(log_zero) if cells.r.dim() else coupling.share
    own = fit + torch.lgamma(cells.total + cells.r)
    zero, gamma = cells.r * log_zero, torch.lgamma(cells.r)
    zero_slope = cells.r * zero_probability / (zero_probability + ORIGINAL_EPSILON)
    own_r = -cells.weight * torch.digamma(cells.total + cells.r) - coupling.weight * log_zero
    own_r = own_r if cells.r.dim() else own_r.sum()
    return Terms(
        loss=-(cells.weight * own).sum() - coupling.weight * (zero.sum() - (share * gamma).sum()),
        log_likelihood=torch.where(cells.weight != 0, own + zero.sum() - gamma.sum(), 0),
        scale=cells.weight * fit_slope + coupling.weight * zero_slope,
        r_gradient=own_r + coupling.weight * share * torch.digamma(cells.r),
    )
