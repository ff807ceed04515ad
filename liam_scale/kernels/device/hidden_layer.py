"""What follows the product of a hidden layer, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from liam_scale.kernels.device.noise import Dropout


def evaluate(
    linear: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    sample: Tensor | None,
    *,
    layer_norm: bool,
    dropout: Dropout | None,
) -> Tensor:
    """(B, H) hidden layer; see `liam_scale.kernels.hidden_layer`."""
    hidden = linear if bias is None else linear + bias
    if sample_weight is not None and sample is not None:
        hidden = hidden + functional.embedding(sample, sample_weight)
    if layer_norm:
        hidden = functional.layer_norm(hidden, hidden.shape[1:])
    hidden = torch.relu(hidden)
    return hidden if dropout is None else dropout.of(hidden)
