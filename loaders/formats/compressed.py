"""Matrices compressed by row, read by ranges of rows.

HDF5 datasets, Zarr arrays and NumPy arrays are sliced alike, so one class serves all; sharded arrays on a local disk
or in an object store are read by our own reader. Each array is opened once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore, ObjectStore

from loaders.csr import (
    OUT_OF_RANGE,
    SORTED,
    UNSORTED,
    SparseRows,
    gather_rows,
    inspect_columns,
    sort_rows,
)
from loaders.formats.damage import Damaged, DamagedChunk, ReplacedStore, said_by, unreachable
from loaders.formats.matrix import ENTRY_BYTES, PEEK_ROWS, Prepared, StoredMatrix, once, out_of_range, runs_of
from loaders.formats.root import reading
from loaders.formats.sharded import ShardedArray, UnsupportedArray
from loaders.formats.storage import Folder, Objects

OFFSETS_PER_READ = 1 << 18
"""Row offsets read at a time: they shrink to a quarter at once, so that millions of cells add little memory."""

CHECKPOINT = 256
"""Rows between stored offsets; offsets in between are summed from lengths."""

DIRECT_INDICES = ("uint16", "uint32", "int32", "int64")
DIRECT_VALUES = ("uint8", "uint16", "uint32", "float32", "float64")

_REWRITE = "the file is damaged or was written wrongly: write it again from its source"


class Entries(Protocol):
    """An array of values or columns; may be read from several threads at once.

    Attributes
    ----------
    has_checksum
        Every chunk carries one, and it is verified.
    slow_because
        Why this is not our own reader; None where it is.
    """

    dtype: np.dtype[Any]
    length: int
    has_checksum: bool
    slow_because: str | None

    def read_into(self, start: int, out: npt.NDArray[np.generic]) -> None:
        """Read len(out) elements from `start` on; `out` is contiguous and of the array's type."""
        ...

    def first_missing(self, start: int, stop: int) -> str | None:
        """Name of the first file that holds elements [start, stop) and is not there."""
        ...


class SlicedEntries:
    """An array that its own library reads: zarr-python, h5py or NumPy."""

    has_checksum = False

    def __init__(self, array: Any, reason: str) -> None:
        self._array = array
        self.slow_because: str | None = reason
        # Compiled loops know numbers in the machine's order of bytes alone.
        self.dtype, self.length = np.dtype(array.dtype).newbyteorder("="), int(array.shape[0])

    def read_into(self, start: int, out: npt.NDArray[np.generic]) -> None:
        out[:] = self._array[start : start + len(out)]

    def first_missing(self, start: int, stop: int) -> str | None:
        length = (self._array.shards or self._array.chunks)[0]
        for number in range(start // length, max(start, stop - 1) // length + 1):
            key = self._array.metadata.encode_chunk_key((number,))
            if not sync((self._array.store_path / key).exists()):
                return str(key)
        return None


def open_entries(array: Any) -> Entries:
    """The fastest way to read an array."""
    backend = array.store_path.store if isinstance(array, zarr.Array) else None
    backend = getattr(backend, "_store", backend)
    if not isinstance(backend, LocalStore | ObjectStore):
        return SlicedEntries(array, "it is neither in Zarr on a local disk nor in an object store")
    try:
        is_local = isinstance(backend, LocalStore)
        return ShardedArray(Folder(backend.root / array.path) if is_local else Objects(backend.store, array.path))
    except UnsupportedArray as reason:
        return SlicedEntries(array, str(reason))


class RowOffsets:
    """The indptr of a matrix in 2-4 bytes a row instead of 8.

    Parameters
    ----------
    pieces
        Consecutive parts of the (R + 1,) offsets, in order; none but the last shorter than `CHECKPOINT` or of a length
        that is not a multiple of it.
    """

    def __init__(self, pieces: Iterable[npt.NDArray[np.int64]]) -> None:
        lengths, checkpoints = [], []
        previous: np.int64 | None = None
        for piece in pieces:
            steps = np.diff(piece) if previous is None else np.diff(piece, prepend=previous)
            longest = int(steps.max(initial=0))
            lengths.append(steps.astype(np.uint16 if longest < 1 << 16 else np.uint32))
            checkpoints.append(np.ascontiguousarray(piece[::CHECKPOINT]).astype(np.int64))
            previous = piece[-1]
        self.lengths = np.concatenate(lengths)
        self._checkpoints = np.concatenate(checkpoints)
        self.num_rows = len(self.lengths)
        self.num_entries = 0 if previous is None else int(previous)

    def between(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop - start + 1,) offsets of the rows [start, stop) and of their end."""
        base = start // CHECKPOINT
        offsets = np.empty(stop - start + 1, np.int64)
        offsets[0] = self._checkpoints[base] + self.lengths[base * CHECKPOINT : start].sum(dtype=np.int64)
        np.cumsum(self.lengths[start:stop], dtype=np.int64, out=offsets[1:])
        offsets[1:] += offsets[0]
        return offsets

    def rows_of(self, first: int, last: int) -> tuple[int, int]:
        """Rows [start, stop) that the entries [first, last) belong to."""
        low, high = (
            max(0, int(np.searchsorted(self._checkpoints, entry, side="right")) - 1) for entry in (first, last)
        )
        begin, end = low * CHECKPOINT, min(self.num_rows, (high + 1) * CHECKPOINT)
        edges = self.between(begin, end)
        start = begin + int(np.searchsorted(edges, first, side="right")) - 1
        return start, min(end, begin + int(np.searchsorted(edges, last, side="left")))

    def ranges(self, entries: int) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of at most `entries` entries and 2**20 rows, and at least one row."""
        start, first = 0, 0
        while start < self.num_rows:
            goal = first + entries
            stop = self.num_rows if goal >= self.num_entries else self.rows_of(goal, goal + 1)[0]
            stop = min(max(stop, start + 1), start + 2**20, self.num_rows)
            yield start, stop
            start, first = stop, int(self.between(stop, stop)[0])


def check_arrays(where: str, arrays: Mapping[str, Any], *, num_offsets: int) -> None:
    """Refuse what are not the three arrays of a compressed matrix, or of lengths that do not go together."""
    for name, kinds in (("data", "buif"), ("indices", "ui"), ("indptr", "ui")):
        shape, kind = getattr(arrays.get(name), "shape", None), getattr(arrays.get(name), "dtype", np.dtype("V")).kind
        if shape is None or len(shape) != 1 or kind not in kinds:
            found = "nothing" if shape is None else f"an array of {arrays[name].dtype} of shape {shape}"
            raise ValueError(f"{where}: got {found} for {name}, expected one row of numbers; {_REWRITE}")
    values, indices, offsets = (int(arrays[name].shape[0]) for name in ("data", "indices", "indptr"))
    if offsets != num_offsets:
        rows = f"{num_offsets - 1} rows, expected {num_offsets}"
        raise ValueError(f"{where}: got {offsets} row offsets for {rows}; {_REWRITE}")
    if values != indices:
        raise ValueError(f"{where}: got {values} values but {indices} indices; {_REWRITE}")


def read_offsets(where: str, indptr: Any, *, num_values: int) -> RowOffsets:
    """Offsets in pieces; refuses those that do not start at 0, fall, or do not end at the number of entries."""
    num_rows = indptr.shape[0] - 1
    with reading(where, "row offsets"):
        ends = int(indptr[0]), int(indptr[num_rows])

    def pieces() -> Iterator[npt.NDArray[np.int64]]:
        previous = np.zeros(0, np.int64)
        for start in range(0, num_rows + 1, OFFSETS_PER_READ):
            with reading(where, "row offsets"):
                piece = np.asarray(indptr[start : start + OFFSETS_PER_READ]).astype(np.int64)
            joined = np.concatenate([previous, piece])
            falls = np.flatnonzero(np.diff(joined) < 0)
            if len(falls):
                row = int(falls[0])
                raise ValueError(
                    f"{where}: row offsets fall from {joined[row]} to {joined[row + 1]} at row"
                    f" {start - len(previous) + row}; {_REWRITE}"
                )
            previous = piece[-1:]
            yield piece

    offsets = RowOffsets(pieces())
    if ends != (0, num_values):
        raise ValueError(
            f"{where}: row offsets run from {ends[0]} to {ends[1]}, expected 0 to {num_values}, the stored entries;"
            f" {_REWRITE}"
        )
    return offsets


class CompressedRows(StoredMatrix):
    """CSR.

    Parameters
    ----------
    where
        What messages call it.
    arrays
        `data`, `indices` and `indptr`.
    is_ours
        Of a store made by ingest, which sorts columns, stores no zeros and checks every range.
    cells
        Gives (n,) row of each cell in the matrix, or None where they are the same; for messages.
    """

    def __init__(
        self,
        where: str,
        shape: tuple[int, int],
        arrays: Mapping[str, Any],
        *,
        is_ours: bool = False,
        cells: Callable[[], npt.NDArray[np.integer] | None] = lambda: None,
    ) -> None:
        super().__init__()
        check_arrays(where, arrays, num_offsets=shape[0] + 1)
        self.where, (self.num_rows, self.num_features) = where, shape
        self._indices, self._values = open_entries(arrays["indices"]), open_entries(arrays["data"])
        self.entries: dict[str, Entries] = {"indices": self._indices, "data": self._values}
        self._indptr, self._is_ours, self._cells = arrays["indptr"], is_ours, cells
        self.offsets = once(self._read_offsets)
        self.stored_dtype = self._values.dtype
        self.slow_because = self._indices.slow_because or self._values.slow_because
        if self._indices.dtype.name not in DIRECT_INDICES or self._values.dtype.name not in DIRECT_VALUES:
            self.slow_because = f"it holds {self._values.dtype} values at {self._indices.dtype} columns"

    def _read_offsets(self) -> RowOffsets:
        return read_offsets(self.where, self._indptr, num_values=self._values.length)

    @property
    def window_dtypes(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        return (self._indices.dtype, self._values.dtype) if self.slow_because is None else super().window_dtypes

    def lengths(self) -> npt.NDArray[np.int64]:
        return self.offsets().lengths.astype(np.int64)

    def num_nonzeros(self) -> int:
        return self.offsets().num_entries

    def estimated_nonzeros(self) -> int:
        return self._values.length

    def bytes_per_row(self) -> float:
        return ENTRY_BYTES * max(1.0, self._values.length / max(1, self.num_rows))

    def ranges(self, memory: int) -> Iterator[tuple[int, int]]:
        return self.offsets().ranges(memory // ENTRY_BYTES)

    def peek(self) -> SparseRows | None:
        num = min(PEEK_ROWS, self.num_rows)
        indptr = np.asarray(self._indptr[: num + 1]).astype(np.int64)
        # What is wrong with the offsets is said when all of them are looked at.
        if len(indptr) != num + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
            return None
        return self._stored(0, indptr) if indptr[-1] <= self._values.length else None

    def stored(self, start: int, stop: int) -> SparseRows:
        return self._stored(start, self.offsets().between(start, stop))

    def _stored(self, start: int, edges: npt.NDArray[np.int64]) -> SparseRows:
        count = int(edges[-1] - edges[0])
        indices: npt.NDArray[Any] = np.empty(count, self._indices.dtype)
        values: npt.NDArray[Any] = np.empty(count, self._values.dtype)
        self._fill(start, edges, indices, values)
        return SparseRows(edges - edges[0], indices, values, self.num_features)

    def _fill(
        self, start: int, edges: npt.NDArray[np.int64], indices: npt.NDArray[Any], values: npt.NDArray[Any]
    ) -> None:
        """Read the rows from `start` on whose entries lie between the edges."""
        for name, out in (("indices", indices), ("data", values)):
            try:
                self.entries[name].read_into(int(edges[0]), out)
            except Exception as error:  # those of codecs and backends are of every kind
                remote = unreachable(f"{self.where}/{name}", error)
                raise remote or self.damaged(name, error, start, len(edges) - 1) from error
        if not self._is_ours or self.slow_because is None:
            return
        # Zarr reads a file that is missing as zeros, which our stores hold only where a source had them written.
        if inspect_columns(edges - edges[0], indices, self.num_features)[1] != SORTED or not values.all():
            for name, entries in self.entries.items():
                missing = entries.first_missing(int(edges[0]), int(edges[-1]))
                if missing is not None:
                    reason = FileNotFoundError(f"file {missing} is missing")
                    raise self.damaged(name, reason, start, len(edges) - 1)

    def damaged(self, name: str, error: Exception, start: int, count: int) -> Damaged:
        """The error of what cannot be read of the rows from `start` on."""
        what, rows = f"rows {start}:{start + count}", (start, start + count)
        reason = said_by(error)
        if isinstance(error, DamagedChunk):
            rows = self.offsets().rows_of(*error.entries)
            what, reason = f"chunk {error.chunk}", f"{error} ({error.file})"
        first, last = rows[0], max(rows[0], rows[1] - 1)
        of_cells = self._cells()
        if of_cells is not None:
            first, last = (int(np.flatnonzero(of_cells == row)[0]) for row in (first, last))
        is_of_chunk = isinstance(error, DamagedChunk) and not isinstance(error, ReplacedStore)
        return Damaged(self.where, name, f"{what} (the cells {first} to {last}): {reason}", is_of_chunk=is_of_chunk)

    def prepare(self, rows: npt.NDArray[np.int64]) -> Prepared:
        if self.slow_because is not None:
            return super().prepare(rows)
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        offsets, runs, total = self.offsets(), [], 0
        for begin, end in runs_of(rows):
            edges = offsets.between(int(rows[begin]), int(rows[end - 1]) + 1)
            inside = rows[begin:end] - rows[begin]
            lengths[begin:end] = edges[inside + 1] - edges[inside]
            # Of a run of which less than half is wanted only that half goes into the window.
            is_sparse = 2 * (end - begin) < len(edges) - 1
            places = np.cumsum(lengths[begin:end]) - lengths[begin:end] if is_sparse else edges[inside] - edges[0]
            starts[begin:end] = total + places
            size = int(lengths[begin:end].sum() if is_sparse else edges[-1] - edges[0])
            runs.append((begin, end, edges, is_sparse, total, total + size))
            total += size

        def fill(indices: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
            for begin, end, edges, is_sparse, low, high in runs:
                first, into = int(rows[begin]), (indices[low:high], values[low:high])
                if not is_sparse:
                    self._read_sorted(first, edges, *into)
                    continue
                count = int(edges[-1] - edges[0])
                whole = (np.empty(count, indices.dtype), np.empty(count, values.dtype))
                self._read_sorted(first, edges, *whole)
                wanted = edges[rows[begin:end] - first] - edges[0]
                gather_rows(*whole, wanted, lengths[begin:end], starts[begin:end] - low, *into)

        return Prepared(starts, lengths, total, fill)

    def _read_sorted(
        self, start: int, edges: npt.NDArray[np.int64], indices: npt.NDArray[Any], values: npt.NDArray[Any]
    ) -> None:
        self._fill(start, edges, indices, values)
        if self._indices.has_checksum and self._values.has_checksum:
            return  # only stores made by ingest carry checksums
        row, state = inspect_columns(edges, indices, self.num_features)
        if state == OUT_OF_RANGE:
            raise out_of_range(self.where, start + row, self.num_features)
        if state == UNSORTED:
            ordered = sort_rows(SparseRows(edges - edges[0], indices, values, self.num_features))
            indices[:], values[:] = ordered.indices, ordered.values
