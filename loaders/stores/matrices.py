"""Matrices of AnnData's Zarr encoding, read by ranges of rows as `SparseRows`.

Shapes: R rows of a matrix, F features, N non-zeros of the rows read.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from loaders.csr import SparseRows
from loaders.stores.sharded import DamagedChunk, ShardedArray, UnsupportedArray

T = TypeVar("T")

ENTRIES_PER_READ = 1 << 22
"""Entries of one read of a streaming pass: 32 MB of float32 values and 32-bit columns."""

ArrayReader = Callable[[int, int], npt.NDArray[np.generic]]
"""Entries [start, stop) of a 1-d array."""


def array_reader(array: zarr.Array) -> ArrayReader:
    """The way a 1-d array is read: by our own reader where it is sharded and local, else by zarr-python."""
    backend = array.store_path.store
    if isinstance(backend, LocalStore):
        try:
            sharded = ShardedArray(backend.root / array.path)
        except UnsupportedArray:
            pass
        else:
            return lambda start, stop: _read_sharded(sharded, start, stop)
    return lambda start, stop: np.asarray(array[start:stop])


def _read_sharded(array: ShardedArray, start: int, stop: int) -> npt.NDArray[np.generic]:
    entries = np.empty(stop - start, array.layout.dtype)
    array.read_into(start, entries)
    return entries


class Matrix(Protocol):
    """R rows of F features. Methods may be called from several threads at once."""

    num_rows: int
    num_features: int
    value_dtype: np.dtype[np.generic]

    def indptr(self) -> npt.NDArray[np.int64]:
        """(R + 1,) offsets of the rows; may cost a pass over the matrix the first time."""
        ...

    def rows_per_read(self) -> int:
        """Rows whose entries make a read of about `ENTRIES_PER_READ`."""
        ...

    def read(self, start: int, stop: int) -> SparseRows:
        """Rows [start, stop); columns ascend within a row."""
        ...


def stored_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The type in which values of a foreign type travel: unsigned integers of at most 32 bits, else float32."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind in "iu":
        return np.dtype(f"uint{8 * min(4, dtype.itemsize)}")
    return np.dtype(np.float32)


def narrow(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Values in their travelling type.

    Raises
    ------
    ValueError
        Negative integers, or integers beyond 32 bits.
    """
    dtype = stored_dtype(values.dtype)
    if values.dtype.kind in "iu" and values.dtype != dtype and len(values):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 1 << 32:
            raise ValueError(f"got values from {low} to {high}; counts are integers from 0 to {(1 << 32) - 1}")
    return values.astype(dtype, copy=False)


class CsrMatrix:
    """A csr_matrix group: data, indices, indptr."""

    def __init__(self, group: zarr.Group, label: str, *, is_ours: bool = False) -> None:
        self._data: zarr.Array = group["data"]
        self._indices: zarr.Array = group["indices"]
        self._indptr_array: zarr.Array = group["indptr"]
        self._read_data, self._read_indices = array_reader(self._data), array_reader(self._indices)
        self._label = label
        self._is_ours = is_ours
        self._indptr = once(self._stored_indptr)
        self.num_rows, self.num_features = (int(length) for length in group.attrs["shape"])
        self.value_dtype = stored_dtype(self._data.dtype)

    @property
    def arrays(self) -> dict[str, zarr.Array]:
        """The arrays on disk: data, indices, indptr."""
        return {"data": self._data, "indices": self._indices, "indptr": self._indptr_array}

    def indptr(self) -> npt.NDArray[np.int64]:
        return self._indptr()

    def _stored_indptr(self) -> npt.NDArray[np.int64]:
        indptr = np.asarray(self._indptr_array[:]).astype(np.int64)
        if len(indptr) != self.num_rows + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
            raise RuntimeError(
                f"{self._label}/indptr: got {len(indptr)} offsets that do not ascend from 0 over {self.num_rows} rows;"
                f" the array is damaged: copy the store again, or ingest again"
            )
        return indptr

    def rows_per_read(self) -> int:
        return max(1, ENTRIES_PER_READ * self.num_rows // max(1, int(self._data.shape[0])))

    def read(self, start: int, stop: int) -> SparseRows:
        offsets = self.indptr()[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        where = f"rows {start}:{stop} (entries {first}:{last})"
        values = self._read_array("data", self._read_data, first, last, where)
        indices = self._read_array("indices", self._read_indices, first, last, where)
        rows = SparseRows(offsets - first, _narrow_indices(indices), values, self.num_features)
        ascending = is_ascending(rows.indptr, rows.indices)
        if self._is_ours and not (ascending and values.all()):
            self._check_files(first, last, where)
        return rows if ascending else sort_rows(rows)

    def _read_array(self, name: str, reader: ArrayReader, first: int, last: int, where: str) -> npt.NDArray[np.generic]:
        try:
            entries = reader(first, last)
        except Exception as error:  # those of codecs and backends are of every kind
            raise RuntimeError(
                f"{self._label}/{name}: {where} cannot be read: {_reason(error)};"
                f" {self._chunks(first, last)} may be damaged or missing: copy the store again, or ingest again"
            ) from error
        try:
            return narrow(entries) if name == "data" else entries
        except ValueError as error:
            raise ValueError(f"{self._label}/data: {where} {error}") from None

    def _check_files(self, first: int, last: int, where: str) -> None:
        """Zarr reads a file that is missing as zeros, which our stores hold only where a source had them written."""
        for name, array in (("data", self._data), ("indices", self._indices)):
            length = (array.shards or array.chunks)[0]
            for number in range(first // length, max(first, last - 1) // length + 1):
                key = array.metadata.encode_chunk_key((number,))
                if not sync((array.store_path / key).exists()):
                    raise RuntimeError(
                        f"{self._label}/{name}: {where} cannot be read: file {key} is missing;"
                        f" copy the store again, or ingest again"
                    )

    def _chunks(self, first: int, last: int) -> str:
        length = (self._data.shards or self._data.chunks)[0]
        return f"file(s) {first // length}..{max(first, last - 1) // length} of {length} entries each"


class DenseMatrix:
    """A two-dimensional array (cells, features), as AnnData often holds ADT."""

    def __init__(self, array: zarr.Array, label: str) -> None:
        self._array = array
        self._label = label
        self.num_rows, self.num_features = (int(length) for length in array.shape)
        self.value_dtype = stored_dtype(array.dtype)
        self._indptr = once(lambda: _indptr_by_reading(self))

    def indptr(self) -> npt.NDArray[np.int64]:
        return self._indptr()

    def rows_per_read(self) -> int:
        return max(1, ENTRIES_PER_READ // max(1, self.num_features))

    def read(self, start: int, stop: int) -> SparseRows:
        try:
            dense = narrow(np.asarray(self._array[start:stop]).ravel()).reshape(stop - start, self.num_features)
        except ValueError as error:
            raise ValueError(f"{self._label}: rows {start}:{stop} {error}") from None
        mask = dense != 0
        indptr = np.zeros(len(dense) + 1, np.int64)
        np.cumsum(mask.sum(1), out=indptr[1:])
        return SparseRows(indptr, np.nonzero(mask)[1].astype(np.int32), dense[mask], self.num_features)


class SelectedColumns:
    """Some columns of a matrix, as one modality of an AnnData that holds several side by side."""

    def __init__(self, matrix: Matrix, columns: npt.NDArray[np.int64]) -> None:
        self._matrix = matrix
        self._target = np.full(matrix.num_features, -1, np.int32)
        self._target[columns] = np.arange(len(columns), dtype=np.int32)
        self.num_rows, self.num_features = matrix.num_rows, len(columns)
        self.value_dtype = matrix.value_dtype
        self._indptr = once(lambda: _indptr_by_reading(self))

    def indptr(self) -> npt.NDArray[np.int64]:
        return self._indptr()

    def rows_per_read(self) -> int:
        return self._matrix.rows_per_read()

    def read(self, start: int, stop: int) -> SparseRows:
        return select_columns(self._matrix.read(start, stop), self._target, self.num_features)


class ReorderedRows:
    """Rows of a matrix in another order; consecutive rows are still read together."""

    def __init__(self, matrix: Matrix, order: npt.NDArray[np.int64]) -> None:
        self._matrix = matrix
        self._order = order
        self.num_rows, self.num_features = len(order), matrix.num_features
        self.value_dtype = matrix.value_dtype
        self._indptr = once(self._reordered_indptr)

    def _reordered_indptr(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.diff(self._matrix.indptr())[self._order])]).astype(np.int64)

    def indptr(self) -> npt.NDArray[np.int64]:
        return self._indptr()

    def rows_per_read(self) -> int:
        return self._matrix.rows_per_read()

    def read(self, start: int, stop: int) -> SparseRows:
        rows = self._order[start:stop]
        if not len(rows):
            return self._matrix.read(0, 0)
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
        runs = [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in itertools.pairwise(cuts)]
        return concat_rows([self._matrix.read(first, last) for first, last in runs])


def once(compute: Callable[[], T]) -> Callable[[], T]:
    """A function that computes at its first call, in one thread, and hands out the same value ever after."""
    lock = threading.Lock()
    values: list[T] = []

    def value() -> T:
        with lock:
            if not values:
                values.append(compute())
            return values[0]

    return value


def read_all(matrix: Matrix) -> Iterator[SparseRows]:
    """The whole matrix in order, a bounded number of rows at a time."""
    step = matrix.rows_per_read()
    for start in range(0, matrix.num_rows, step):
        yield matrix.read(start, min(start + step, matrix.num_rows))


def row_sums(rows: SparseRows) -> npt.NDArray[np.float64]:
    """(B,) sum of the values of each row."""
    running = np.concatenate([[0.0], np.cumsum(rows.values, dtype=np.float64)])
    return running[rows.indptr[1:]] - running[rows.indptr[:-1]]


def _reason(error: Exception) -> str:
    if isinstance(error, DamagedChunk):
        return f"chunk {error.chunk}: {error}"
    return f"{type(error).__name__}: {error}"


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
    selected = SparseRows(indptr, indices, values, num_features)
    return selected if is_ascending(indptr, indices) else sort_rows(selected)


def sort_rows(rows: SparseRows) -> SparseRows:
    """The same rows with ascending columns: transposed twice by counting, linear in the entries."""
    indices, values = _sort(rows.indptr, rows.indices, rows.values, rows.num_features)
    return SparseRows(rows.indptr, indices, values, rows.num_features)


def slice_rows(rows: SparseRows, start: int, stop: int) -> SparseRows:
    """Rows [start, stop), sharing memory with the whole."""
    offsets = rows.indptr[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return SparseRows(offsets - first, rows.indices[first:last], rows.values[first:last], rows.num_features)


def concat_rows(parts: list[SparseRows]) -> SparseRows:
    """Rows of several parts below each other, in the widest of their types."""
    offsets = np.cumsum([0, *(part.indptr[-1] for part in parts)])
    indptr = [part.indptr[1:] + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
    # NumPy would widen uint32 beside int32 or float32 to 64 bits.
    types = {part.indices.dtype for part in parts}
    index_dtype = types.pop() if len(types) == 1 else np.dtype(np.int32)
    value_types = {part.values.dtype for part in parts}
    value_dtype = np.dtype(np.float32) if np.dtype(np.float32) in value_types else np.result_type(*value_types)
    return SparseRows(
        np.concatenate([np.zeros(1, np.int64), *indptr]),
        np.concatenate([part.indices.astype(index_dtype, copy=False) for part in parts]),
        np.concatenate([part.values.astype(value_dtype, copy=False) for part in parts]),
        parts[0].num_features,
    )


def _indptr_by_reading(matrix: Matrix) -> npt.NDArray[np.int64]:
    lengths = [np.diff(rows.indptr) for rows in read_all(matrix)]
    return np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))]).astype(np.int64)


def _narrow_indices(indices: npt.NDArray[np.generic]) -> npt.NDArray[np.integer]:
    wanted = {"u": (np.uint16, np.uint32), "i": (np.int32, np.int32)}[indices.dtype.kind]
    return indices.astype(wanted[0] if indices.dtype.itemsize <= 2 else wanted[1], copy=False)


@numba.njit(nogil=True, cache=True)
def is_ascending(indptr, indices):  # type: ignore[no-untyped-def]
    """Whether columns ascend within every row."""
    for row in range(len(indptr) - 1):
        for k in range(indptr[row] + 1, indptr[row + 1]):
            if indices[k] <= indices[k - 1]:
                return False
    return True


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
def _sort(indptr, indices, values, num_features):  # type: ignore[no-untyped-def]
    starts = np.zeros(num_features + 1, np.int64)
    for column in indices:
        starts[column + 1] += 1
    for column in range(num_features):
        starts[column + 1] += starts[column]
    rows = np.empty(len(indices), np.int64)
    by_column = np.empty_like(values)
    place = starts[:-1].copy()
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            column = indices[k]
            rows[place[column]] = row
            by_column[place[column]] = values[k]
            place[column] += 1
    sorted_indices = np.empty_like(indices)
    sorted_values = np.empty_like(values)
    next_entry = indptr[:-1].copy()
    for column in range(num_features):
        for k in range(starts[column], starts[column + 1]):
            row = rows[k]
            sorted_indices[next_entry[row]] = column
            sorted_values[next_entry[row]] = by_column[k]
            next_entry[row] += 1
    return sorted_indices, sorted_values
