"""Draws the counts of simulated cells: a Poisson process over the features, walked in feature order.

A cell's expected counts are `depth * (w p_a + (1 - w) p_b) * effect_s`: two archetypes a and b (the cell's type and
another one), mixed by w, and the multiplicative effect of its sample s. Drawing the points of the process in ascending
order by exponential gaps gives sorted columns with their multiplicities at once: no sort, no hash table.

Shapes: B cells, K archetypes, S samples, F features, G guide cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.csr import compiled
from loaders.plan import splitmix64

_GAP_BITS = 12
"""The exponential gaps are rounded to 4,096 quantile means: the mean is exact, the variance 0.1% low."""

EFFECT_BITS = 8
"""Sample effects are probabilities in steps of 1/256: a point of the process is kept with the effect's probability."""


@dataclass(frozen=True)
class Archetypes:
    """Tables of one modality.

    Attributes
    ----------
    cumulative
        (K, F) float64, cumulative share of each feature in each archetype; the last is 1.
    guide
        (K, G + 1) int32, first feature whose cumulative share exceeds g / G.
    keep
        (S, F) uint16 effect of each sample, 256 = one.
    points_per_depth
        Points drawn per unit of depth, before the sample's effect removes some.
    """

    cumulative: npt.NDArray[np.float64]
    guide: npt.NDArray[np.int32]
    keep: npt.NDArray[np.uint16]
    points_per_depth: float


def make_archetypes(
    num_types: int,
    num_samples: int,
    num_features: int,
    *,
    nonzeros_per_cell: float,
    popularity_sigma: float,
    type_sigma: float,
    sample_sigma: float,
    depths: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> Archetypes:
    """Log-normal rates of features, types and samples, and the depth that meets the mean number of non-zeros.

    Parameters
    ----------
    popularity_sigma, type_sigma, sample_sigma
        Standard deviations of log rates: between features, between types in a fifth of the features, between samples.
    depths
        Typical relative depths of cells, used to meet `nonzeros_per_cell` on average.
    """
    popularity = rng.normal(0.0, popularity_sigma, num_features)
    is_marker = rng.random((num_types, num_features)) < 0.2
    rates = np.exp(popularity + is_marker * rng.normal(0.0, type_sigma, (num_types, num_features)))
    rates /= rates.sum(axis=1, keepdims=True)
    effect = np.exp(rng.normal(0.0, sample_sigma, (num_samples, num_features)))
    # Thinning can only lower a rate, so effects are relative to the upper 2%; what lies above is cut.
    effect = np.clip(effect / np.exp(2.05 * sample_sigma), 1 / 256, 1.0)
    keep = np.round(effect * 2**EFFECT_BITS).astype(np.uint16)
    cumulative = np.cumsum(rates, axis=1)
    cumulative[:, -1] = 1.0
    num_guide = 1 << int(np.ceil(np.log2(2 * num_features)))
    guide = np.stack([np.searchsorted(row, np.arange(num_guide + 1) / num_guide, side="right") for row in cumulative])
    guide = np.minimum(guide, num_features - 1)
    mean_rates = (rates[:, None, :] * (keep / 2**EFFECT_BITS)[None, :, :]).reshape(-1, num_features)
    if len(mean_rates) > 16:
        mean_rates = mean_rates[rng.choice(len(mean_rates), 16, replace=False)]
    points = _points_for(mean_rates, depths, nonzeros_per_cell)
    return Archetypes(cumulative, guide.astype(np.int32), keep, points)


def _points_for(rates: npt.NDArray[np.float64], depths: npt.NDArray[np.float64], nonzeros: float) -> float:
    """Number of points with which `nonzeros` distinct features are expected, by bisection of its logarithm."""
    low, high = 0.0, 25.0
    for _ in range(40):
        middle = (low + high) / 2
        distinct = np.mean([-np.expm1(-np.exp(middle) * depth * rates).sum(axis=1).mean() for depth in depths])
        low, high = (middle, high) if distinct < nonzeros else (low, middle)
    return float(np.exp(low))


def gap_table() -> npt.NDArray[np.float64]:
    """(4096,) mean of a unit exponential within each of 4,096 equally likely intervals."""
    edges = np.arange(2**_GAP_BITS + 1) / 2**_GAP_BITS
    survival = 1.0 - edges
    with np.errstate(divide="ignore", invalid="ignore"):
        # Integral of -log(s) over [s1, s0] is [s - s log s].
        primitive = np.where(survival > 0, survival - survival * np.log(survival), 0.0)
    return -np.diff(primitive) * 2**_GAP_BITS


@compiled(inline="always")
def _next(state: Any) -> Any:
    """xorshift64*: state only, the multiplication is the caller's."""
    state ^= state >> np.uint64(12)
    state ^= state << np.uint64(25)
    state ^= state >> np.uint64(27)
    return state


_mixed = compiled(splitmix64)


@compiled
def hash64(number: Any) -> Any:
    """A well mixed 64-bit number; never 0, as xorshift needs."""
    return _mixed(np.uint64(number)) | np.uint64(1)


@compiled
def draw_cells(
    keys: npt.NDArray[np.uint64],
    types: npt.NDArray[np.int64],
    others: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64],
    samples: npt.NDArray[np.int64],
    points: npt.NDArray[np.float64],
    cumulative: npt.NDArray[np.float64],
    guide: npt.NDArray[np.int32],
    keep: npt.NDArray[np.uint16],
    gaps: npt.NDArray[np.float64],
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    values: npt.NDArray[Any],
    scratch: npt.NDArray[np.int32],
) -> int:
    """Fill indices and values row by row; values saturate at their type's maximum.

    keys, types, others, weights, samples, points: (B,). indptr: (B + 1,), filled. scratch: (2, most points of a cell).
    Returns -1, or the first row that has no room.
    """
    top = np.iinfo(values.dtype).max
    entry = 0
    indptr[0] = 0
    for cell in range(len(keys)):
        own, mixed, effect = types[cell], others[cell], keep[samples[cell]]
        count_own = _walk(
            keys[cell], points[cell] * weights[cell], cumulative[own], guide[own], effect, gaps, scratch[0]
        )
        key = hash64(keys[cell])
        rest = points[cell] * (1.0 - weights[cell])
        count_mixed = _walk(key, rest, cumulative[mixed], guide[mixed], effect, gaps, scratch[1])
        if count_own < 0 or count_mixed < 0 or entry + count_own + count_mixed > len(indices):
            return cell
        i = j = 0
        last = -1
        while i < count_own or j < count_mixed:
            if j >= count_mixed or (i < count_own and scratch[0, i] <= scratch[1, j]):
                feature = scratch[0, i]
                i += 1
            else:
                feature = scratch[1, j]
                j += 1
            if feature != last:
                indices[entry] = feature
                values[entry] = 1
                entry += 1
                last = feature
            elif values[entry - 1] < top:
                values[entry - 1] += 1
        indptr[cell + 1] = entry
    return -1


@compiled
def _walk(
    key: Any,
    points: float,
    cumulative: npt.NDArray[np.float64],
    guide: npt.NDArray[np.int32],
    effect: npt.NDArray[np.uint16],
    gaps: npt.NDArray[np.float64],
    features: npt.NDArray[np.int32],
) -> int:
    """Points of one Poisson process in ascending order, thinned by the effect; their number, or -1 without room."""
    state = hash64(key)
    step = 1.0 / max(points, 1e-9)
    num_guide = len(guide) - 1
    at = 0.0
    count = 0
    while True:
        state = _next(state)
        bits = state * np.uint64(2685821657736338717)
        # Three gaps of 12 bits and three coins of 8 bits from the upper 60 bits of one draw.
        for _ in range(3):
            at += gaps[bits >> np.uint64(52)] * step
            if at >= 1.0:
                return count
            coin = (bits >> np.uint64(44)) & np.uint64(255)
            bits = bits << np.uint64(20)
            feature = guide[int(at * num_guide)]
            while cumulative[feature] < at:
                feature += 1
            if coin < effect[feature]:
                if count == len(features):
                    return -1
                features[count] = feature
                count += 1
