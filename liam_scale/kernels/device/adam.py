"""A step of Adam with moments in bfloat16, in plain torch; on CUDA one kernel a parameter by `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liam_scale.kernels.device.compiled import fused_on
from liam_scale.kernels.device.noise import mix32


def update(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    key: Tensor,
    constants: Sequence[float | Tensor],
    withheld: Tensor,
) -> None:
    """Update a weight and its moments in their place.

    Moments are added up in float32, and what is kept of them is rounded up or down at random, in proportion to how
    near each is.

    Parameters
    ----------
    weight, gradient
        float32 of one shape.
    first, second
        bfloat16 moments of that shape.
    key
        () int64 of this step and parameter, below 2^32; of the random bits.
    constants
        Weight decay; decay of the first and of the second moment, b1 and b2; lr / (1 - b1^t); (1 - b2^t)^(-1/2);
        what is added to the root of the second moment (Kingma and Ba, ICLR 2015).
    withheld
        () nonzero where nothing may change.
    """
    _update(weight.detach(), gradient, first, second, key, withheld, *constants)


def _plain_update(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    key: Tensor,
    withheld: Tensor,
    decay: float,
    beta1: float,
    beta2: float,
    rate: Tensor,
    root: Tensor,
    eps: float,
) -> Tensor:
    place = torch.arange(weight.numel(), device=weight.device, dtype=torch.int64).view(weight.shape)
    bits = mix32(place ^ key)
    slope = gradient + decay * weight
    m = beta1 * first.float() + (1 - beta1) * slope
    v = beta2 * second.float() + (1 - beta2) * slope * slope
    kept = withheld != 0
    first.copy_(torch.where(kept, first, _rounded(m, bits & 0xFFFF)))
    second.copy_(torch.where(kept, second, _rounded(v, bits >> 16)))
    return weight.copy_(torch.where(kept, weight, weight - rate * m / (v.sqrt() * root + eps)))


def _rounded(value: Tensor, bits: Tensor) -> Tensor:
    """bfloat16 next to a float32, above it where 16 random bits exceed what is cut off."""
    raised = value.view(torch.int32) + bits.to(torch.int32)
    return (raised & -65536).view(torch.float32).bfloat16()


_update = fused_on("cuda", _plain_update)
