"""Sparse rows in NumPy, the form in which counts travel from a file to a minibatch, and all that is done with them.

Shapes: B rows (cells), F features, N non-zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse

LARGEST = 2**32 - 1
"""Of counts: what 32 bits hold."""

EXACT = 2**24
"""Counts below are exact in float32, in which training takes them."""


@dataclass(frozen=True)
class SparseRows:
    """B rows of a sparse matrix with F columns, compressed by row.

    Columns within a row ascend, and values are of the types below, unless the rows are said to be as a file holds them.

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
        """Rows of any SciPy sparse matrix; ValueError where its arrays do not go together."""
        rows = sound_csr(matrix)
        rows.sort_indices()
        return cls(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data, rows.shape[1])


def sound_csr(matrix: Any) -> scipy.sparse.csr_matrix:
    """Any SciPy matrix as CSR; ValueError where its arrays do not go together, which SciPy's loops do not look at."""
    if getattr(matrix, "format", None) in ("csr", "csc", "bsr"):
        try:
            matrix.check_format(full_check=True)
        except ValueError as error:
            raise ValueError(
                f"matrix: got arrays that do not go together ({error}); make it anew from its source"
            ) from None
    return scipy.sparse.csr_matrix(matrix)


def offsets_of(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """(B + 1,) where rows of these lengths begin, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def index_dtype(num_features: int) -> np.dtype[Any]:
    """uint16 while it can name every feature, else uint32."""
    return np.dtype(np.uint16 if num_features <= 1 << 16 else np.uint32)


def narrowest_dtype(maximum: int) -> np.dtype[Any]:
    """The narrowest of uint8, uint16, uint32 that holds `maximum`; ValueError if none does."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if maximum <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"counts: got a value of {maximum}, a store holds up to {LARGEST}; look for a corrupt matrix")


def travelling_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which values of a file's type travel: unsigned integers of at most 32 bits, else float32."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind in "iu":
        return np.dtype(f"uint{8 * min(4, dtype.itemsize)}")
    return np.dtype(np.float32)


def narrow(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values in their travelling type.

    Raises
    ------
    ValueError
        Negative integers, or integers beyond 32 bits.
    """
    dtype = travelling_dtype(values.dtype)
    if values.dtype.kind in "iu" and values.dtype != dtype and len(values):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > LARGEST:
            raise ValueError(
                f"got values from {low} to {high}; counts are integers from 0 to {LARGEST}: look for a corrupt matrix"
            )
    with np.errstate(over="ignore"):  # What float32 has no number for is refused as infinite.
        return values.astype(dtype, copy=False)


def remark_on_largest(largest: float) -> str | None:
    """What is to be said of counts that no cell has, and that training rounds."""
    if largest < EXACT:
        return None
    return (
        f"the largest count is {largest:,.0f}, which no cell has, and training rounds counts from {EXACT:,} on to"
        " float32; look for a corrupt matrix"
    )


def widest_dtype(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The travelling type that holds values of all; NumPy would widen uint32 beside float32 to 64 bits."""
    known = set(dtypes)
    return np.dtype(np.float32) if np.dtype(np.float32) in known else np.result_type(*known)


def slice_rows(rows: SparseRows, start: int, stop: int) -> SparseRows:
    """Rows [start, stop), sharing memory with the whole."""
    offsets = rows.indptr[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return SparseRows(offsets - first, rows.indices[first:last], rows.values[first:last], rows.num_features)


def concat_rows(parts: Sequence[SparseRows]) -> SparseRows:
    """Rows of several parts below each other, in the widest of their types."""
    if len(parts) == 1:
        return parts[0]
    types = {part.indices.dtype for part in parts}
    indices = types.pop() if len(types) == 1 else np.dtype(np.int32)
    values = widest_dtype(part.values.dtype for part in parts)
    return SparseRows(
        offsets_of(np.concatenate([np.diff(part.indptr) for part in parts])),
        np.concatenate([part.indices.astype(indices, copy=False) for part in parts]),
        np.concatenate([part.values.astype(values, copy=False) for part in parts]),
        parts[0].num_features,
    )


def sort_rows(rows: SparseRows) -> SparseRows:
    """The same rows with ascending columns: transposed twice by counting, linear in the entries."""
    count, num_rows = len(rows.indices), rows.num_rows
    by_feature = np.empty(rows.num_features + 1, np.int32), np.empty(count, np.int32), np.empty_like(rows.values)
    transpose_rows(rows.indptr, rows.indices, rows.values, *by_feature)
    indptr, indices, values = np.empty(num_rows + 1, np.int32), np.empty_like(rows.indices), np.empty_like(rows.values)
    transpose_rows(*by_feature, indptr, indices, values)
    return SparseRows(rows.indptr, indices, values, rows.num_features)


def in_order(rows: SparseRows) -> SparseRows:
    """The same rows, sorted where columns do not ascend yet."""
    state = inspect_columns(rows.indptr, rows.indices, rows.num_features)[1]
    return sort_rows(rows) if state == UNSORTED else rows


def select_columns(rows: SparseRows, target: npt.NDArray[np.int32], num_features: int) -> SparseRows:
    """Rename columns and drop some.

    Parameters
    ----------
    target
        (F,) new column of each old one, -1 where it is dropped.
    num_features
        Number of new columns.
    """
    indptr, indices, values = _select(rows.indptr, rows.indices, rows.values, target)
    return in_order(SparseRows(indptr, indices, values, num_features))


def add_repeated(rows: SparseRows) -> SparseRows:
    """Rows whose columns do not fall, each column once with the sum of its values; changes the arrays."""
    kept: npt.NDArray[np.int64] = np.zeros(len(rows.indptr), np.int64)
    end = _add_repeated(rows.indptr, rows.indices, rows.values, kept)
    return SparseRows(kept, rows.indices[:end], rows.values[:end], rows.num_features)


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


@compiled
def row_sums(indptr, values):  # type: ignore[no-untyped-def]
    """(B,) sum of the values of each row in float64: exact for counts up to 2**53."""
    sums = np.zeros(len(indptr) - 1)
    for row in range(len(sums)):
        total = 0.0
        for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            total += values[k]
        sums[row] = total
    return sums


@compiled
def _add_repeated(indptr, indices, values, kept_indptr):  # type: ignore[no-untyped-def]
    """Add up, in place, what stands at one column of a row; columns do not fall. Returns the entries that are left."""
    end = 0
    for row in range(len(indptr) - 1):
        first = end
        for k in range(indptr[row], indptr[row + 1]):
            if end > first and indices[end - 1] == indices[k]:
                values[end - 1] += values[k]
            else:
                indices[end], values[end] = indices[k], values[k]
                end += 1
        kept_indptr[row + 1] = end
    return end


@compiled
def scatter_entries(rows, columns, values, following, out_columns, out_values):  # type: ignore[no-untyped-def]
    """Put (n,) entries behind those that their rows already have.

    Parameters
    ----------
    rows, columns, values
        (n,) entries in any order of rows.
    following
        (B,) int64: where the next entry of each row goes; moves on.
    out_columns, out_values
        Buffers of all entries.
    """
    for k in range(len(rows)):
        entry = following[rows[k]]
        out_columns[entry] = columns[k]
        out_values[entry] = values[k]
        following[rows[k]] = entry + 1


@compiled
def _select(indptr, indices, values, target):  # type: ignore[no-untyped-def]
    kept = np.empty(len(indices), np.int32)
    kept_values = np.empty_like(values)
    kept_indptr = np.zeros(len(indptr), np.int64)
    end = 0
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            column = target[indices[k]]
            if column >= 0:
                kept[end] = column
                kept_values[end] = values[k]
                end += 1
        kept_indptr[row + 1] = end
    return kept_indptr, kept[:end], kept_values[:end]
