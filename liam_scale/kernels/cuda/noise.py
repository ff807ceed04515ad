"""The hash that noise is made of (`liam_scale.model.noise`) in one launch, where plain torch takes twenty.

Shapes: B cells, U units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liam_scale.kernels.cuda.launch import launch

UNITS_AT_ONCE = 128


def hash_bits(place: Tensor, keys: tuple[int, int, int], units: int) -> Tensor:
    """(B, U) int64 hash of place and unit under three keys of 32 bits."""
    bits = torch.empty(len(place), units, dtype=torch.int64, device=place.device)
    # as signed numbers, so that Triton compiles one kernel and not one for each length of a key
    signed = [key - 2**32 if key >= 2**31 else key for key in keys]
    grid = (len(place), -(-units // UNITS_AT_ONCE))
    launch(noise_bits, grid, (place, bits, *signed, units), UNITS=UNITS_AT_ONCE)
    return bits


@triton.jit
def _mix(value):
    value ^= value >> 16
    value *= 0x21F0AAAD
    value ^= value >> 15
    value *= 0x735A2D97
    return value ^ (value >> 15)


@triton.jit(do_not_specialize=["low", "high", "more", "units"])
def noise_bits(place, bits, low, high, more, units, UNITS: tl.constexpr):
    """In unsigned 32 bits, which wrap as the masks of plain torch do."""
    cell, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    own = _mix(tl.load(place + cell).to(tl.uint32) ^ low.to(tl.uint32))
    codes = unit.to(tl.uint32) * 0x9E3779B1 + high.to(tl.uint32)
    found = _mix(_mix(own ^ codes) + more.to(tl.uint32))
    tl.store(bits + cell * units + unit, found.to(tl.int64), mask=unit < units)
