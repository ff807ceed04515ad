"""Sparse rows in NumPy: the form in which counts travel from a store to a minibatch.

Shapes: B rows (cells), F features, N non-zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse


@dataclass(frozen=True)
class SparseRows:
    """B rows of a sparse matrix with F columns, compressed by row; columns within a row ascend.

    Attributes
    ----------
    indptr
        (B + 1,) int64; row i holds the entries indptr[i]:indptr[i + 1].
    indices
        (N,) column of each entry, an unsigned type or int32.
    values
        (N,) uint8, uint16, uint32 or float32.
    num_features
        F.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.integer]
    values: npt.NDArray[np.generic]
    num_features: int

    @property
    def num_rows(self) -> int:
        return len(self.indptr) - 1

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """The same rows as a SciPy CSR matrix, values as float32."""
        return scipy.sparse.csr_matrix(
            (self.values.astype(np.float32), self.indices.astype(np.int32), self.indptr),
            shape=(self.num_rows, self.num_features),
        )

    @classmethod
    def from_scipy(cls, matrix: Any) -> SparseRows:
        """Rows of any SciPy sparse matrix."""
        rows = scipy.sparse.csr_matrix(matrix)
        rows.sort_indices()
        return cls(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data, rows.shape[1])


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile with Numba without the GIL, and keep the machine code on disk where some place is writable.

    Every kernel goes through here, as `@compiled` or with further options of `numba.njit`: `@compiled(fastmath=True)`.
    """
    if function is None:
        return partial(compiled, **options)
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # a read-only installation without a cache directory: compile in every process (1-2 s)
        return numba.njit(nogil=True, **options)(function)


# Kernels count with unsigned integers: with signed ones Numba checks for negative indices, which keeps LLVM from
# vectorising (5.2 against 1.0 microseconds a cell of 1,204 non-zeros).


@compiled
def gather_rows(indices, values, starts, lengths, places, out_indices, out_values):  # type: ignore[no-untyped-def]
    """Copy rows into packed buffers, casting to the buffers' types.

    Parameters
    ----------
    indices, values
        (n,) entries of a window.
    starts, lengths
        (B,) int64: where each row begins in them and how many entries it has.
    places
        (B,) int64: where each row begins in the buffers.
    out_indices, out_values
        Buffers that hold all rows; entries of other rows are left alone.
    """
    for row in range(len(starts)):
        source, target = np.uint64(starts[row]), np.uint64(places[row])
        for k in range(np.uint64(lengths[row])):
            out_indices[target + k] = indices[source + k]
            out_values[target + k] = values[source + k]


@compiled
def transpose_rows(indptr, indices, values, feature_indptr, cells, feature_values):  # type: ignore[no-untyped-def]
    """Transpose (B, F) rows by a counting sort: entries by feature, within a feature by cell.

    Parameters
    ----------
    indptr, indices, values
        (B + 1,), (N,), (N,): the rows.
    feature_indptr, cells, feature_values
        (F + 1,), (N,), (N,) buffers of the result.
    """
    one = np.uint64(1)
    num_features = np.uint64(len(feature_indptr) - 1)
    feature_indptr[:] = 0
    for k in range(np.uint64(indptr[0]), np.uint64(indptr[-1])):
        feature_indptr[np.uint64(indices[k]) + one] += np.int32(1)
    # feature_indptr[f + 1] first counts f, then is where f begins, and at last where f ends.
    start = np.int32(0)
    for feature in range(num_features):
        count = feature_indptr[feature + one]
        feature_indptr[feature + one] = start
        start += count
    for row in range(np.uint64(len(indptr) - 1)):
        for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + one])):
            slot = np.uint64(indices[k]) + one
            place = feature_indptr[slot]
            feature_indptr[slot] = place + np.int32(1)
            cells[np.uint64(place)] = row
            feature_values[np.uint64(place)] = values[k]


SORTED, UNSORTED, OUT_OF_RANGE = 0, 1, 2


@compiled
def inspect_columns(indptr, indices, num_features):  # type: ignore[no-untyped-def]
    """First row whose columns are not ascending or not within 0..F - 1, and which of the two it is.

    Returns (number of rows, SORTED) for sound rows. A column outside the range stops the search; a row that is only
    unsorted is reported when no column is.
    """
    found, state = len(indptr) - 1, SORTED
    one = np.uint64(1)
    for row in range(len(indptr) - 1):
        begin, end = np.uint64(indptr[row] - indptr[0]), np.uint64(indptr[row + 1] - indptr[0])
        if begin == end:
            continue
        # Without a branch in the loop it runs at 8 to 16 columns a cycle: 0.1 instead of 1.4 microseconds a cell.
        descends = False
        for k in range(begin + one, end):
            descends |= indices[k] <= indices[k - one]
        if not descends and indices[begin] >= 0 and indices[end - one] < num_features:
            continue
        for k in range(begin, end):
            if indices[k] < 0 or indices[k] >= num_features:
                return row, OUT_OF_RANGE
        if state == SORTED:
            found, state = row, UNSORTED
    return found, state


@compiled
def centred_log_ratio(indptr, values, num_features):  # type: ignore[no-untyped-def]
    """Replace the values x of each row by log1p(x / exp(sum_{x > 0} log1p(x) / F)), in place.

    Seurat's CLR by cell (Stoeckius et al., Nature Methods 2017, as in Seurat v4 `NormalizeData(margin = 2)`).
    """
    for row in range(len(indptr) - 1):
        total = 0.0
        for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            if values[k] > 0:
                total += np.log1p(np.float64(values[k]))
        scale = np.exp(total / num_features)
        for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            values[k] = np.log1p(values[k] / scale)
