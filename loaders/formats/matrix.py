"""A matrix of counts, whoever asks: rows for training, chunks for an ingest, one pass for statistics.

Shapes: R rows of a matrix, F features, B rows asked for, N entries of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from loaders.csr import (
    OUT_OF_RANGE,
    UNSORTED,
    SparseRows,
    add_repeated,
    concat_rows,
    index_dtype,
    inspect_columns,
    narrow,
    offsets_of,
    select_columns,
    sort_rows,
    travelling_dtype,
    widest_dtype,
)
from loaders.formats.measured import Measured, check_counts, joined, measured

T = TypeVar("T")

PASS_BYTES = 256 << 20
"""Memory of a pass over a whole matrix."""

ENTRY_BYTES = 40
"""Peak bytes of an entry on a pass: 20 as TileDB-SOMA hands it out, or values and columns as stored and packed for
sorting, and the result."""

PEEK_ROWS = 64
"""Rows of a first look."""

MAX_GAP = 32
"""Rows not asked for that are read along rather than split a read: decoding 32 rows costs less than a seek."""

SPAN_ROWS = 1024
"""Rows read at a time where few of them are kept, so that those dropped never fill a window."""


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


@dataclass(frozen=True)
class Prepared:
    """Rows whose entries are known in number, and a function that puts them into memory.

    Attributes
    ----------
    starts, lengths
        (B,) int64: where each row will begin and how many entries it has.
    num_entries
        Entries that `fill` writes; may be more than the sum of lengths.
    fill
        Writes the entries into (num_entries,) indices and values of the matrix's `window_dtypes`.
    """

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    num_entries: int
    fill: Callable[[npt.NDArray[np.generic], npt.NDArray[np.generic]], None]


class Matrix:
    """R rows of F features. Methods may be called from several threads at once.

    Attributes
    ----------
    where
        File and place within it, for messages.
    value_dtype
        Type in which values travel.
    row_alignment
        Rows that are decoded together: reads and blocks should begin at multiples of it.
    slow_because
        Why rows are not read by our own reader of sharded arrays, where an ingest would change that.
    """

    where: str
    num_rows: int
    num_features: int
    value_dtype: np.dtype[Any]
    row_alignment: int = 1
    slow_because: str | None = None

    def __init__(self) -> None:
        self._measured = once(self._measure)
        self._counted = once(self._count)

    def read(self, start: int, stop: int) -> SparseRows:
        """Rows [start, stop): columns ascend within the features, values are of the travelling type."""
        raise NotImplementedError

    def bytes_per_row(self) -> float:
        """Mean bytes that a row takes while it is read."""
        raise NotImplementedError

    @property
    def window_dtypes(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Types of the indices and values that `prepare` fills in."""
        return index_dtype(self.num_features), self.value_dtype

    def prepare(self, rows: npt.NDArray[np.int64]) -> Prepared:
        """Make ready to read (B,) rows, in runs that ascend; a row may repeat."""
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        parts, total = [], 0
        for begin, end in runs_of(rows):
            part = self.read(int(rows[begin]), int(rows[end - 1]) + 1)
            inside = rows[begin:end] - rows[begin]
            starts[begin:end] = total + part.indptr[inside]
            lengths[begin:end] = part.indptr[inside + 1] - part.indptr[inside]
            parts.append(part)
            total += len(part.indices)

        def fill(indices: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
            done = 0
            for part in parts:
                span = slice(done, done + len(part.indices))
                indices[span], values[span] = part.indices, part.values
                done = span.stop

        return Prepared(starts, lengths, total, fill)

    def ranges(self, memory: int) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of all rows, of which one takes about `memory` bytes while it is read."""
        step = max(1, int(min(1 << 20, memory / self.bytes_per_row())) // self.row_alignment) * self.row_alignment
        for start in range(0, self.num_rows, step):
            yield start, min(start + step, self.num_rows)

    def in_order(self, *, memory: int = PASS_BYTES) -> Iterator[tuple[int, SparseRows]]:
        """The one pass over a matrix in bounded memory: all rows in their order, as (first row, rows)."""
        for start, stop in self.ranges(memory):
            yield start, self.read(start, stop)

    def _measure(self) -> Measured:
        """By a pass."""
        return joined([measured(rows) for _, rows in self.in_order()])

    def _count(self) -> npt.NDArray[np.float64]:
        _, sums, extents = self._measured()
        check_counts(self.where, extents)
        return sums

    def lengths(self) -> npt.NDArray[np.int64]:
        """(R,) entries of each row; may cost a pass the first time."""
        return self._measured()[0]

    def sums(self) -> npt.NDArray[np.float64]:
        """(R,) sum of the values of each row, which must be counts; may cost a pass the first time."""
        return self._counted()

    def num_nonzeros(self) -> int:
        return int(self.lengths().sum())

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"{self.where}: got rows {start}:{stop}; give rows within 0:{self.num_rows}")


class StoredMatrix(Matrix):
    """A matrix as a file or an object in memory holds it.

    Attributes
    ----------
    stored_dtype
        Type of the values there.
    """

    stored_dtype: np.dtype[Any]

    @property
    def value_dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return travelling_dtype(self.stored_dtype)

    def stored(self, start: int, stop: int) -> SparseRows:
        """Rows [start, stop) as they are held: columns in any order and unchecked, values of any type."""
        raise NotImplementedError

    def estimated_nonzeros(self) -> int:
        """Entries, at least about, without a pass."""
        return self.num_nonzeros()

    def parts(self, memory: int) -> list[tuple[int, int]]:
        """Ranges of rows that can be read apart from each other, each about `memory` bytes as `ranges` counts them."""
        return list(self.ranges(memory))

    def peek(self) -> SparseRows | None:
        """Some of the first rows as they are held; None where that is not quickly done."""
        return self.stored(0, min(PEEK_ROWS, self.num_rows))

    def chunks(self, part: tuple[int, int], *, memory: int, spill: Path) -> Iterator[tuple[int, SparseRows]]:
        """The rows of a part in their order as they are held, in at most about `memory` bytes, processing included."""
        for start, stop in self.ranges(memory):
            if (first := max(start, part[0])) < (last := min(stop, part[1])):
                yield first, self.stored(first, last)

    def read(self, start: int, stop: int) -> SparseRows:
        self._check_range(start, stop)
        held = self.stored(start, stop)
        row, state = inspect_columns(held.indptr, held.indices, self.num_features)
        if state == OUT_OF_RANGE:
            raise out_of_range(self.where, start + row, self.num_features)
        try:
            rows = SparseRows(held.indptr, _narrow_indices(held.indices), narrow(held.values), self.num_features)
        except ValueError as error:
            raise ValueError(f"{self.where}: rows {start}:{stop} {error}") from None
        return sort_rows(rows) if state == UNSORTED else rows


def out_of_range(where: str, row: int, num_features: int) -> RuntimeError:
    return RuntimeError(
        f"{where}: got a column outside 0..{num_features - 1} in row {row}: the store is damaged and has no checksums;"
        f" copy it again, and ingest it, which adds them"
    )


def _narrow_indices(indices: npt.NDArray[Any]) -> npt.NDArray[np.integer]:
    if indices.dtype.kind == "i":
        return indices.astype(np.int32, copy=False)
    return indices.astype(np.uint16 if indices.dtype.itemsize <= 2 else np.uint32, copy=False)


def runs_of(rows: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Split (B,) rows into [begin, end) runs of ascending rows that one read serves.

    A row may repeat. Runs whose rows stand far apart are cut so that no read spans more than `SPAN_ROWS` rows
    of which few are wanted.
    """
    if not len(rows):
        return []
    steps = np.diff(rows)
    cuts = np.flatnonzero((steps < 0) | (steps > MAX_GAP)) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    runs = []
    for begin, end in pairwise(edges):
        while 2 * (end - begin) < rows[end - 1] + 1 - rows[begin] and rows[end - 1] - rows[begin] >= SPAN_ROWS:
            middle = begin + int(np.searchsorted(rows[begin:end], rows[begin] + SPAN_ROWS))
            runs.append((begin, middle))
            begin = middle
        runs.append((begin, end))
    return runs


class SelectedColumns(Matrix):
    """A matrix through other features: some of its columns, renamed.

    Parameters
    ----------
    target
        (F of the matrix,) new column of each, -1 where it is left out. Values of several that become one are added up.
    num_features
        Number of new columns; one that nothing maps to is empty.
    """

    def __init__(self, matrix: Matrix, target: npt.NDArray[np.int32], num_features: int) -> None:
        super().__init__()
        self._matrix, self._target, self.where = matrix, target, matrix.where
        self.num_rows, self.num_features = matrix.num_rows, num_features
        self.value_dtype, self.row_alignment = matrix.value_dtype, matrix.row_alignment
        self._is_shared = bool((np.bincount(target[target >= 0], minlength=1) > 1).any())
        if self._is_shared and self.value_dtype.kind == "u":
            # A sum may need more than its parts.
            self.value_dtype = np.dtype(np.uint32)

    def bytes_per_row(self) -> float:
        return self._matrix.bytes_per_row()

    def read(self, start: int, stop: int) -> SparseRows:
        rows = select_columns(self._matrix.read(start, stop), self._target, self.num_features)
        if not self._is_shared:
            return rows
        return add_repeated(replace(rows, values=rows.values.astype(self.value_dtype)))


class ReorderedRows(Matrix):
    """Rows of a matrix in another order; consecutive rows are still read together."""

    def __init__(self, matrix: Matrix, order: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self._matrix, self._order, self.where = matrix, order, matrix.where
        self.num_rows, self.num_features = len(order), matrix.num_features
        self.value_dtype = matrix.value_dtype

    def bytes_per_row(self) -> float:
        return self._matrix.bytes_per_row()

    def lengths(self) -> npt.NDArray[np.int64]:
        return self._matrix.lengths()[self._order]

    def sums(self) -> npt.NDArray[np.float64]:
        return self._matrix.sums()[self._order]

    def read(self, start: int, stop: int) -> SparseRows:
        self._check_range(start, stop)
        rows = self._order[start:stop]
        if not len(rows):
            return self._matrix.read(0, 0)
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
        runs = [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(cuts)]
        return concat_rows([self._matrix.read(first, last) for first, last in runs])


class ChainedMatrix(Matrix):
    """Matrices of the same features below each other; at least one."""

    def __init__(self, matrices: Sequence[Matrix], where: str) -> None:
        super().__init__()
        self._matrices, self.where = matrices, where
        self._starts = offsets_of(np.array([matrix.num_rows for matrix in matrices]))
        self.num_rows, self.num_features = int(self._starts[-1]), matrices[0].num_features
        self.value_dtype = widest_dtype(matrix.value_dtype for matrix in matrices)
        self.row_alignment = max(matrix.row_alignment for matrix in matrices)
        # The parts fill one window where they agree in its types.
        self._is_uniform = len({matrix.window_dtypes for matrix in matrices}) == 1
        reasons = [matrix.slow_because for matrix in matrices if matrix.slow_because is not None]
        self.slow_because = next(iter(reasons), None) if self._is_uniform else "the stores hold different types"

    @property
    def window_dtypes(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        return self._matrices[0].window_dtypes if self._is_uniform else super().window_dtypes

    def bytes_per_row(self) -> float:
        return max(matrix.bytes_per_row() for matrix in self._matrices)

    def lengths(self) -> npt.NDArray[np.int64]:
        return np.concatenate([matrix.lengths() for matrix in self._matrices])

    def sums(self) -> npt.NDArray[np.float64]:
        return np.concatenate([matrix.sums() for matrix in self._matrices])

    def read(self, start: int, stop: int) -> SparseRows:
        self._check_range(start, stop)
        within = [(max(start, a) - a, min(stop, b) - a) for a, b in pairwise(self._starts.tolist())]
        parts = [m.read(a, b) for m, (a, b) in zip(self._matrices, within, strict=True) if a < b]
        return concat_rows(parts) if parts else self._matrices[0].read(0, 0)

    def prepare(self, rows: npt.NDArray[np.int64]) -> Prepared:
        if not self._is_uniform:
            return super().prepare(rows)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(rows)] if len(rows) else []
        parts, total = [], 0
        for begin, end in pairwise(edges):
            which = int(owner[begin])
            part = self._matrices[which].prepare(rows[begin:end] - self._starts[which])
            starts[begin:end], lengths[begin:end] = part.starts + total, part.lengths
            parts.append((part, total))
            total += part.num_entries

        def fill(indices: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
            for part, low in parts:
                span = slice(low, low + part.num_entries)
                part.fill(indices[span], values[span])

        return Prepared(starts, lengths, total, fill)
