"""A global shuffle in bounded memory: rows are sorted by their place into runs on disk, then the runs are merged.

An external sort whose keys are known beforehand. A run is one file: the places of its rows (ascending), where each
row's entries begin, the sum of each row; then all columns, then all values. Whoever wants the rows of some places reads
one stretch of columns and one of values from every run, so any part of the store can be put together apart from all
others, by whichever process. Each byte is written once and read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from loaders.csr import SparseRows, gather_rows, index_dtype, offsets_of, row_sums

ROW_BYTES = 24
"""Bookkeeping per row while a run grows: place, first entry, number of entries."""

_PIECE = 1 << 20
"""Entries put in order at a time, beside the buffer."""

_HEAD = (("places", np.dtype(np.uint32), 0), ("starts", np.dtype(np.int64), 1), ("sums", np.dtype(np.float64), 0))
"""Arrays at the head of a run: type, and entries beside one a row."""


def destinations(num_cells: int, seed: int) -> npt.NDArray[np.int64]:
    """(n,) place of each cell in the store: a permutation that depends on the seed alone."""
    return np.random.default_rng([seed, 0x5B0FF1E]).permutation(num_cells)


@dataclass(frozen=True)
class Run:
    """A file of rows by ascending place."""

    file: str
    num_rows: int
    num_entries: int
    num_features: int
    value_dtype: str
    checksums: tuple[int, int, int]
    """crc32c of the head, of the columns and of the values."""

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Run:
        """What `dataclasses.asdict` made, after JSON, which has no tuples."""
        return cls(**{**entry, "checksums": tuple(entry["checksums"])})

    @property
    def types(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Of columns and of values."""
        return index_dtype(self.num_features), np.dtype(self.value_dtype)

    @property
    def sections(self) -> tuple[int, int, int]:
        """Bytes of the head, of the columns and of the values."""
        head = sum(dtype.itemsize * (self.num_rows + more) for _, dtype, more in _HEAD)
        return head, self.num_entries * self.types[0].itemsize, self.num_entries * self.types[1].itemsize

    def is_whole(self, folder: Path) -> bool:
        """Whether the file holds what was written: after a crash of the machine it may not."""
        try:
            with open(folder / self.file, "rb") as file:
                found = tuple(crc_of(file, size) for size in self.sections)
                return found == self.checksums and not file.read(1)
        except OSError:
            return False

    def head(self, folder: Path, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Elements [start, stop) of an array of the head: (R,) places, (R + 1,) starts or (R,) sums."""
        # Mapped into memory it would keep the file busy as long as anything refers to it.
        offset = 0
        for own, dtype, more in _HEAD:
            length = self.num_rows + more
            if own == name:
                count = (length if stop is None else stop) - start
                return np.fromfile(folder / self.file, dtype, count, offset=offset + start * dtype.itemsize)
            offset += length * dtype.itemsize
        raise AssertionError(name)


def crc_of(file: IO[bytes], size: int) -> int:
    """crc32c of the next bytes of a file, read in pieces."""
    crc = 0
    while size > 0 and (piece := file.read(min(size, 1 << 22))):
        crc, size = google_crc32c.extend(crc, piece), size - len(piece)
    return int(crc)


class RunWriter:
    """Takes rows with their places in any order, and writes a run whenever the memory is full.

    Parameters
    ----------
    folder
        Receives the files `0`, `1`, ...
    memory
        Bytes of the rows of a run.
    """

    def __init__(self, folder: Path, *, num_features: int, memory: int) -> None:
        self._folder, self._num_features, self._memory = folder, num_features, memory
        self._index_dtype, self._value_dtype = index_dtype(num_features), np.dtype(np.uint8)
        self._indices = np.empty(0, self._index_dtype)
        self._values = np.empty(0, self._value_dtype)
        self.runs: list[Run] = []
        self._forget()

    def _forget(self) -> None:
        self._filled = 0
        self._rows_held = 0
        self._places: list[npt.NDArray[np.integer]] = []
        self._lengths: list[npt.NDArray[np.int64]] = []

    def add(self, places: npt.NDArray[np.integer], rows: SparseRows) -> None:
        """Take rows; row i belongs at places[i]."""
        kind = np.promote_types(rows.values.dtype, self._value_dtype)
        entries = len(rows.indices)
        held = (self._filled + entries) * (self._index_dtype.itemsize + kind.itemsize)
        if held + (self._rows_held + rows.num_rows) * ROW_BYTES > self._memory:
            self.write()
        if self._filled + entries > len(self._indices) or kind != self._value_dtype:
            self._grow(max(self._filled + entries, self._memory // (self._index_dtype.itemsize + kind.itemsize)), kind)
        self._indices[self._filled : self._filled + entries] = rows.indices
        self._values[self._filled : self._filled + entries] = rows.values
        self._filled += entries
        self._rows_held += rows.num_rows
        self._places.append(places)
        self._lengths.append(np.diff(rows.indptr))

    def _grow(self, capacity: int, value_dtype: np.dtype[Any]) -> None:
        # Pages that are never filled are never taken.
        indices, values = np.empty(capacity, self._index_dtype), np.empty(capacity, value_dtype)
        indices[: self._filled], values[: self._filled] = self._indices[: self._filled], self._values[: self._filled]
        self._indices, self._values, self._value_dtype = indices, values, value_dtype

    def write(self) -> None:
        """Write what is held as a run."""
        if not self._rows_held:
            return
        places, lengths = np.concatenate(self._places), np.concatenate(self._lengths)
        firsts = offsets_of(lengths)
        sums = row_sums(firsts, self._values)
        order = np.argsort(places, kind="stable")
        starts = offsets_of(lengths[order])
        head = b"".join(
            array.astype(dtype).tobytes()
            for array, (_, dtype, _) in zip((places[order], starts, sums[order]), _HEAD, strict=True)
        )
        checksums = [int(google_crc32c.value(head)), 0, 0]
        at = [len(head), len(head) + int(starts[-1]) * self._index_dtype.itemsize]
        name = str(len(self.runs))
        with open(self._folder / name, "wb") as file:
            file.write(head)
            for first, last in _pieces(starts, _PIECE):
                chosen, edges = order[first:last], starts[first : last + 1] - starts[first]
                parts = np.empty(edges[-1], self._index_dtype), np.empty(edges[-1], self._value_dtype)
                gather_rows(self._indices, self._values, firsts[chosen], lengths[chosen], edges[:-1], *parts)
                for k, part in enumerate(parts):
                    file.seek(at[k])
                    at[k] += file.write(part.data)
                    checksums[k + 1] = int(google_crc32c.extend(checksums[k + 1], part))
        shape = len(places), int(starts[-1]), self._num_features
        self.runs.append(Run(name, *shape, self._value_dtype.name, (checksums[0], checksums[1], checksums[2])))
        self._forget()


def _pieces(starts: npt.NDArray[np.int64], entries: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows of about so many entries, and at least one row."""
    row, num_rows = 0, len(starts) - 1
    while row < num_rows:
        stop = int(np.searchsorted(starts, starts[row] + entries, side="right")) - 1
        yield row, (row := min(num_rows, max(stop, row + 1)))


def merge_runs(
    runs: Sequence[tuple[Path, Run]], start: int, stop: int, *, value_dtype: npt.DTypeLike, memory: int
) -> Iterator[SparseRows]:
    """The rows of the places [start, stop) in their order, in pieces of about `memory` bytes.

    Parameters
    ----------
    runs
        The folder of each, and what it holds.
    value_dtype
        Must hold every value.
    """
    heads = []
    lengths, seen = np.zeros(stop - start, np.int64), np.zeros(stop - start, np.uint8)
    for folder, run in runs:
        places = run.head(folder, "places")
        low, high = (int(place) for place in np.searchsorted(places, (start, stop)))
        local = places[low:high] - np.uint32(start)
        starts = run.head(folder, "starts", low, high + 1)
        lengths[local] = np.diff(starts)
        seen[local] += 1
        heads.append((local, starts))
    assert (seen == 1).all(), "a row was sorted into no run, or into two"
    dtype = np.dtype(value_dtype)
    indptr = offsets_of(lengths)
    types = runs[0][1].types[0] if runs else np.dtype(np.uint16)
    for first, last in _pieces(indptr, memory // (types.itemsize + dtype.itemsize)):
        edges = indptr[first : last + 1] - indptr[first]
        indices, values = np.empty(edges[-1], types), np.empty(edges[-1], dtype)
        for (folder, run), (local, starts) in zip(runs, heads, strict=True):
            low, high = np.searchsorted(local, (first, last))
            if low == high:
                continue
            own = _read(folder / run.file, run, int(starts[low]), int(starts[high]))
            begins, ends = starts[low:high] - starts[low], starts[low + 1 : high + 1] - starts[low]
            gather_rows(*own, begins, ends - begins, edges[local[low:high] - np.uint32(first)], indices, values)
        yield SparseRows(edges, indices, values, runs[0][1].num_features)


def _read(path: Path, run: Run, first: int, last: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Columns and values [first, last) of a run."""
    columns_at, values_at = run.sections[0], run.sections[0] + run.sections[1]
    with open(path, "rb", buffering=0) as file:
        parts = []
        for at, dtype in zip((columns_at, values_at), run.types, strict=True):
            part = np.empty(last - first, dtype)
            file.seek(at + first * dtype.itemsize)
            _fill(path, file, part)
            parts.append(part)
    return parts[0], parts[1]


def _fill(path: Path, file: Any, part: npt.NDArray[Any]) -> None:
    view, done = part.view(np.uint8), 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise RuntimeError(
                f"{path}: got {done} of {len(view)} bytes; the temporary file was cut short: do not touch the folder "
                "while ingesting, and start again"
            )
        done += got


def row_table(runs: Iterable[tuple[Path, Run]], num_rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """(R,) entries and (R,) sum of every row by its place."""
    lengths, sums = np.full(num_rows, -1, np.int64), np.zeros(num_rows)
    for folder, run in runs:
        places = run.head(folder, "places")
        lengths[places], sums[places] = np.diff(run.head(folder, "starts")), run.head(folder, "sums")
    assert (lengths >= 0).all(), "a row was sorted into no run"
    return lengths, sums
