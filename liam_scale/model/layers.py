"""Building blocks of all networks: seeded first weights, hidden block, linear map with sample columns, Gaussian head.

Shapes: B cells, I inputs, H hidden units, K outputs, S samples.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from liam_scale.kernels.hidden_layer import hidden_layer
from liam_scale.kernels.options import Impl
from liam_scale.model.noise import Noise

VARIANCE_FLOOR = 1e-4
"""Added to every posterior variance, as scvi-tools does."""


@dataclass(frozen=True)
class Draw:
    """First weights as a function of (seed, name), so that one layer's do not depend on which others exist."""

    seed: int
    name: str = ""

    def at(self, name: str) -> Draw:
        return Draw(self.seed, f"{self.name}.{name}" if self.name else name)

    def _generator(self, name: str) -> torch.Generator:
        key = zlib.crc32(self.at(name).name.encode())
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + key) & 0x7FFFFFFFFFFFFFFF)

    def uniform(self, name: str, shape: tuple[int, ...], *, num_inputs: int) -> nn.Parameter:
        """What PyTorch's Linear starts from (Kaiming uniform, a = sqrt 5): uniform within 1 / sqrt(inputs)."""
        bound = 1.0 / math.sqrt(num_inputs) if num_inputs else 0.0
        return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=self._generator(name)))

    def normal(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape).normal_(generator=self._generator(name)))


@dataclass(frozen=True)
class BlockOptions:
    """What a hidden block does after its linear map."""

    batch_norm: bool
    layer_norm: bool
    dropout_rate: float = 0.0
    impl: Impl = "auto"


class BatchNorm(nn.BatchNorm1d):
    """Over the minibatch, with momentum 0.01 and eps 1e-3 as in scvi-tools; on one rank only (`check_ranks`).

    A minibatch of fewer than two cells has no variance: it is normalised as it will be after training.
    """

    def __init__(self, num_hidden: int) -> None:
        super().__init__(num_hidden, momentum=0.01, eps=1e-3)

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > 1:
            return super().forward(inputs)
        running = (self.running_mean, self.running_var)
        return functional.batch_norm(inputs, *running, self.weight, self.bias, training=False, eps=self.eps)


class HiddenBlock(nn.Module):
    """What follows the linear map of a hidden layer: BatchNorm, LayerNorm without weights, ReLU, dropout.

    The order is that of scvi-tools' FCLayers.
    """

    def __init__(self, num_hidden: int, options: BlockOptions, *, name: str) -> None:
        super().__init__()
        self.layer_norm = options.layer_norm
        self.dropout_rate = options.dropout_rate
        self.impl: Impl = options.impl
        self.noise_name = f"{name}.dropout"
        self.batch_norm = BatchNorm(num_hidden) if options.batch_norm else None

    def forward(
        self,
        linear_BH: Tensor,
        noise: Noise | None = None,
        *,
        bias: Tensor | None = None,
        sample_weight: Tensor | None = None,
        sample_B: Tensor | None = None,
    ) -> Tensor:
        """(B, H) from the linear map, to which bias and rows of the cells' samples are added if they are given."""
        given: dict[str, Tensor | None] = {"bias": bias, "sample_weight": sample_weight, "sample": sample_B}
        if self.batch_norm is not None:
            linear_BH = linear_BH if bias is None else linear_BH + bias
            if sample_weight is not None and sample_B is not None:
                linear_BH = linear_BH + functional.embedding(sample_B, sample_weight)
            linear_BH, given = self.batch_norm(linear_BH), {}
        return hidden_layer(
            linear_BH,
            **given,
            layer_norm=self.layer_norm,
            dropout=noise.dropout(self.noise_name, self.dropout_rate) if noise is not None and self.training else None,
            impl=self.impl,
        )


class SampleLinear(nn.Module):
    """x W^T + b, plus a row of a small table for the cell's sample (the one-hot columns of the original)."""

    def __init__(self, num_inputs: int, num_outputs: int, *, num_samples: int, draw: Draw) -> None:
        super().__init__()
        # One sample has no one-hot column: it would be a second bias.
        columns = num_samples if num_samples > 1 else 0
        fan_in = num_inputs + columns
        self.weight = draw.uniform("weight", (num_outputs, num_inputs), num_inputs=fan_in)
        self.bias = draw.uniform("bias", (num_outputs,), num_inputs=fan_in)
        self.sample_weight = (
            draw.uniform("sample_weight", (columns, num_outputs), num_inputs=fan_in) if columns else None
        )

    def forward(self, inputs_BI: Tensor, sample_B: Tensor) -> Tensor:
        outputs_BH = functional.linear(inputs_BI, self.weight, self.bias)
        if self.sample_weight is not None:
            outputs_BH = outputs_BH + functional.embedding(sample_B, self.sample_weight)
        return outputs_BH

    def through(self, block: HiddenBlock, inputs_BI: Tensor, sample_B: Tensor, noise: Noise | None = None) -> Tensor:
        """The same through a hidden block, which adds the row of the sample."""
        product_BH = functional.linear(inputs_BI, self.weight, self.bias)
        return block(product_BH, noise, sample_weight=self.sample_weight, sample_B=sample_B)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions: mean and variance, both (B, K)."""

    mean: Tensor
    variance: Tensor

    def sample(self, noise: Noise, layer: str) -> Tensor:
        """(B, K) mean + sqrt(variance) eps."""
        eps_BK = noise.normal(layer, self.mean.shape[1], dtype=self.mean.dtype)
        return self.mean + torch.sqrt(self.variance) * eps_BK


class GaussianHead(nn.Module):
    """Mean and variance as linear maps of a hidden layer; the variance is exp(.) + 1e-4."""

    def __init__(self, num_hidden: int, num_outputs: int, *, draw: Draw) -> None:
        super().__init__()
        self.mean = SampleLinear(num_hidden, num_outputs, num_samples=0, draw=draw.at("mean"))
        self.variance = SampleLinear(num_hidden, num_outputs, num_samples=0, draw=draw.at("variance"))

    def forward(self, hidden_BH: Tensor) -> Gaussian:
        mean_BK = functional.linear(hidden_BH, self.mean.weight, self.mean.bias)
        log_variance_BK = functional.linear(hidden_BH, self.variance.weight, self.variance.bias)
        return Gaussian(mean_BK, torch.exp(log_variance_BK) + VARIANCE_FLOOR)
