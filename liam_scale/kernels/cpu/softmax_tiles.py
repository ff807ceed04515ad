"""Tiles of a softmax over all features, on the CPU: the exponentials are kept where they fit, else made again.

Shapes: B cells, C cells that count, F features, H hidden units, T features of a tile. A tile is feature-major (T, B):
sums over features run down columns and vectorise, and the walk over the non-zeros of a feature stays in one row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liam_scale.kernels.cpu import threads
from liam_scale.kernels.cpu.sparse import ByFeature
from liam_scale.kernels.cpu.vector_math import FAST_MATH, exp, store
from loaders.csr import compiled


@functools.cache
def has_onednn() -> bool:
    """Whether torch hands out oneDNN's float32 product on this processor.

    `torch.mm` in float32 goes to MKL, which runs at less than half speed on AMD processors: the three products of
    128 x 116,490 x 129 take 143 ms there and 72 ms through oneDNN (one thread, Zen 5). oneDNN also keeps to one thread
    on a worker thread, where MKL would start its own.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def multiply_transposed(left: Tensor, right: Tensor) -> Tensor:
    """(M, N) = left (M, K) right (N, K)^T, of CPU tensors."""
    if left.dtype == torch.float32 and has_onednn() and min(left.shape) and min(right.shape):
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return torch.mm(left, right.T)


TILE_ELEMENTS = 2**18
"""Logits of a tile: 1 MiB in float32, which one core's L2 cache holds."""

MIN_TILE, MAX_TILE = 256, 2048
"""Features of a tile."""


def tile_features(cells: int, features: int) -> int:
    """Features of a tile of a layer, so that a tile has about TILE_ELEMENTS logits."""
    wanted = max(MIN_TILE, min(MAX_TILE, TILE_ELEMENTS // max(1, cells) // 64 * 64))
    return min(wanted, max(1, features))


@dataclass(frozen=True)
class TiledLayer:
    """A decoder's output layer and the counts it explains, cut into tiles of features.

    Attributes
    ----------
    entries
        Counts by feature; their cells are numbered 0..B-1.
    column
        (B,) int32 place of each cell among the C of the layer, -1 for the others.
    hidden
        (C, H) contiguous.
    weight, bias
        (F, H), (F,) contiguous.
    is_bf16
        Products in bfloat16, and the exponentials that they read.
    """

    entries: ByFeature
    column: Any
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    is_bf16: bool

    @property
    def num_cells(self) -> int:
        return len(self.hidden)

    @functools.cached_property
    def tile(self) -> int:
        return tile_features(self.num_cells, len(self.weight))

    @property
    def num_tiles(self) -> int:
        return -(-len(self.weight) // self.tile)

    def product(self, features: slice) -> Tensor:
        """(T, C) weight hidden^T, in bfloat16 with `is_bf16`."""
        weight = self.weight[features]
        if self.is_bf16:
            return torch.mm(weight.to(torch.bfloat16), self._narrow_hidden)
        return multiply_transposed(weight, self.hidden)

    @functools.cached_property
    def _narrow_hidden(self) -> Tensor:
        return self.hidden.to(torch.bfloat16).T

    def features(self, tile: int) -> slice:
        return slice(tile * self.tile, min((tile + 1) * self.tile, len(self.weight)))


@dataclass(frozen=True)
class Cache:
    """Exponentials of the first tiles, exp(logit - maximum of its cell in the tile).

    Attributes
    ----------
    exponentials
        (tiles, T, B) in the dtype of the products; bfloat16 for bf16.
    maxima
        (tiles, B).
    """

    exponentials: Tensor
    maxima: Tensor

    @property
    def num_tiles(self) -> int:
        return len(self.maxima)


def make_cache(
    num_tiles: int, tile: int, cells: int, dtype: torch.dtype, store_dtype: torch.dtype, num_bytes: int
) -> Cache:
    """As many tiles as fit into num_bytes, in memory that is kept from call to call."""
    tile_bytes = cells * (tile * store_dtype.itemsize + dtype.itemsize)
    fitting = max(0, min(num_tiles, num_bytes // max(1, tile_bytes)))
    exponentials = threads.workspace("softmax tiles", (fitting, tile, cells), store_dtype)
    return Cache(exponentials, threads.workspace("softmax maxima", (fitting, cells), dtype))


def as_array(tensor: Tensor) -> Any:
    """A NumPy view; bfloat16, which NumPy lacks, as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def augmented(hidden: Tensor, *columns: Tensor) -> Tensor:
    """The inputs as rows: hidden state (H, B), ones, which make the bias's gradient a column of a product, and more."""
    ones = torch.ones(len(hidden), 1, dtype=hidden.dtype)
    return torch.cat([hidden, ones, *(column[:, None] for column in columns)], dim=1).T.contiguous()


def gradient_products(slopes: Tensor, augmented_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two products of a tile: (T, H + 1) = slopes hidden^T, and (H, B) = weight^T slopes.

    Both run in bfloat16 if the slopes (T, B) do.
    """
    if slopes.dtype == torch.bfloat16:
        by_feature = torch.mm(slopes, augmented_hidden.to(torch.bfloat16).T)
        return by_feature, torch.mm(weight.to(torch.bfloat16).T, slopes)
    return multiply_transposed(slopes, augmented_hidden), multiply_transposed(weight.T, slopes.T)


@compiled(fastmath=FAST_MATH)
def exponentiate(logits: Any, bias: Any, kept: Any, maxima: Any, sums: Any, part: Any) -> None:
    """Per cell the tile's maximum and sum of exponentials; kept[t, b] = exp(logit + bias - maximum)."""
    features, cells = logits.shape
    for b in range(cells):
        maxima[b] = logits[0, b] + bias[0]
        sums[b] = 0
    for t in range(1, features):
        shift = bias[t]
        for b in range(cells):
            logit = logits[t, b] + shift
            maxima[b] = logit if logit > maxima[b] else maxima[b]
    # 32 features are summed before they are added to the rest: a float32 sum of 2,048 would lose two digits more
    for first in range(0, features, 32):
        for b in range(cells):
            part[b] = 0
        for t in range(first, min(first + 32, features)):
            shift = bias[t]
            for b in range(cells):
                value = exp(logits[t, b] + shift - maxima[b])
                part[b] += value
                store(kept, t, b, value)
        for b in range(cells):
            sums[b] += part[b]


@compiled(fastmath=FAST_MATH)
def merge(maxima: Any, sums: Any, total_maxima: Any, total_sums: Any) -> None:
    """Add a tile's sums, relative to its maxima, to running float64 sums relative to running maxima."""
    for b in range(len(maxima)):
        top = max(total_maxima[b], np.float64(maxima[b]))
        total_sums[b] = total_sums[b] * np.exp(total_maxima[b] - top) + sums[b] * np.exp(maxima[b] - top)
        total_maxima[b] = top


@compiled(fastmath=FAST_MATH)
def probabilities(logits: Any, bias: Any, normalizer: Any, kept: Any) -> None:
    """kept[t, b] = exp(logit + bias - normalizer of the cell): a tile that was not kept, made again."""
    features, cells = logits.shape
    for t in range(features):
        shift = bias[t]
        for b in range(cells):
            store(kept, t, b, exp(logits[t, b] + shift - normalizer[b]))
