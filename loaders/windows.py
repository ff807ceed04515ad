"""A window in memory: the rows of some blocks of one modality, and where each cell's entries begin.

Shapes: B cells of the window, R rows of the modality, N entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from loaders.buffers import Pool
from loaders.plan import Epoch, Rows, Window

MAX_GAP = 32
"""Rows not asked for that are read along rather than split a read: decoding 32 rows costs less than a seek."""

PIECE_ROWS = 1024
"""Rows read at a time where few of them are kept, so that those dropped never fill a window."""

CHECKPOINT = 256
"""Rows between stored offsets; offsets in between are summed from lengths."""


@dataclass(frozen=True)
class PreparedRows:
    """Rows whose entries are known in number, and a function that puts them into memory.

    Attributes
    ----------
    starts, lengths
        (B,) int64: where each row will begin and how many entries it has.
    num_entries
        Entries that `fill` writes; may be more than the sum of lengths.
    fill
        Writes the entries into (num_entries,) indices and values of the reader's types.
    """

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    num_entries: int
    fill: Callable[[npt.NDArray[np.generic], npt.NDArray[np.generic]], None]


class RowReader(Protocol):
    """Reads rows of one modality's matrix; called from several threads at once."""

    index_dtype: np.dtype[Any]
    value_dtype: np.dtype[Any]

    def prepare(self, rows: npt.NDArray[np.int64]) -> PreparedRows:
        """Make ready to read (B,) rows, in runs that ascend; a row may repeat."""
        ...


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
        self._lengths = np.concatenate(lengths)
        self._checkpoints = np.concatenate(checkpoints)
        self.num_rows = len(self._lengths)
        self.num_entries = 0 if previous is None else int(previous)

    def between(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop - start + 1,) offsets of the rows [start, stop) and of their end."""
        base = start // CHECKPOINT
        offsets = np.empty(stop - start + 1, np.int64)
        offsets[0] = self._checkpoints[base] + self._lengths[base * CHECKPOINT : start].sum(dtype=np.int64)
        np.cumsum(self._lengths[start:stop], dtype=np.int64, out=offsets[1:])
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


@dataclass(frozen=True)
class WindowRows:
    """One modality of a window.

    Attributes
    ----------
    indices, values
        (N,) entries as stored.
    starts, lengths
        (B,) int64: the entries of each cell, in the order of training; length 0 where the cell lacks the modality.
    present
        (B,) bool, or None where every cell has the modality.
    """

    indices: npt.NDArray[np.generic]
    values: npt.NDArray[np.generic]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class ModalitySource:
    """Everything that reading one modality of a store needs.

    Attributes
    ----------
    rows
        (n,) int32 row of each cell in the matrix, -1 where it lacks the modality; None if every cell has it.
    nonzeros_per_cell
        Mean over all cells of the store.
    """

    name: str
    reader: RowReader
    rows: npt.NDArray[np.int32] | None
    num_features: int
    nonzeros_per_cell: float
    indices_pool: Pool
    values_pool: Pool

    @property
    def bytes_per_cell(self) -> float:
        """Mean bytes of a cell in a window."""
        return (self.reader.index_dtype.itemsize + self.reader.value_dtype.itemsize) * self.nonzeros_per_cell + 24


@dataclass(frozen=True)
class WindowCells:
    """Cells of a window.

    Attributes
    ----------
    read
        (B,) rows of the store in the order of reading.
    order
        (B,) place in `read` of each cell in the order of training.
    trained
        (B,) rows of the store in the order of training.
    """

    read: Rows
    order: npt.NDArray[np.int64]
    trained: Rows


def order_window(epoch: Epoch, window: Window) -> WindowCells:
    """Cells of a window of the plan."""
    rows, order = epoch.window_rows(window), epoch.window_order(window)
    return WindowCells(rows, order, rows[order])


def runs_of(rows: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Split (B,) rows into [begin, end) runs of ascending rows that one read serves.

    A row may repeat. Runs whose rows stand far apart are cut so that no read spans more than `PIECE_ROWS` rows
    of which few are wanted.
    """
    if not len(rows):
        return []
    steps = np.diff(rows)
    cuts = np.flatnonzero((steps < 0) | (steps > MAX_GAP)) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    runs = []
    for begin, end in pairwise(edges):
        while 2 * (end - begin) < rows[end - 1] + 1 - rows[begin] and rows[end - 1] - rows[begin] >= PIECE_ROWS:
            middle = begin + int(np.searchsorted(rows[begin:end], rows[begin] + PIECE_ROWS))
            runs.append((begin, middle))
            begin = middle
        runs.append((begin, end))
    return runs


def read_window(source: ModalitySource, cells: npt.NDArray[np.integer], order: npt.NDArray[np.int64]) -> WindowRows:
    """Read the rows of a window's cells.

    Parameters
    ----------
    cells
        (B,) rows of the store in the order of reading.
    order
        (B,) place in `cells` of each cell in the order of training.
    """
    rows = cells.astype(np.int64) if source.rows is None else source.rows[cells].astype(np.int64)
    present = None if source.rows is None else rows >= 0
    prepared = source.reader.prepare(rows if present is None else rows[present])
    indices = source.indices_pool.take(prepared.num_entries, source.reader.index_dtype)
    values = source.values_pool.take(prepared.num_entries, source.reader.value_dtype)
    prepared.fill(indices, values)
    starts, lengths = prepared.starts, prepared.lengths
    if present is None:
        return WindowRows(indices, values, starts[order], lengths[order], None)
    all_starts, all_lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    all_starts[present], all_lengths[present] = starts, lengths
    return WindowRows(indices, values, all_starts[order], all_lengths[order], present[order])
