"""Noise as a function: reparameterisation noise and dropout masks from (seed, step, place, layer, unit).

No generator has a state, so a checkpoint holds none and every number of ranks draws the same noise for a cell.

Shapes: B cells, U units of a layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from liam_scale.kernels.backends import backend_of, triton_serves

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def _mix64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix32(value: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64.

    Both multipliers are below 2^31, so no product leaves int64 and every device computes the same
    (constants: C. Wellons, hash-prospector, bias 0.107).
    """
    value = value ^ (value >> 16)
    value = (value * 0x21F0AAAD) & _MASK32
    value = value ^ (value >> 15)
    value = (value * 0x735A2D97) & _MASK32
    return value ^ (value >> 15)


def keys_of(*, seed: int, step: int, layer: str) -> tuple[int, int, int]:
    """Three keys of 32 bits, by which a noise's hash differs from all others."""
    key = 0
    for part in (seed, step, zlib.crc32(layer.encode())):
        key = _mix64(key ^ (part & _MASK64))
    return key & _MASK32, key >> 32, _mix64(key) & _MASK32


def hash_bits(*, seed: int, step: int, place: Tensor, layer: str, units: int) -> Tensor:
    """Hash of (seed, step, place, layer, unit).

    Parameters
    ----------
    seed, step
        Any integers.
    place
        (B,) int64 place of each cell in the global minibatch, below 2^32.
    layer
        Name of the noise; two names draw independently.
    units
        U.

    Returns
    -------
    (B, U) int64, uniform on 0 .. 2^32 - 1.
    """
    low, high, more = keys = keys_of(seed=seed, step=step, layer=layer)
    if place.device.type == "cuda" and triton_serves(place.device):
        return backend_of("noise", "auto", place.device).hash_bits(place.long(), keys, units)
    cells = _mix32(place.long() ^ low)
    unit = torch.arange(units, device=place.device, dtype=torch.int64)
    codes = (unit * 0x9E3779B1 + high) & _MASK32
    mixed = _mix32(cells[:, None] ^ codes)
    return _mix32((mixed + more) & _MASK32)


@dataclass(frozen=True)
class Noise:
    """All noise of one minibatch.

    Attributes
    ----------
    seed, step
        Keys of the run and of the optimizer step (counted over the whole run).
    place
        (B,) int64 place of each cell in the global minibatch.
    given
        Normal noise to use instead of drawn, by layer: (B, U). For comparisons with other implementations.
    """

    seed: int
    step: int
    place: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def _bits(self, layer: str, units: int) -> Tensor:
        return hash_bits(seed=self.seed, step=self.step, place=self.place, layer=layer, units=units)

    def normal(self, layer: str, units: int, *, dtype: torch.dtype) -> Tensor:
        """(B, units) standard normal, by Box and Muller: the radius reaches 6.76, and no value is infinite."""
        if layer in self.given:
            return self.given[layer].to(dtype=dtype, device=self.place.device)
        # MPS knows no float64; there a radius below 3e-4 is coarse and nothing else changes.
        wide = torch.float32 if self.place.device.type == "mps" else torch.float64
        bits = self._bits(layer, 2 * units).to(wide)
        radius = torch.sqrt(-2.0 * torch.log((bits[:, :units] + 0.5) * 2.0**-32))
        angle = bits[:, units:] * (2.0 * math.pi * 2.0**-32)
        return (radius * torch.cos(angle)).to(dtype)

    def dropout(self, hidden: Tensor, layer: str, rate: float) -> Tensor:
        """Zero a share of the units of `hidden` (B, U) and scale the others by 1 / (1 - rate)."""
        if rate == 0.0:
            return hidden
        kept = self._bits(layer, hidden.shape[1]) >= round(rate * 2**32)
        return hidden * kept.to(hidden.dtype).mul_(1.0 / (1.0 - rate))
