"""What a pass over a matrix finds: entries and sum of each row, and whether its values can be counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.csr import LARGEST, SparseRows, remark_on_largest, row_sums

_log = logging.getLogger(__name__)

Extent = tuple[float, float, int, int]
"""(least, largest, number that are no integers, number) of some values, with 0 as one of them; NaN where one is NaN."""

Measured = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], list[Extent]]
"""(R,) entries and (R,) sum of each row, and the extents of the values."""


def extent(values: npt.NDArray[Any]) -> Extent:
    """Of values in their travelling type."""
    broken = 0 if values.dtype.kind == "u" else int(np.count_nonzero(values != np.floor(values)))
    return float(values.min(initial=0)), float(values.max(initial=0)), broken, len(values)


def measured(rows: SparseRows) -> Measured:
    return np.diff(rows.indptr), row_sums(rows.indptr, rows.values), [extent(rows.values)]


def joined(parts: Sequence[Measured]) -> Measured:
    """Of rows below each other."""
    return (
        np.concatenate([np.zeros(0, np.int64), *(lengths for lengths, _, _ in parts)]),
        np.concatenate([np.zeros(0), *(sums for _, sums, _ in parts)]),
        [one for _, _, extents in parts for one in extents],
    )


def no_integers(share: float, largest: float) -> str:
    """What an ingest refuses, and a training that streams remarks upon, in the same words."""
    looks = "log-normalised" if largest < 20 else "normalised"
    part = "under 1%" if share < 0.005 else f"{share:.0%}"
    return (
        f"counts are integers; {part} of the values read are not and the largest is {largest:.4g}, so they look {looks}"
    )


def check_counts(where: str, extents: Sequence[Extent]) -> None:
    """Look at the values of a matrix that no ingest has looked at.

    Raises
    ------
    ValueError
        Some cannot be counts. What hardly is one is remarked upon.
    """
    least, largest, broken, numbers = np.array(extents or [(0.0, 0.0, 0, 0)]).T
    low, high = float(least.min()), float(largest.max())
    cure = "an ingest names the cell; replace missing values by 0 or remove the cell"
    if not math.isfinite(low + high):
        bad = high if math.isfinite(low) else low
        raise ValueError(f"{where}: got {bad} among the counts, which are finite; {cure}")
    if low < 0:
        raise ValueError(
            f"{where}: got {low:.6g}, counts are not negative; these look scaled or centred: choose the layer that"
            " holds raw counts"
        )
    if high > LARGEST:
        raise ValueError(f"{where}: got {high:.10g}, counts are at most {LARGEST}; look for a corrupt matrix")
    if broken.any():
        told = no_integers(float(broken.sum() / numbers.sum()), high)
        _log.warning("%s: %s: choose the layer that holds raw counts; these are taken as they are", where, told)
    if remark := remark_on_largest(high):
        _log.warning("%s: %s", where, remark)
