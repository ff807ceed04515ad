"""Encoders: counts of each modality to hidden layer and library size, all hidden layers to the latent space.

Shapes: B cells, F features, H hidden units, L latent dimensions, M modalities, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liam_scale.kernels.gradients import kept_gradients
from liam_scale.kernels.options import Impl
from liam_scale.kernels.sparse_linear import sparse_linear
from liam_scale.model.layers import BlockOptions, Draw, Gaussian, GaussianHead, HiddenBlock, SampleLinear
from liam_scale.model.noise import Noise
from loaders.minibatch import SparseCounts


@dataclass(frozen=True)
class Encoded:
    """What one modality's encoders say of the cells."""

    hidden: Tensor
    """(B, H) hidden layer that the latent space is made from."""
    library: Gaussian | None = None
    """(B, 1) library size on the log scale; None without one."""


class CountLayer(nn.Module):
    """First hidden layer on sparse counts; its weight is feature-major (F, H), see kernels.sparse_linear."""

    def __init__(
        self, num_features: int, num_hidden: int, *, num_samples: int, options: BlockOptions, draw: Draw
    ) -> None:
        super().__init__()
        columns = num_samples if num_samples > 1 else 0
        fan_in = num_features + columns
        self.weight = draw.uniform("weight", (num_features, num_hidden), num_inputs=fan_in)
        self.bias = draw.uniform("bias", (num_hidden,), num_inputs=fan_in)
        self.sample_weight = (
            draw.uniform("sample_weight", (columns, num_hidden), num_inputs=fan_in) if columns else None
        )
        self.block = HiddenBlock(num_hidden, options, name=draw.name)

    def forward(self, product_BH: Tensor, sample_B: Tensor, noise: Noise | None) -> Tensor:
        """(B, H) hidden layer from the product of counts and weight, which the caller makes (see ModalityEncoder)."""
        return self.block(product_BH, noise, bias=self.bias, sample_weight=self.sample_weight, sample_B=sample_B)


class LibraryEncoder(nn.Module):
    """Counts and sample to the library size, on the log scale."""

    def __init__(
        self, num_features: int, num_hidden: int, *, num_samples: int, options: BlockOptions, draw: Draw
    ) -> None:
        super().__init__()
        self.layer = CountLayer(num_features, num_hidden, num_samples=num_samples, options=options, draw=draw)
        self.head = GaussianHead(num_hidden, 1, draw=draw.at("head"))


class ModalityEncoder(nn.Module):
    """Hidden layer and library size of one modality, in one pass over its counts.

    With `log1p`, as RNA has it, counts enter the hidden layer as log(1 + counts) and the library encoder as counts;
    else they enter both as they are.
    """

    def __init__(
        self,
        num_features: int,
        num_hidden: int,
        *,
        log1p: bool,
        is_conditional: bool,
        has_library: bool,
        num_samples: int,
        options: BlockOptions,
        impl: Impl,
        draw: Draw,
    ) -> None:
        super().__init__()
        self.log1p = log1p
        self.impl: Impl = impl
        self.grad_buffers: dict[str, Tensor] | None = None
        self.layer = CountLayer(
            num_features,
            num_hidden,
            num_samples=num_samples if is_conditional else 0,
            options=options,
            draw=draw.at("encoder"),
        )
        self.library = (
            LibraryEncoder(num_features, num_hidden, num_samples=num_samples, options=options, draw=draw.at("library"))
            if has_library
            else None
        )

    def forward(
        self, counts: SparseCounts, sample_B: Tensor, noise: Noise | None, *, with_library: bool = True
    ) -> Encoded:
        if self.library is None or not with_library:
            (product_BH,) = sparse_linear(
                counts, [self.layer.weight], log1p=[self.log1p], impl=self.impl, grad_buffers=self.grad_buffers
            )
            return Encoded(self.layer(product_BH, sample_B, noise))
        product_BH, library_BH = sparse_linear(
            counts,
            [self.layer.weight, self.library.layer.weight],
            log1p=[self.log1p, False],
            impl=self.impl,
            grad_buffers=self.grad_buffers,
        )
        library = self.library.head(self.library.layer(library_BH, sample_B, noise))
        return Encoded(self.layer(product_BH, sample_B, noise), library)

    def keep_gradients(self) -> None:
        weights = [self.layer.weight, *([self.library.layer.weight] if self.library is not None else [])]
        self.grad_buffers = kept_gradients({f"weight{k}": weight for k, weight in enumerate(weights)})


class LatentEncoder(nn.Module):
    """Hidden layers of all modalities, side by side, to the latent space before its softmax."""

    def __init__(
        self,
        num_modalities: int,
        num_hidden: int,
        num_latent: int,
        *,
        num_samples: int,
        options: BlockOptions,
        draw: Draw,
    ) -> None:
        super().__init__()
        self.linear = SampleLinear(num_modalities * num_hidden, num_hidden, num_samples=num_samples, draw=draw)
        self.block = HiddenBlock(num_hidden, options, name=draw.name)
        self.head = GaussianHead(num_hidden, num_latent, draw=draw.at("head"))

    def forward(self, hidden: list[Tensor], sample_B: Tensor, noise: Noise | None) -> Gaussian:
        joined = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
        return self.head(self.linear.through(self.block, joined, sample_B, noise))
