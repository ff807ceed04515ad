"""The hash that noise is made of, in plain tensor operations: the same bits on every device.

Shapes: B cells, U units of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def signed(value: int, bits: int) -> int:
    """The signed number of the same bits, which tensors and Triton's kernels take."""
    return value - (1 << bits) if value >> (bits - 1) else value


def mix64(value: Any) -> Any:
    """One step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of an integer, or of int64, whose products wrap."""
    value = _wrapped(value + signed(0x9E3779B97F4A7C15, 64))
    value = _wrapped((value ^ _shifted(value, 30)) * signed(0xBF58476D1CE4E5B9, 64))
    value = _wrapped((value ^ _shifted(value, 27)) * signed(0x94D049BB133111EB, 64))
    return value ^ _shifted(value, 31)


def step_key(*, seed: int, step: int) -> int:
    """Key of 64 bits, by which the noise of a step differs from that of all others."""
    return mix64(mix64(seed & _MASK64) ^ (step & _MASK64))


def _wrapped(value: Any) -> Any:
    return value if isinstance(value, Tensor) else value & _MASK64


def _shifted(value: Any, by: int) -> Any:
    """Without the copies of the sign that int64 would bring along."""
    return (value >> by) & (_MASK64 >> by)


def mix32(value: Any) -> Any:
    """A bijection of 32-bit integers, held in an integer or in int64.

    Both multipliers are below 2^31, so no product leaves int64 and every device computes the same
    (constants: C. Wellons, hash-prospector, bias 0.107).
    """
    value = value ^ (value >> 16)
    value = (value * 0x21F0AAAD) & _MASK32
    value = value ^ (value >> 15)
    value = (value * 0x735A2D97) & _MASK32
    return value ^ (value >> 15)


def hash_bits(place: Tensor, key: int | Tensor, layer: int, units: int) -> Tensor:
    """(B, U) int64 hash, uniform on 0 .. 2^32 - 1, of place and unit under the key of a step and of a layer.

    Parameters
    ----------
    place
        (B,) int64, below 2^32.
    key
        Of the step, 64 bits; a () int64 on the device where the host must not know it.
    layer
        Of the layer, 32 bits.
    """
    own = mix64(key ^ layer)
    low, high, more = own & _MASK32, _shifted(own, 32), mix64(own) & _MASK32
    cells = mix32(place ^ low)
    unit = torch.arange(units, device=place.device, dtype=torch.int64)
    codes = (unit * 0x9E3779B1 + high) & _MASK32
    mixed = mix32(cells[:, None] ^ codes)
    return mix32((mixed + more) & _MASK32)


@dataclass(frozen=True)
class Dropout:
    """Which units of a hidden layer are zeroed: those whose hash is small.

    Attributes
    ----------
    place, key, layer
        Of the hash.
    rate
        Share that is zeroed; the others are scaled by 1 / (1 - rate).
    """

    place: Tensor
    key: int | Tensor
    layer: int
    rate: float

    @property
    def threshold(self) -> int:
        return round(self.rate * 2**32)

    @property
    def scale(self) -> float:
        return 1.0 / (1.0 - self.rate)

    def of(self, hidden: Tensor) -> Tensor:
        kept = hash_bits(self.place, self.key, self.layer, hidden.shape[1]) >= self.threshold
        return hidden * kept.to(hidden.dtype).mul_(self.scale)
