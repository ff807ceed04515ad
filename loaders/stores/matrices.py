"""Matrices of AnnData's Zarr encoding, read by ranges of rows as `SparseRows`.

Shapes: R rows of a matrix, F features, N non-zeros of the rows read.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from loaders.csr import (
    SORTED,
    UNSORTED,
    SparseRows,
    concat_rows,
    inspect_columns,
    narrow,
    offsets_of,
    select_columns,
    sort_rows,
    travelling_dtype,
)
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
        self.value_dtype = travelling_dtype(self._data.dtype)

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
        state = inspect_columns(rows.indptr, rows.indices, self.num_features)[1]
        if self._is_ours and not (state == SORTED and values.all()):
            self._check_files(first, last, where)
        return sort_rows(rows) if state == UNSORTED else rows

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
        self.value_dtype = travelling_dtype(array.dtype)
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
        return SparseRows(offsets_of(mask.sum(1)), np.nonzero(mask)[1].astype(np.int32), dense[mask], self.num_features)


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
        return offsets_of(np.diff(self._matrix.indptr())[self._order])

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


def _reason(error: Exception) -> str:
    if isinstance(error, DamagedChunk):
        return f"chunk {error.chunk}: {error}"
    return f"{type(error).__name__}: {error}"


def _indptr_by_reading(matrix: Matrix) -> npt.NDArray[np.int64]:
    lengths = [np.diff(rows.indptr) for rows in read_all(matrix)]
    return offsets_of(np.concatenate([np.zeros(0, np.int64), *lengths]))


def _narrow_indices(indices: npt.NDArray[np.generic]) -> npt.NDArray[np.integer]:
    wanted = {"u": (np.uint16, np.uint32), "i": (np.int32, np.int32)}[indices.dtype.kind]
    return indices.astype(wanted[0] if indices.dtype.itemsize <= 2 else wanted[1], copy=False)
