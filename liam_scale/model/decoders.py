"""Decoders: latent space to the likelihood of each modality's counts, and the adversary.

Shapes: B cells, F features, H hidden units, L latent dimensions, S samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from liam_scale.kernels.gradients import kept_gradients
from liam_scale.kernels.negative_binomial import negative_binomial
from liam_scale.kernels.negative_multinomial import negative_multinomial
from liam_scale.kernels.options import Impl, Likelihood, Precision
from liam_scale.model.layers import BlockOptions, Draw, HiddenBlock, SampleLinear
from loaders.minibatch import SparseCounts

MAX_LOG_LIBRARY = 15.0
"""Log library sizes are cut here before exp, as in the original: 3.3 million counts."""

LIBRARY_FLOOR = 1e-4
"""Added to every library size on the count scale."""

ADVERSARY_HIDDEN = 32


def library_size(log_library_B: Tensor) -> Tensor:
    """Library size on the count scale: exp(min(l, 15)) + 1e-4."""
    return torch.exp(torch.clamp(log_library_B, max=MAX_LOG_LIBRARY)) + LIBRARY_FLOOR


class Decoder(nn.Module):
    """What the decoders of all modalities share: one hidden layer on z, and a linear map to all features."""

    def __init__(
        self,
        num_latent: int,
        num_hidden: int,
        num_features: int,
        *,
        extra_inputs: int = 0,
        num_samples: int,
        options: BlockOptions,
        impl: Impl,
        precision: Precision,
        draw: Draw,
    ) -> None:
        super().__init__()
        inputs = num_hidden + extra_inputs
        self.linear = SampleLinear(num_latent, num_hidden, num_samples=num_samples, draw=draw.at("hidden"))
        self.block = HiddenBlock(num_hidden, options, name=draw.name)
        self.weight = draw.uniform("weight", (num_features, inputs), num_inputs=inputs)
        self.bias = draw.uniform("bias", (num_features,), num_inputs=inputs)
        self.kernel_options: dict[str, Any] = {"impl": impl, "precision": precision}
        self.grad_buffers: dict[str, Tensor] | None = None

    def hidden(self, z_BL: Tensor, sample_B: Tensor) -> Tensor:
        """(B, H) hidden layer."""
        return self.block(self.linear(z_BL, sample_B))

    def _big_parameters(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def keep_gradients(self) -> None:
        self.grad_buffers = kept_gradients(self._big_parameters())


class NegativeBinomialDecoder(Decoder):
    """RNA counts, or CLR values of ADT: mean = library * softmax(logits), one inverse dispersion a feature."""

    def __init__(self, *args: Any, num_dispersions: int, draw: Draw, **options: Any) -> None:
        super().__init__(*args, draw=draw, **options)
        num_features = len(self.bias)
        shape = (num_features, num_dispersions) if num_dispersions else (num_features,)
        self.log_theta = draw.normal("log_theta", shape)

    def _big_parameters(self) -> dict[str, Tensor]:
        return {**super()._big_parameters(), "log_theta": self.log_theta}

    def scale(self, z_BL: Tensor, sample_B: Tensor) -> Tensor:
        """(B, F) share of each feature in the cell's total; rows sum to 1."""
        return torch.softmax(functional.linear(self.hidden(z_BL, sample_B), self.weight, self.bias), dim=1)

    def log_likelihood(
        self,
        counts: SparseCounts,
        z_BL: Tensor,
        log_library_B: Tensor,
        sample_B: Tensor,
        *,
        cell_weight_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss - sum_i w_i ll_i, and ll (B,); see kernels.negative_binomial."""
        return negative_binomial(
            counts,
            self.hidden(z_BL, sample_B),
            self.weight,
            self.bias,
            library_size(log_library_B),
            self.log_theta,
            sample_B,
            cell_weight=cell_weight_B,
            grad_buffers=self.grad_buffers,
            **self.kernel_options,
        )


class NegativeMultinomialDecoder(Decoder):
    """ATAC counts: logits from hidden layer and, where it is used, library size on the count scale as input H + 1."""

    def __init__(
        self, *args: Any, uses_library: bool, num_dispersions: int, likelihood: Likelihood, draw: Draw, **options: Any
    ) -> None:
        super().__init__(*args, extra_inputs=int(uses_library), draw=draw, **options)
        self.uses_library = uses_library
        self.likelihood: Likelihood = likelihood
        self.has_one_dispersion = num_dispersions == 0
        self.r_raw = draw.normal("r_raw", (num_dispersions or 1,))

    def inputs(self, z_BL: Tensor, log_library_B: Tensor | None, sample_B: Tensor) -> Tensor:
        """(B, H) or (B, H + 1) inputs of the output layer."""
        hidden_BH = self.hidden(z_BL, sample_B)
        if not self.uses_library:
            return hidden_BH
        assert log_library_B is not None
        return torch.cat([hidden_BH, library_size(log_library_B)[:, None]], dim=1)

    def logits(self, z_BL: Tensor, log_library_B: Tensor | None, sample_B: Tensor) -> Tensor:
        """(B, F) logits against the reference class of logit 0."""
        return functional.linear(self.inputs(z_BL, log_library_B, sample_B), self.weight, self.bias)

    def dispersion(self, sample_B: Tensor) -> Tensor:
        """(B,) dispersion r, or () where all samples share one."""
        r = torch.clamp(functional.softplus(self.r_raw), min=1e-10, max=1e5)
        return r[0] if self.has_one_dispersion else r[sample_B]

    def log_likelihood(
        self,
        counts: SparseCounts,
        z_BL: Tensor,
        log_library_B: Tensor | None,
        sample_B: Tensor,
        *,
        cell_weight_B: Tensor,
        num_global_with: int | None = None,
        num_global: int | None = None,
        cell_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss - sum_i w_i ll_i, and ll (B,); see kernels.negative_multinomial."""
        return negative_multinomial(
            counts,
            self.inputs(z_BL, log_library_B, sample_B),
            self.weight,
            self.bias,
            self.dispersion(sample_B),
            cell_weight=cell_weight_B,
            likelihood=self.likelihood,
            num_global_with=num_global_with,
            num_global=num_global,
            cell_scale=cell_scale,
            grad_buffers=self.grad_buffers,
            **self.kernel_options,
        )


class Adversary(nn.Module):
    """Classifier of the sample: Linear(L, 32), hidden block, Linear(32, S)."""

    def __init__(self, num_latent: int, num_samples: int, *, options: BlockOptions, draw: Draw) -> None:
        super().__init__()
        self.linear = SampleLinear(num_latent, ADVERSARY_HIDDEN, num_samples=0, draw=draw.at("hidden"))
        self.block = HiddenBlock(ADVERSARY_HIDDEN, options, name=draw.name)
        self.output = SampleLinear(ADVERSARY_HIDDEN, num_samples, num_samples=0, draw=draw.at("output"))

    def forward(self, z_BL: Tensor, sample_B: Tensor) -> Tensor:
        """(B, S) logits of the samples."""
        return self.output(self.block(self.linear(z_BL, sample_B)), sample_B)
