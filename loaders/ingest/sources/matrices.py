"""Count matrices in files, read as consecutive rows in bounded memory: CSR, dense, and CSC by a transposition on disk.

HDF5 datasets and Zarr arrays are sliced alike, so one class serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from loaders.csr import offsets_of, scatter_entries

ENTRY_BYTES = 32
"""Peak bytes per non-zero of a chunk in flight: values and indices as stored, packed for sorting, and the result."""


PEEK_ROWS = 64
"""Rows of the first look at a source."""


@dataclass(frozen=True)
class RawRows:
    """Rows [start, start + B) as a file holds them, unchecked: indptr (B + 1,) from 0, indices and values (N,)."""

    start: int
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[Any]
    values: npt.NDArray[Any]


class Matrix(Protocol):
    """A matrix in a file.

    Attributes
    ----------
    where
        File and place within it, for messages.
    """

    where: str
    num_rows: int
    num_features: int

    def estimated_nonzeros(self) -> int:
        """Stored entries; for a dense matrix an estimate from 1,000 rows."""
        ...

    def peek(self) -> RawRows | None:
        """Some of the first rows, quickly; None where that is not possible."""
        ...

    def chunks(self, *, memory: int, spill: Path | None = None) -> Iterator[RawRows]:
        """All rows in their order. At most about `memory` bytes are in use per chunk, processing included."""
        ...


def open_matrix(element: Any, where: str) -> Matrix:
    """The matrix stored in an HDF5 or Zarr element of an AnnData file; ValueError if it is none."""
    attributes = dict(element.attrs)
    kind = _text(attributes.get("encoding-type", attributes.get("h5sparse_format", "array")))
    if kind in ("csr_matrix", "csr", "csc_matrix", "csc"):
        shape = attributes["shape" if "shape" in attributes else "h5sparse_shape"]
        num_rows, num_features = int(shape[0]), int(shape[1])
        if kind.startswith("csr"):
            return CompressedRows(where, num_rows, num_features, element)
        return CompressedColumns(where, num_rows, num_features, element)
    if kind == "array" and getattr(element, "ndim", 0) == 2:
        return DenseRows(where, element.shape[0], element.shape[1], element)
    raise ValueError(
        f"{where}: got an element of the kind {kind!r}, expected a CSR, CSC or dense matrix; save it as CSR"
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def check_offsets(where: str, indptr: npt.NDArray[Any], num_rows: int, num_entries: int, num_indices: int) -> None:
    """Refuse row offsets that do not start at 0, fall, or do not end at the number of entries."""
    cure = "the file is damaged or was written wrongly: write it again from its source"
    if len(indptr) != num_rows + 1:
        raise ValueError(f"{where}: got {len(indptr)} row offsets for {num_rows} rows, expected {num_rows + 1}; {cure}")
    if num_entries != num_indices:
        raise ValueError(f"{where}: got {num_entries} values but {num_indices} indices; {cure}")
    falls = np.flatnonzero(np.diff(indptr) < 0)
    if len(falls):
        row = int(falls[0])
        raise ValueError(f"{where}: row offsets fall from {indptr[row]} to {indptr[row + 1]} at row {row}; {cure}")
    if indptr[0] != 0 or indptr[-1] != num_entries:
        raise ValueError(
            f"{where}: row offsets run from {indptr[0]} to {indptr[-1]}, expected 0 to {num_entries}, the stored "
            f"entries; {cure}"
        )


class CompressedRows:
    """CSR: chunks are slices."""

    def __init__(self, where: str, num_rows: int, num_features: int, group: Any) -> None:
        self.where, self.num_rows, self.num_features, self._group = where, num_rows, num_features, group

    def estimated_nonzeros(self) -> int:
        return int(self._group["data"].shape[0])

    def peek(self) -> RawRows | None:
        num = min(PEEK_ROWS, self.num_rows)
        indptr = self._group["indptr"][: num + 1].astype(np.int64)
        if len(indptr) != num + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
            return None
        return RawRows(0, indptr, self._group["indices"][: indptr[-1]], self._group["data"][: indptr[-1]])

    def chunks(self, *, memory: int, spill: Path | None = None) -> Iterator[RawRows]:
        data, indices = self._group["data"], self._group["indices"]
        indptr = self._group["indptr"][:].astype(np.int64)
        check_offsets(self.where, indptr, self.num_rows, data.shape[0], indices.shape[0])
        for start, stop in row_ranges(indptr, memory // ENTRY_BYTES):
            first, last = int(indptr[start]), int(indptr[stop])
            yield RawRows(start, indptr[start : stop + 1] - first, indices[first:last], data[first:last])


def row_ranges(indptr: npt.NDArray[np.int64], entries: int) -> Iterator[tuple[int, int]]:
    """Cut rows into consecutive ranges of at most `entries` entries and 2**20 rows, and at least one row."""
    start, num_rows = 0, len(indptr) - 1
    while start < num_rows:
        stop = int(np.searchsorted(indptr, indptr[start] + entries, side="right")) - 1
        stop = min(max(stop, start + 1), start + 2**20, num_rows)
        yield start, stop
        start = stop


class DenseRows:
    """Dense: the zeros are dropped chunk by chunk."""

    def __init__(self, where: str, num_rows: int, num_features: int, array: Any) -> None:
        self.where, self.num_rows, self.num_features, self._array = where, num_rows, num_features, array

    def estimated_nonzeros(self) -> int:
        if not self.num_rows:
            return 0
        # Ten stretches spread over the file: dense files are often sorted by depth or by sample.
        starts = np.unique(np.linspace(0, max(0, self.num_rows - 100), 10).astype(int))
        counts = [np.count_nonzero(self._array[start : start + 100]) for start in starts]
        rows = sum(min(100, self.num_rows - start) for start in starts)
        return int(1.2 * sum(counts) / rows * self.num_rows)

    def chunks(self, *, memory: int, spill: Path | None = None) -> Iterator[RawRows]:
        row_bytes = self.num_features * (self._array.dtype.itemsize + ENTRY_BYTES)
        step = max(1, min(2**16, memory // max(1, row_bytes)))
        for start in range(0, self.num_rows, step):
            yield _from_dense(start, self._array[start : start + step])

    def peek(self) -> RawRows | None:
        return _from_dense(0, self._array[:PEEK_ROWS])


def _from_dense(start: int, block: npt.NDArray[Any]) -> RawRows:
    rows, columns = np.nonzero(block)
    indptr = offsets_of(np.bincount(rows, minlength=len(block)))
    return RawRows(start, indptr, columns, block[rows, columns])


class CompressedColumns:
    """CSC: the entries are dealt to files of consecutive rows, then each file is put in order.

    Reads the matrix twice and writes it once to the spill folder (12 bytes per non-zero for float32).
    """

    def __init__(self, where: str, num_rows: int, num_features: int, group: Any) -> None:
        self.where, self.num_rows, self.num_features, self._group = where, num_rows, num_features, group

    def estimated_nonzeros(self) -> int:
        return int(self._group["data"].shape[0])

    def peek(self) -> RawRows | None:
        return None

    def chunks(self, *, memory: int, spill: Path | None = None) -> Iterator[RawRows]:
        assert spill is not None
        data, indices = self._group["data"], self._group["indices"]
        column_offsets = self._group["indptr"][:].astype(np.int64)
        check_offsets(f"{self.where} (CSC)", column_offsets, self.num_features, data.shape[0], indices.shape[0])
        step = max(1, memory // (2 * ENTRY_BYTES))
        indptr = np.zeros(self.num_rows + 1, np.int64)
        for first in range(0, data.shape[0], step):
            rows = indices[first : first + step]
            if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
                raise ValueError(
                    f"{self.where}: got row {int(rows.max() if rows.max() >= self.num_rows else rows.min())} in a CSC "
                    f"matrix of {self.num_rows} rows; the file is damaged or was written wrongly: write it again from "
                    "its source"
                )
            indptr[1:] += np.bincount(rows, minlength=self.num_rows)
        np.cumsum(indptr, out=indptr)
        ranges = list(row_ranges(indptr, step))
        folder = spill / "columns"
        folder.mkdir(exist_ok=True)
        try:
            self._deal(folder, np.array([start for start, _ in ranges]), column_offsets, step)
            for number, (start, stop) in enumerate(ranges):
                yield self._collect(folder, number, start, indptr[start : stop + 1] - indptr[start])
        finally:
            for file in folder.iterdir():
                file.unlink()

    def _deal(
        self, folder: Path, starts: npt.NDArray[np.int64], column_offsets: npt.NDArray[np.int64], step: int
    ) -> None:
        data, indices = self._group["data"], self._group["indices"]
        for first in range(0, data.shape[0], step):
            rows, values = indices[first : first + step], data[first : first + step]
            positions = np.arange(first, first + len(rows))
            columns = (np.searchsorted(column_offsets, positions, side="right") - 1).astype(np.uint32)
            bucket = np.searchsorted(starts, rows, side="right") - 1
            # Stable, so that columns ascend within a row when its bucket is read back.
            order = np.argsort(bucket, kind="stable")
            bounds = np.searchsorted(bucket[order], np.arange(len(starts) + 1))
            for number in np.flatnonzero(np.diff(bounds)):
                chosen = order[bounds[number] : bounds[number + 1]]
                for name, part in (("rows", rows.astype(np.uint32)), ("columns", columns), ("values", values)):
                    with open(folder / f"{number}.{name}", "ab") as file:
                        part[chosen].tofile(file)

    def _collect(self, folder: Path, number: int, start: int, indptr: npt.NDArray[np.int64]) -> RawRows:
        parts = {}
        for name, dtype in (("rows", np.uint32), ("columns", np.uint32), ("values", self._group["data"].dtype)):
            file = folder / f"{number}.{name}"
            parts[name] = np.fromfile(file, dtype) if file.exists() else np.zeros(0, dtype)
        columns, values = np.empty_like(parts["columns"]), np.empty_like(parts["values"])
        rows = parts["rows"] - np.uint32(start)
        scatter_entries(rows, parts["columns"], parts["values"], indptr[:-1].copy(), columns, values)
        return RawRows(start, indptr, columns, values)
