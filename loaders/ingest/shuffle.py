"""A global shuffle in bounded memory: rows are scattered to buckets on disk, then each bucket is put in order.

Pass 1 collects checked rows in one buffer; when it is full, the rows are written grouped by bucket (a bucket is a range
of destinations). Pass 2 reads bucket after bucket: its rows, scattered over as many segments as the buffer was full
times, are placed in order. Each byte is written once and read once, in pieces of buffer / buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.csr import SparseRows, gather_rows, index_dtype, offsets_of

_ROW_BYTES = 24
"""Bookkeeping per row in the buffer: destination, first entry, number of entries."""


@dataclass(frozen=True)
class _Segment:
    """Rows of one bucket from one emptying of the buffer: destinations, lengths (uint32 each), indices, values."""

    offset: int
    num_rows: int
    num_entries: int
    value_dtype: np.dtype[Any]


def destinations(num_cells: int, seed: int) -> npt.NDArray[np.int64]:
    """(n,) place of each cell in the store: a permutation that depends on the seed alone."""
    return np.random.default_rng([seed, 0x5B0FF1E]).permutation(num_cells)


class Shuffle:
    """Takes rows with their destinations in any order, gives them back by destination.

    Parameters
    ----------
    file
        Path of the temporary file.
    num_rows, num_features
        Shape of the whole matrix.
    num_nonzeros
        Its entries, at least about: decides the number of buckets.
    memory
        Bytes for the buffer of pass 1, or for a bucket with one segment in pass 2.
    """

    def __init__(self, file: Path, *, num_rows: int, num_features: int, num_nonzeros: int, memory: int) -> None:
        self._path = file
        self._file = open(file, "w+b")  # noqa: SIM115 (closed by `close`)
        self._num_rows = num_rows
        self._num_features = num_features
        self._memory = memory
        self._index_dtype = index_dtype(num_features)
        entry_bytes = self._index_dtype.itemsize + 2
        # A bucket and its largest segment are in memory together, while the writer still compresses the one before.
        num_buckets = -(-4 * (num_nonzeros * entry_bytes + num_rows * _ROW_BYTES) // memory)
        self._rows_per_bucket = max(1, -(-num_rows // max(1, num_buckets)))
        self._segments: dict[int, list[_Segment]] = {}
        self._value_dtype: np.dtype[Any] = np.dtype(np.uint8)
        self._allocate()

    def _allocate(self) -> None:
        capacity = max(1024, self._memory // (self._index_dtype.itemsize + self._value_dtype.itemsize))
        self._indices = np.empty(capacity, self._index_dtype)
        self._values = np.empty(capacity, self._value_dtype)
        self._forget()

    def _forget(self) -> None:
        self._filled = 0
        self._rows_held = 0
        self._destinations: list[npt.NDArray[np.int64]] = []
        self._lengths: list[npt.NDArray[np.int64]] = []

    def add(self, destinations: npt.NDArray[np.int64], rows: SparseRows) -> None:
        """Take rows; row i belongs at destinations[i]."""
        if np.promote_types(rows.values.dtype, self._value_dtype) != self._value_dtype:
            self._empty()
            self._value_dtype = rows.values.dtype
            self._allocate()
        entries = len(rows.indices)
        if self._filled + entries > len(self._indices) or self._rows_held * _ROW_BYTES > self._memory:
            self._empty()
        if entries > len(self._indices):
            self._indices = np.empty(entries, self._index_dtype)
            self._values = np.empty(entries, self._value_dtype)
        self._indices[self._filled : self._filled + entries] = rows.indices
        self._values[self._filled : self._filled + entries] = rows.values
        self._filled += entries
        self._rows_held += rows.num_rows
        self._destinations.append(destinations)
        self._lengths.append(np.diff(rows.indptr))

    def _empty(self) -> None:
        """Write the buffer, grouped by bucket."""
        if not self._rows_held:
            return
        destination, length = np.concatenate(self._destinations), np.concatenate(self._lengths)
        first = np.cumsum(length) - length
        order = np.argsort(destination, kind="stable")
        bucket = destination[order] // self._rows_per_bucket
        bounds = np.flatnonzero(np.diff(bucket, prepend=-1, append=bucket[-1] + 1))
        for start, stop in pairwise(bounds):
            number, chosen = int(bucket[start]), order[start:stop]
            entries = int(length[chosen].sum())
            indices = np.empty(entries, self._index_dtype)
            values = np.empty(entries, self._value_dtype)
            places = np.cumsum(length[chosen]) - length[chosen]
            gather_rows(self._indices, self._values, first[chosen], length[chosen], places, indices, values)
            segment = _Segment(self._file.tell(), len(chosen), entries, self._value_dtype)
            local = destination[chosen] - number * self._rows_per_bucket
            for part in (local.astype(np.uint32), length[chosen].astype(np.uint32), indices, values):
                self._file.write(part.data.cast("B"))
            self._segments.setdefault(number, []).append(segment)
        self._forget()

    def in_order(self, value_dtype: npt.DTypeLike) -> Iterator[SparseRows]:
        """All rows by destination, bucket by bucket; values as `value_dtype`, which must hold them."""
        self._empty()
        self._indices, self._values = self._indices[:0].copy(), self._values[:0].copy()
        for number in range(-(-self._num_rows // self._rows_per_bucket)):
            yield self._bucket(number, np.dtype(value_dtype))

    def _bucket(self, number: int, value_dtype: np.dtype[Any]) -> SparseRows:
        num_rows = min(self._rows_per_bucket, self._num_rows - number * self._rows_per_bucket)
        segments = self._segments.get(number, [])
        lengths = np.zeros(num_rows, np.int64)
        seen = np.zeros(num_rows, np.int64)
        heads = []
        for segment in segments:
            head = self._read(segment.offset, 2 * segment.num_rows, np.dtype(np.uint32))
            local, length = head[: segment.num_rows], head[segment.num_rows :]
            lengths[local] = length
            seen[local] += 1
            heads.append((local, length))
        assert (seen == 1).all(), "a row was scattered never or twice"
        indptr = offsets_of(lengths)
        indices = np.empty(indptr[-1], self._index_dtype)
        values = np.empty(indptr[-1], value_dtype)
        for segment, (local, length) in zip(segments, heads, strict=True):
            at = segment.offset + 8 * segment.num_rows
            own_indices = self._read(at, segment.num_entries, self._index_dtype)
            at += own_indices.nbytes
            own_values = self._read(at, segment.num_entries, segment.value_dtype)
            length = length.astype(np.int64)
            starts = np.cumsum(length) - length
            gather_rows(own_indices, own_values, starts, length, indptr[local], indices, values)
        return SparseRows(indptr, indices, values, self._num_features)

    def _read(self, offset: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        self._file.seek(offset)
        values = np.empty(count, dtype)
        got = self._file.readinto(values.data.cast("B")) if count else 0
        if got != values.nbytes:
            raise RuntimeError(
                f"{self._path}: got {got} of {values.nbytes} bytes at offset {offset}; the temporary file was cut "
                "short: do not touch the folder while ingesting, and start again"
            )
        return values

    def close(self) -> None:
        """Remove the temporary file."""
        # What a full disk could not take is not wanted any more.
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)
