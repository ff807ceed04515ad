"""Decoders: latent space to the likelihood of each modality's counts, and the adversary.

Shapes: B cells, F features, H hidden units, L latent dimensions, S samples.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from liam_scale.kernels import reference
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


LIBRARY_WEIGHT = "library_weight"


def split_library(joined: Tensor) -> tuple[Tensor, Tensor]:
    """(F, H) and (F,): a weight of H + 1 inputs, of which the last is the library size."""
    return joined[:, :-1], joined[:, -1]


def join_library(values: MutableMapping[str, Tensor]) -> None:
    """Make each `library_weight` (values, gradient, ...) the last column of the `weight` beside it, in place."""
    for name in [name for name in values if name.endswith(LIBRARY_WEIGHT)]:
        weight = name.removesuffix(LIBRARY_WEIGHT) + "weight"
        values[weight] = torch.cat([values[weight], values.pop(name)[:, None]], dim=1)


class Decoder(nn.Module):
    """What the decoders of all modalities share: one hidden layer on z, and a linear map to all features."""

    def __init__(
        self,
        num_latent: int,
        num_hidden: int,
        num_features: int,
        *,
        num_samples: int,
        options: BlockOptions,
        impl: Impl,
        precision: Precision,
        draw: Draw,
    ) -> None:
        super().__init__()
        self.linear = SampleLinear(num_latent, num_hidden, num_samples=num_samples, draw=draw.at("hidden"))
        self.block = HiddenBlock(num_hidden, options, name=draw.name)
        self._draw_output(num_features, num_hidden, draw)
        self.kernel_options: dict[str, Any] = {"impl": impl, "precision": precision}
        self.grad_buffers: dict[str, Tensor] | None = None

    def _draw_output(self, num_features: int, num_hidden: int, draw: Draw) -> None:
        self.weight = draw.uniform("weight", (num_features, num_hidden), num_inputs=num_hidden)
        self.bias = draw.uniform("bias", (num_features,), num_inputs=num_hidden)

    def hidden(self, z_BL: Tensor, sample_B: Tensor) -> Tensor:
        """(B, H) hidden layer."""
        return self.linear.through(self.block, z_BL, sample_B)

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
    """ATAC counts: logits from hidden layer and, where it is used, library size on the count scale.

    The weights of the library size are a parameter of their own (F,), whose part of the logits is never a product in
    reduced precision. A state_dict has them as the last column of `weight` (F, H + 1), as the original does.
    `library_shift` () is what the encoder infers of the log library size beside the mean of its prior, over cells: the
    sizes that the decoder learnt from. 0 until a training has ended, and of weights that do not have it.
    """

    def __init__(
        self, *args: Any, uses_library: bool, num_dispersions: int, likelihood: Likelihood, draw: Draw, **options: Any
    ) -> None:
        self.uses_library = uses_library
        super().__init__(*args, draw=draw, **options)
        self.likelihood: Likelihood = likelihood
        self.has_one_dispersion = num_dispersions == 0
        self.r_raw = draw.normal("r_raw", (num_dispersions or 1,))
        if uses_library:
            self.register_buffer("library_shift", torch.zeros(()))

    def _draw_output(self, num_features: int, num_hidden: int, draw: Draw) -> None:
        super()._draw_output(num_features, num_hidden + int(self.uses_library), draw)
        self.library_weight: nn.Parameter | None = None
        if self.uses_library:
            joined = self.weight.detach()
            self.weight, self.library_weight = (nn.Parameter(part.clone()) for part in split_library(joined))

    def _big_parameters(self) -> dict[str, Tensor]:
        library = {} if self.library_weight is None else {LIBRARY_WEIGHT: self.library_weight}
        return {**super()._big_parameters(), **library}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        join_library(destination)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if self.uses_library and weight is not None:
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}{LIBRARY_WEIGHT}"] = split_library(weight)
            state_dict.setdefault(f"{prefix}library_shift", torch.zeros(()))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def library(self, log_library_B: Tensor | None) -> Tensor | None:
        """(B,) size of each cell on the count scale, or None where it is not used."""
        if not self.uses_library:
            return None
        assert log_library_B is not None
        return library_size(log_library_B)

    def logits(self, z_BL: Tensor, log_library_B: Tensor | None, sample_B: Tensor) -> Tensor:
        """(B, F) logits against the reference class of logit 0."""
        logits_BF = reference.linear_logits(self.hidden(z_BL, sample_B), self.weight, self.bias)
        library_B = self.library(log_library_B)
        if library_B is None or self.library_weight is None:
            return logits_BF
        return reference.add_library(logits_BF, library_B, self.library_weight)

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
        num_global_with: int | Tensor | None = None,
        num_global: int | None = None,
        cell_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss - sum_i w_i ll_i, and ll (B,); see kernels.negative_multinomial."""
        return negative_multinomial(
            counts,
            self.hidden(z_BL, sample_B),
            self.weight,
            self.bias,
            self.dispersion(sample_B),
            cell_weight=cell_weight_B,
            library=self.library(log_library_B),
            library_weight=self.library_weight,
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
        return self.output(self.linear.through(self.block, z_BL, sample_B), sample_B)
