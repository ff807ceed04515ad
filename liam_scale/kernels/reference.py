"""Every formula of the step once, in plain PyTorch on dense tensors: the truth for tests and the fallback.

Shapes: B cells, F features, H hidden units, S samples. Any floating dtype, any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ORIGINAL_EPSILON = 1e-10
"""Added to probabilities before their logarithm in the original's negative multinomial."""

NB_EPSILON = 1e-8
"""Added inside every logarithm of the negative binomial, as scvi-tools has it."""

THETA_FLOOR = 1e-4
"""Added to exp(log_theta)."""


def sparse_linear(counts_BF: Tensor, weight_FO: Tensor, *, log1p: bool) -> Tensor:
    """(B, O) product of the counts, or of log(1 + counts), with a feature-major weight."""
    return (torch.log1p(counts_BF) if log1p else counts_BF) @ weight_FO


def linear_logits(hidden_BH: Tensor, weight_FH: Tensor, bias_F: Tensor) -> Tensor:
    """(B, F) logits of the output layer of a decoder."""
    return functional.linear(hidden_BH, weight_FH, bias_F)


def add_library(logits_BF: Tensor, library_B: Tensor, library_weight_F: Tensor) -> Tensor:
    """(B, F) logits of a layer that also reads the size of the cell."""
    return logits_BF + library_B[:, None] * library_weight_F


def log_normalizer(logits_BF: Tensor) -> Tensor:
    """(B,) log(1 + sum_f exp logit_f), the normaliser of a softmax with a reference class of logit 0."""
    zero = logits_BF.new_zeros(len(logits_BF), 1)
    return torch.logsumexp(torch.cat([logits_BF, zero], dim=1), dim=1)


def negative_multinomial(counts_BF: Tensor, logits_BF: Tensor, r_B: Tensor) -> Tensor:
    """(B,) log-likelihood of each cell, the multinomial coefficient omitted as in the original.

    sum_f y_f l_f - (n + r) L + lgamma(n + r) - lgamma(r) with n = sum_f y_f and L = log(1 + sum_f exp l_f).
    """
    total_B = counts_BF.sum(dim=1)
    fit_B = (counts_BF * logits_BF).sum(dim=1)
    normalizer_B = log_normalizer(logits_BF)
    return fit_B - (total_B + r_B) * normalizer_B + torch.lgamma(total_B + r_B) - torch.lgamma(r_B)


def original_terms(counts_BF: Tensor, logits_BF: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of the original's negative multinomial, whose r-terms it sums over the whole minibatch.

    Returns
    -------
    own
        (B,) sum_f y_f log(p_f + 1e-10) + lgamma(r + n): counted for the cell itself.
    zero
        (B,) r log(p_0 + 1e-10): the original adds the sum over all cells to every cell.
    gamma
        lgamma(r) with the shape of r, (B,) or () ('constant' dispersion): the original subtracts its sum.
    """
    normalizer_B = log_normalizer(logits_BF)
    log_p_BF = torch.log(torch.exp(logits_BF - normalizer_B[:, None]) + ORIGINAL_EPSILON)
    own_B = (counts_BF * log_p_BF).sum(dim=1) + torch.lgamma(r + counts_BF.sum(dim=1))
    zero_B = r * torch.log(torch.exp(-normalizer_B) + ORIGINAL_EPSILON)
    return own_B, zero_B, torch.lgamma(r)


def theta_of(log_theta: Tensor, sample_B: Tensor) -> Tensor:
    """(F,) or (B, F) inverse dispersion exp(log_theta) + 1e-4; log_theta is (F,), or (F, S): a column a sample."""
    theta = torch.exp(log_theta) + THETA_FLOOR
    return theta if theta.dim() == 1 else theta.T[sample_B]


def negative_binomial(counts_BF: Tensor, mean_BF: Tensor, theta: Tensor) -> Tensor:
    """(B, F) log-likelihood of each entry, formula and epsilons of scvi-tools; theta (F,) or (B, F)."""
    log_sum_BF = torch.log(theta + mean_BF + NB_EPSILON)
    return (
        theta * (torch.log(theta + NB_EPSILON) - log_sum_BF)
        + counts_BF * (torch.log(mean_BF + NB_EPSILON) - log_sum_BF)
        + torch.lgamma(counts_BF + theta)
        - torch.lgamma(theta)
        - torch.lgamma(counts_BF + 1)
    )
