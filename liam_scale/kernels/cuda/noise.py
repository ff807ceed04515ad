"""The hash that noise is made of (`device.noise`) in one launch, where plain torch takes twenty.

Shapes: B cells, U units.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from liam_scale.kernels.cuda.launch import launch
from liam_scale.kernels.device.noise import signed

UNITS_AT_ONCE = 128


def on_device(key: int | Tensor, device: torch.device) -> Tensor:
    """() int64; filled by the device and not copied there, which would be waited for."""
    return key if isinstance(key, Tensor) else _filled(key, device)


@functools.lru_cache(maxsize=1)
def _filled(key: int, device: torch.device) -> Tensor:
    """The layers of a step share it."""
    return torch.full((), signed(key, 64), dtype=torch.int64, device=device)


def hash_bits(place: Tensor, key: int | Tensor, layer: int, units: int) -> Tensor:
    """As `device.noise.hash_bits`."""
    bits = torch.empty(len(place), units, dtype=torch.int64, device=place.device)
    grid = (len(place), -(-units // UNITS_AT_ONCE))
    # a signed number, so that Triton compiles one kernel and not one for each length of it
    arguments = (place, on_device(key, place.device), bits, signed(layer, 32), units)
    launch(noise_bits, grid, arguments, UNITS=UNITS_AT_ONCE)
    return bits


@triton.jit
def _mix(value):
    value ^= value >> 16
    value *= 0x21F0AAAD
    value ^= value >> 15
    value *= 0x735A2D97
    return value ^ (value >> 15)


@triton.jit
def _mix64(value):
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def hashed(place, unit, key, layer):
    """uint32 hash of places and units that broadcast; integers without a sign wrap as the masks of plain torch do."""
    own = _mix64(tl.load(key).to(tl.uint64) ^ layer.to(tl.uint32).to(tl.uint64))
    codes = unit.to(tl.uint32) * 0x9E3779B1 + (own >> 32).to(tl.uint32)
    cells = _mix(place.to(tl.uint32) ^ own.to(tl.uint32))
    return _mix(_mix(cells ^ codes) + _mix64(own).to(tl.uint32))


@triton.jit(do_not_specialize=["layer", "units"])
def noise_bits(place, key, bits, layer, units, UNITS: tl.constexpr):
    cell, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    found = hashed(tl.load(place + cell), unit, key, layer)
    tl.store(bits + cell * units + unit, found.to(tl.int64), mask=unit < units)
