"""How a kernel is cut into programs and started, and the parts of Triton code that several kernels share.

Names in kernels: a program works on CELLS x FEATURES of the counts; INPUTS of a table are read as WIDTH columns, the
next power of two. Sums are never cut among programs with atomics: partial sums are stored and added in one order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liam_scale.kernels.options import Precision

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on CPU tensors; it reads the environment once, when a kernel is defined."""

PROGRAMS = 264
"""Programs that the features of all cells are cut into: two for each of an H100's 132 processors. Fixed, so that sums
have one order on every card."""

MAX_WIDTH = 128
"""Widest table that a program holds rows of; wider layers take the plain path."""

PADDING = 128
"""Cells and features of dense counts are padded to multiples of this, so that no program looks for their end."""

ROWS_TO_CUT = 32

_ROUNDED_IN_BITS = tl.constexpr(IS_INTERPRETED)


@dataclass(frozen=True)
class Tile:
    """What one program works on, and how.

    Attributes
    ----------
    cells, features
        Size of its tile of the counts, powers of two up to `PADDING`.
    warps, stages
        Threads / 32; tiles whose loads are in flight at once.
    """

    cells: int
    features: int
    warps: int
    stages: int


def width_of(inputs: int) -> int:
    """Columns that a table of so many is read as; tensor cores take 16 at least."""
    return max(16, 1 << max(0, inputs - 1).bit_length())


@dataclass(frozen=True)
class Grid:
    """Programs over cells and, in `splits` parts of `length` tiles each, over features."""

    cells: int
    splits: int
    length: int
    tiles: int


def split(num_cells: int, num_features: int, tile: Tile) -> Grid:
    cells, tiles = -(-num_cells // tile.cells), -(-num_features // tile.features)
    length = -(-tiles // max(1, min(tiles, PROGRAMS // max(1, cells))))
    return Grid(cells, -(-tiles // length), length, tiles)


def pieces_of(table: Tensor, precision: Precision) -> Tensor:
    """(pieces, R, width) of a table (R, K), cut once for all walks, which load them as they are multiplied."""
    rows, inputs = table.shape
    is_wide = precision == "tf32" or IS_INTERPRETED
    shape = (3 if precision == "float32" else 1, rows, width_of(inputs))
    pieces = table.new_empty(shape, dtype=torch.float32 if is_wide else torch.bfloat16)
    constants: dict[str, Any] = {"PRECISION": precision, "INPUTS": inputs, "WIDTH": shape[2], "ROWS": ROWS_TO_CUT}
    launch(cut_table, (-(-rows // ROWS_TO_CUT),), (table, pieces, rows), **constants)
    return pieces


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], tile: Tile | None = None, **constants: Any
) -> None:
    """Start a kernel where its first argument lives; all kernels start here."""
    if tile is not None:
        constants |= {"CELLS": tile.cells, "FEATURES": tile.features}
        constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if arguments[0].device.type != "cuda":
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(arguments[0].device):
        kernel[grid](*arguments, **constants)


@triton.jit
def bfloat16_of(x):
    """The nearest bfloat16; interpreted, where products know float32 alone, as that number in float32."""
    if _ROUNDED_IN_BITS:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def tf32_of(x):
    """The nearest number of 10 bits of mantissa; tensor cores cut the others off, which would shift every sum."""
    if _ROUNDED_IN_BITS:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def cut(x, PRECISION: tl.constexpr):
    """The three numbers that tensor cores take for one; the first alone counts where the precision is below float32.

    float32 is the sum of three bfloat16, which hold its 24 bits. Two would do with half the products but keep 16 bits:
    gradients were 4.5e-6 of their norm off, where those of float32 are 0.3e-6.
    """
    if PRECISION == "tf32":
        high = tf32_of(x)
        return high, high, high
    else:
        high = bfloat16_of(x)
        if PRECISION == "bf16":
            return high, high, high
        else:
            rest = x - high.to(tl.float32)
            middle = bfloat16_of(rest)
            return high, middle, bfloat16_of(rest - middle.to(tl.float32))


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr, IS_EXACT: tl.constexpr = False):
    """total + a b of numbers in pieces, down to 24 bits. IS_EXACT: the first piece of `a` is all of it."""
    if PRECISION == "tf32":
        return tl.dot(a[0], b[0], total, input_precision="tf32")
    else:
        if PRECISION == "float32":
            total = tl.dot(a[0], b[2], total)
            if not IS_EXACT:
                total = tl.dot(a[2], b[0], total)
                total = tl.dot(a[1], b[1], total)
            total = tl.dot(a[0], b[1], total)
            if not IS_EXACT:
                total = tl.dot(a[1], b[0], total)
        return tl.dot(a[0], b[0], total)


@triton.jit
def transposed(pieces):
    return tl.trans(pieces[0]), tl.trans(pieces[1]), tl.trans(pieces[2])


@triton.jit
def load_pieces(pieces, rows, end, PRECISION: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of a table that `cut_table` made, zeros outside."""
    at = rows.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (rows < end)[:, None]
    high = tl.load(pieces + at, mask=inside, other=0.0)
    if PRECISION == "float32":
        size = end.to(tl.int64) * WIDTH
        middle = tl.load(pieces + size + at, mask=inside, other=0.0)
        return high, middle, tl.load(pieces + 2 * size + at, mask=inside, other=0.0)
    else:
        return high, high, high


@triton.jit
def load_table(table, rows, end, INPUTS: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of a row-major table, zeros outside."""
    k = tl.arange(0, WIDTH)
    inside = (rows < end)[:, None]
    if INPUTS != WIDTH:
        inside = inside & (k < INPUTS)[None, :]
    return tl.load(table + rows.to(tl.int64)[:, None] * INPUTS + k[None, :], mask=inside, other=0.0)


@triton.jit
def store_table(table, rows, end, values, INPUTS: tl.constexpr, WIDTH: tl.constexpr):
    k = tl.arange(0, WIDTH)
    inside = (rows < end)[:, None]
    if INPUTS != WIDTH:
        inside = inside & (k < INPUTS)[None, :]
    tl.store(table + rows.to(tl.int64)[:, None] * INPUTS + k[None, :], values, mask=inside)


@triton.jit
def load_counts(dense, stride, rows, cols):
    """(rows, cols) of the padded dense counts, float32."""
    return tl.load(dense + rows.to(tl.int64)[:, None] * stride + cols[None, :]).to(tl.float32)


@triton.jit
def log1p(x):
    """Keeps its digits for small x (Kahan)."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))


@triton.jit(do_not_specialize=["rows"])
def cut_table(
    table, pieces, rows, PRECISION: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """pieces (1 or 3, rows, WIDTH) of a table (rows, INPUTS)."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = cut(load_table(table, own, rows, INPUTS, WIDTH), PRECISION)
    store_table(pieces, own, rows, found[0], WIDTH, WIDTH)
    if PRECISION == "float32":
        size = rows.to(tl.int64) * WIDTH
        store_table(pieces + size, own, rows, found[1], WIDTH, WIDTH)
        store_table(pieces + 2 * size, own, rows, found[2], WIDTH, WIDTH)
