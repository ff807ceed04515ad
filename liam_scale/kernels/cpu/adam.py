"""A step of Adam with moments in bfloat16, in one walk over weights, gradients and moments."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liam_scale.kernels.cpu import threads
from liam_scale.kernels.cpu.vector_math import FAST_MATH, bits_of, float_of
from loaders.csr import compiled

_16, _15, _LOW, _A, _B = np.uint32(16), np.uint32(15), np.uint32(0xFFFF), np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)
_ONE = np.float32(1)

FEWEST = 4_096
"""Parameters that are worth a thread."""


def update(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, key: int, constants: Sequence[float]
) -> None:
    """As `device.adam.update`; sums of two products may be rounded otherwise."""
    moments = [moment.view(torch.uint16).view(-1).numpy() for moment in (first, second)]
    numbers = np.array(constants, np.float32)
    arrays = (weight.detach().view(-1).numpy(), gradient.reshape(-1).numpy(), *moments, numbers, np.uint32(key))
    size = weight.numel()
    parts = max(1, min(threads.num_workers(), size // FEWEST))
    edges = [size * part // parts for part in range(parts + 1)]
    threads.run([functools.partial(_update_part, *arrays, begin, end) for begin, end in pairwise(edges)])


@compiled(fastmath=FAST_MATH, error_model="numpy")
def _update_part(
    weight: Any, gradient: Any, first: Any, second: Any, constants: Any, key: Any, begin: int, end: int
) -> None:
    decay, beta1, beta2 = constants[0], constants[1], constants[2]
    rate, root, eps = constants[3], constants[4], constants[5]
    for i in range(np.uint64(begin), np.uint64(end)):
        # 16 random bits a moment: the hash of `device.noise`, whose products are cut to 32 bits
        mixed = np.uint32(np.uint32(i) ^ key)
        mixed = np.uint32(np.uint32(mixed ^ (mixed >> _16)) * _A)
        mixed = np.uint32(np.uint32(mixed ^ (mixed >> _15)) * _B)
        mixed = np.uint32(mixed ^ (mixed >> _15))
        slope = gradient[i] + decay * weight[i]
        m = float_of(np.int32(np.uint32(first[i]) << _16))
        v = float_of(np.int32(np.uint32(second[i]) << _16))
        m = beta1 * m + (_ONE - beta1) * slope
        v = beta2 * v + (_ONE - beta2) * slope * slope
        weight[i] -= rate * m / (np.float32(math.sqrt(v)) * root + eps)
        first[i] = np.uint16(np.uint32(np.uint32(bits_of(m)) + np.uint32(mixed & _LOW)) >> _16)
        second[i] = np.uint16(np.uint32(np.uint32(bits_of(v)) + np.uint32(mixed >> _16)) >> _16)
