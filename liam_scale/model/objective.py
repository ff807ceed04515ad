"""The objective, term by term, over any list of modalities.

loss = cell_weight * sum_i [ sum_m mask_im (weight_m NLL_im + KL_l,im) + kl_weight KL_z,i + sum_c alpha_c CE_c,i ]

Shapes: B cells, L latent dimensions, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from liam_scale.model.layers import Gaussian
from loaders.minibatch import Minibatch

PRIOR_FLOOR = float(torch.finfo(torch.float32).eps)
"""Means and variances of library priors are at least this, as in the original."""


@dataclass(frozen=True)
class Objective:
    """Loss of the local cells of a minibatch, and its terms for the history.

    Attributes
    ----------
    loss
        Scalar, differentiable: cell_weight times the sum over local cells.
    terms
        Detached scalars, each summed over local cells, absent modalities left out: `reconstruction_loss_<modality>`,
        `kl_divergence_z`, `kl_divergence_l_<modality>`, `adversarial_loss` (without alpha; of several covariates
        `adversarial_loss_<column>`) and `elbo`
        (all reconstruction losses and divergences with weight 1; scvi-tools' sign: lower is better).
    """

    loss: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class CellTerms:
    """Terms of the objective, cell by cell; each (B,).

    Attributes
    ----------
    reconstruction
        Per modality: negative log-likelihood, detached; 0 for a cell outside the modality's mask.
    kl_library
        Per modality with a library encoder, unmasked.
    kl_z
        Latent divergence, never masked.
    adversarial
        Cross entropy of each adversary under the name of its term, never masked.
    masks
        Per modality, bool: which cells enter its terms.
    reconstruction_losses
        Differentiable scalars of the kernels, which weigh and sum the cells themselves.
    """

    reconstruction: Mapping[str, Tensor]
    kl_library: Mapping[str, Tensor]
    kl_z: Tensor
    adversarial: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    reconstruction_losses: Sequence[Tensor]

    @property
    def elbo(self) -> Tensor:
        """(B,) negative evidence lower bound, detached: masked reconstruction losses and divergences."""
        total = self.kl_z.detach().clone()
        for name, mask in self.masks.items():
            total += self.reconstruction[name] * mask
            if name in self.kl_library:
                total += self.kl_library[name].detach() * mask
        return total

    def by_name(self) -> dict[str, Tensor]:
        """(B,) terms, those of a modality masked, under the names that their sums have in an `Objective`."""
        terms = {"kl_divergence_z": self.kl_z}
        for name, mask in self.masks.items():
            terms[f"reconstruction_loss_{name}"] = self.reconstruction[name] * mask
            if name in self.kl_library:
                terms[f"kl_divergence_l_{name}"] = self.kl_library[name] * mask
        return {**terms, **self.adversarial}

    def objective(
        self, *, kl_weight: float | Tensor, alphas: Mapping[str, float], cell_weight: float | Tensor
    ) -> Objective:
        """Weigh and sum over cells; `alphas` by the names of the adversaries' terms."""
        sums = {name: values.sum() for name, values in self.by_name().items()}
        weighted = (kl_weight * self.kl_z).sum()
        for name in self.kl_library:
            weighted = weighted + sums[f"kl_divergence_l_{name}"]
        for name in self.adversarial:
            weighted = weighted + alphas[name] * sums[name]
        terms = {name: total.detach() for name, total in sums.items()} | {"elbo": self.elbo.sum()}
        loss = cell_weight * weighted
        for part in self.reconstruction_losses:
            loss = loss + part
        return Objective(loss, terms)


def kl_normal(posterior: Gaussian, prior_mean: Tensor | float, prior_variance: Tensor | float) -> Tensor:
    """Kullback-Leibler divergence of normal distributions, element by element.

    1/2 (v/v0 + (m - m0)^2 / v0 - 1 - log(v/v0))
    """
    ratio = posterior.variance / prior_variance
    shift = (posterior.mean - prior_mean) ** 2 / prior_variance
    return 0.5 * (ratio + shift - 1.0 - torch.log(ratio))


def kl_latent(latent: Gaussian) -> Tensor:
    """(B,) divergence of the latent space before its softmax from the standard normal."""
    return kl_normal(latent, 0.0, 1.0).sum(dim=1)


def kl_library(library: Gaussian, prior_mean_S: Tensor, prior_variance_S: Tensor, sample_B: Tensor) -> Tensor:
    """(B,) divergence of the log library size from the prior of the cell's sample."""
    mean_B1 = prior_mean_S.clamp(min=PRIOR_FLOOR)[sample_B][:, None]
    variance_B1 = prior_variance_S.clamp(min=PRIOR_FLOOR)[sample_B][:, None]
    return kl_normal(library, mean_B1, variance_B1).sum(dim=1)


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def reverse_gradient(inputs: Tensor) -> Tensor:
    """The same values; the gradient changes its sign (Ganin et al., JMLR 2016), with strength 1."""
    return _GradientReversal.apply(inputs)


def sample_cross_entropy(logits_BS: Tensor, sample_B: Tensor) -> Tensor:
    """(B,) cross entropy of the adversary."""
    return functional.cross_entropy(logits_BS, sample_B, reduction="none")


def modality_masks(minibatch: Minibatch, modalities: Sequence[str]) -> dict[str, Tensor]:
    """(B,) bool per modality: which cells enter its terms.

    With several modalities those with a positive total, as in the original. With one, all that have it in the store:
    the original masks nothing there.
    """
    if len(modalities) == 1:
        return {name: minibatch.present[name] for name in modalities}
    return {name: minibatch.counts[name].totals() > 0 for name in modalities}
