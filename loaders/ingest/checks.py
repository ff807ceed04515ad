"""What counts must be, checked on every value while rows stream; and the rows in the store's columns.

Every refusal says what was looked at, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.csr import (
    LARGEST,
    OUT_OF_RANGE,
    SparseRows,
    compiled,
    index_dtype,
    inspect_columns,
    narrowest_dtype,
    offsets_of,
)
from loaders.formats.measured import no_integers

_FINE, _NOT_FINITE, _NEGATIVE, _NOT_INTEGER, _TOO_LARGE = range(5)


@dataclass(frozen=True)
class Counted:
    """Checked rows in the columns of the store, and what was seen in them."""

    rows: SparseRows
    maximum: int
    num_empty: int
    num_duplicates: int
    """Entries that named a column a second time in their row; their values were added."""

    def only(self, kept: npt.NDArray[np.bool_]) -> Counted:
        """What was seen in these of the rows (duplicates excepted, which are counted over all)."""
        lengths = np.diff(self.rows.indptr)
        entries = np.repeat(kept, lengths)
        values = self.rows.values[entries]
        rows = SparseRows(offsets_of(lengths[kept]), self.rows.indices[entries], values, self.rows.num_features)
        return Counted(rows, int(values.max(initial=0)), int((lengths[kept] == 0).sum()), self.num_duplicates)


@dataclass(frozen=True)
class Place:
    """Where rows come from, to name a cell and a feature in a message."""

    where: str
    cell_name: Callable[[int], str]
    feature_name: Callable[[int], str]
    other_layers: Sequence[str] = ()


def check_and_map(
    raw: SparseRows, columns: npt.NDArray[np.int64], num_features: int, place: Place, *, start: int = 0
) -> Counted:
    """Check every entry of raw rows and put them into the store's columns.

    Parameters
    ----------
    raw
        Rows as a file holds them.
    columns
        (features of the source,) column of each in the store, -1 where it is left out.
    num_features
        Columns of the store.
    start
        Row of the matrix that the first of them is.

    Raises
    ------
    ValueError
        A column out of range; a value that is no count.
    """
    indices = _signed(raw.indices)
    row, state = inspect_columns(raw.indptr, indices, len(columns))
    if state == OUT_OF_RANGE:
        own = indices[raw.indptr[row] : raw.indptr[row + 1]]
        index = int(own[(own < 0) | (own >= len(columns))][0])
        raise ValueError(
            f"{place.where}: got feature index {index} in row {start + row}, the matrix has "
            f"{len(columns)} features; the file is damaged or was written wrongly: write it again from its source"
        )
    values = raw.values.astype(np.uint8) if raw.values.dtype == np.bool_ else raw.values
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{place.where}: got values of type {values.dtype}, expected numbers; store integer counts")
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    problem, entry, maximum = first_problem(values)
    if problem != _FINE:
        raise ValueError(_explain(problem, entry, raw, values, place, start))
    indptr = np.zeros_like(raw.indptr)
    packed = np.empty(len(indices), np.uint64)
    duplicates = map_rows(raw.indptr, indices, values, columns, indptr, packed)
    if duplicates < 0:
        cell = place.cell_name(start - 1 - duplicates)
        raise ValueError(
            f"{place.where}: repeated entries of cell {cell!r} add up to more than {LARGEST}; look for a corrupt matrix"
        )
    packed = packed[: indptr[-1]]
    dtype = narrowest_dtype(min(LARGEST, int(maximum)))
    if duplicates:
        largest = int((packed & np.uint64(LARGEST)).max(initial=0))
        dtype, maximum = narrowest_dtype(largest), max(int(maximum), largest)
    own = (packed & np.uint64(LARGEST)).astype(dtype)
    rows = SparseRows(indptr, (packed >> np.uint64(32)).astype(index_dtype(num_features)), own, num_features)
    return Counted(rows, int(maximum), int((np.diff(indptr) == 0).sum()), duplicates)


def _signed(indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return indices if indices.dtype.kind == "i" and indices.dtype.itemsize >= 4 else indices.astype(np.int64)


def _row(raw: SparseRows, entry: int) -> int:
    return int(np.searchsorted(raw.indptr, entry, side="right")) - 1


def _explain(problem: int, entry: int, raw: SparseRows, values: npt.NDArray[Any], place: Place, start: int) -> str:
    row, value = start + _row(raw, entry), values[entry]
    at = f"cell {place.cell_name(row)!r}, feature {place.feature_name(int(raw.indices[entry]))!r}"
    layers = _layers(place)
    if problem == _NOT_FINITE:
        return f"{place.where}: got {value} in {at}, counts are finite; replace missing values by 0 or remove the cell"
    if problem == _TOO_LARGE:
        return f"{place.where}: got {value:.10g} in {at}, counts are at most {LARGEST}; look for a corrupt matrix"
    if problem == _NEGATIVE:
        return (
            f"{place.where}: got {value:.6g} in {at}, counts are not negative; these look scaled or centred: {layers}"
        )
    share = float(np.mean(values != np.floor(values)))
    return f"{place.where}: got {value:.6g} in {at}, {no_integers(share, float(values.max()))}: {layers}"


def _layers(place: Place) -> str:
    if not place.other_layers:
        return "give a file with raw counts (this one has no other layer)"
    likely = sorted(place.other_layers, key=lambda name: ("count" not in name.lower(), "raw" not in name.lower()))
    named = ", ".join(repr(name) for name in likely)
    return f"name the layer that holds raw counts, for example layer={likely[0]!r} (this file has {named})"


@compiled
def first_problem(values: npt.NDArray[Any]) -> tuple[int, int, float]:
    """(problem, entry, maximum): the first value that is no count, or 0, -1 and the largest."""
    maximum = 0.0
    for entry in range(len(values)):
        value = np.float64(values[entry])
        if not np.isfinite(value):
            return _NOT_FINITE, entry, maximum
        if value < 0.0:
            return _NEGATIVE, entry, maximum
        if value != np.floor(value):
            return _NOT_INTEGER, entry, maximum
        if value > LARGEST:
            return _TOO_LARGE, entry, maximum
        maximum = max(maximum, value)
    return _FINE, -1, maximum


@compiled
def map_rows(
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[Any],
    values: npt.NDArray[Any],
    columns: npt.NDArray[np.int64],
    out_indptr: npt.NDArray[np.int64],
    packed: npt.NDArray[np.uint64],
) -> int:
    """Rows in new columns: zeros and left-out columns dropped, columns ascending, repeated ones added up.

    packed
        (N,) output, (column << 32) | value: one integer sort orders a row and carries its values along.

    Returns the number of repeated entries, or -1 - row where their sum does not fit 32 bits.
    """
    out = 0
    duplicates = 0
    for row in range(len(indptr) - 1):
        first = out
        is_ascending = True
        for entry in range(indptr[row], indptr[row + 1]):
            column = columns[indices[entry]]
            value = np.uint64(values[entry])
            if column < 0 or value == 0:
                continue
            packed[out] = (np.uint64(column) << np.uint64(32)) | value
            if out > first and (packed[out - 1] >> np.uint64(32)) >= np.uint64(column):
                is_ascending = False
            out += 1
        if not is_ascending:
            packed[first:out] = np.sort(packed[first:out])
            last = first
            for entry in range(first + 1, out):
                if packed[entry] >> np.uint64(32) == packed[last] >> np.uint64(32):
                    added = packed[entry] & np.uint64(0xFFFFFFFF)
                    if added > np.uint64(0xFFFFFFFF) - (packed[last] & np.uint64(0xFFFFFFFF)):
                        return -1 - row
                    packed[last] += added
                    duplicates += 1
                else:
                    last += 1
                    packed[last] = packed[entry]
            out = last + 1
        out_indptr[row + 1] = out
    return duplicates
