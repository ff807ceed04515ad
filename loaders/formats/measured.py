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

Extent = tuple[float, float, bool]
"""(least, largest, whether all are whole) of some values, with 0 as one of them; NaN where one is NaN."""

Measured = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], list[Extent]]
"""(R,) entries and (R,) sum of each row, and the extents of the values."""


def extent(values: npt.NDArray[Any]) -> Extent:
    """Of values in their travelling type."""
    is_whole = values.dtype.kind == "u" or bool((values == np.floor(values)).all())
    return float(values.min(initial=0)), float(values.max(initial=0)), is_whole


def measured(rows: SparseRows) -> Measured:
    return np.diff(rows.indptr), row_sums(rows.indptr, rows.values), [extent(rows.values)]


def joined(parts: Sequence[Measured]) -> Measured:
    """Of rows below each other."""
    return (
        np.concatenate([np.zeros(0, np.int64), *(lengths for lengths, _, _ in parts)]),
        np.concatenate([np.zeros(0), *(sums for _, sums, _ in parts)]),
        [one for _, _, extents in parts for one in extents],
    )


def check_counts(where: str, extents: Sequence[Extent]) -> None:
    """Look at the values of a matrix that no ingest has looked at.

    Raises
    ------
    ValueError
        Some cannot be counts. What hardly is one is remarked upon.
    """
    least, largest = np.array([pair[:2] for pair in extents] or [(0.0, 0.0)]).T
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
    if not all(is_whole for _, _, is_whole in extents):
        _log.warning(
            "%s: not all counts are integers (the largest is %.4g), as after a normalisation; training models counts:"
            " name the layer that holds them",
            where,
            high,
        )
    if remark := remark_on_largest(high):
        _log.warning("%s: %s", where, remark)
