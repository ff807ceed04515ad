"""Noise as a function: reparameterisation noise and dropout masks from (seed, step, place, layer, unit).

No generator has a state, so a checkpoint holds none and every number of ranks draws the same noise for a cell.

Shapes: B cells, U units of a layer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from liam_scale.kernels.backends import backend_of
from liam_scale.kernels.device.noise import Dropout, step_key


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
    return _hash(place, step_key(seed=seed, step=step), layer, units)


def _hash(place: Tensor, key: int | Tensor, layer: str, units: int) -> Tensor:
    return backend_of("noise", "auto", place.device).hash_bits(place.long(), key, _code(layer), units)


def _code(layer: str) -> int:
    return zlib.crc32(layer.encode())


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
    key
        () int64 on the device, `step_key` of seed and step, in their place: for a step that is recorded.
    """

    seed: int
    step: int
    place: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)
    key: Tensor | None = None

    @cached_property
    def _key(self) -> int | Tensor:
        return step_key(seed=self.seed, step=self.step) if self.key is None else self.key

    def normal(self, layer: str, units: int, *, dtype: torch.dtype) -> Tensor:
        """(B, units) standard normal, by Box and Muller: the radius reaches 6.76, and no value is infinite."""
        if layer in self.given:
            return self.given[layer].to(dtype=dtype, device=self.place.device)
        bits = _hash(self.place, self._key, layer, 2 * units).double()
        radius = torch.sqrt(-2.0 * torch.log((bits[:, :units] + 0.5) * 2.0**-32))
        angle = bits[:, units:] * (2.0 * math.pi * 2.0**-32)
        return (radius * torch.cos(angle)).to(dtype)

    def dropout(self, layer: str, rate: float) -> Dropout | None:
        """What zeroes a share of the units of a layer and scales the others by 1 / (1 - rate)."""
        return None if rate == 0.0 else Dropout(self.place.long(), self._key, _code(layer), rate)
