"""The matrix in an element of an AnnData, in HDF5, Zarr or memory: CSR, CSC or dense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata.abc
import numpy as np
import numpy.typing as npt
import scipy.sparse

from loaders.csr import SparseRows, offsets_of, scatter_entries, sound_csr
from loaders.formats.compressed import CompressedRows, RowOffsets, check_arrays, read_offsets
from loaders.formats.frame import as_text
from loaders.formats.matrix import ENTRY_BYTES, StoredMatrix
from loaders.formats.root import reading


def open_matrix(element: Any, where: str, *, cells: npt.NDArray[np.int64] | None = None) -> StoredMatrix:
    """The matrix stored in an element; ValueError if it is none.

    Parameters
    ----------
    cells
        (n,) row of each cell in the matrix, or None where they are the same; for messages.
    """
    if isinstance(element, anndata.abc.CSRDataset | anndata.abc.CSCDataset):
        element = element.group
    if scipy.sparse.issparse(element):
        with reading(where):
            rows = element if element.format == "csr" else sound_csr(element)
        arrays = {"data": rows.data, "indices": rows.indices, "indptr": rows.indptr}
        return CompressedRows(where, rows.shape, arrays, cells=lambda: cells)
    attributes = dict(getattr(element, "attrs", {}))
    kind = as_text(attributes.get("encoding-type", attributes.get("h5sparse_format", "array")))
    if kind in ("csr_matrix", "csr", "csc_matrix", "csc"):
        rows, columns = attributes["shape" if "shape" in attributes else "h5sparse_shape"]
        if kind.startswith("csr"):
            return CompressedRows(where, (int(rows), int(columns)), element, cells=lambda: cells)
        return CompressedColumns(where, (int(rows), int(columns)), element)
    if kind == "array" and getattr(element, "ndim", 0) == 2:
        return DenseRows(where, element)
    raise ValueError(
        f"{where}: got an element of the kind {kind!r}, expected a CSR, CSC or dense matrix; save it as CSR"
    )


class DenseRows(StoredMatrix):
    """A two-dimensional array (cells, features), as AnnData often holds ADT: the zeros are dropped."""

    slow_because = "it is not one csr_matrix"

    def __init__(self, where: str, array: Any) -> None:
        super().__init__()
        self.where, self._array, self.stored_dtype = where, array, np.dtype(array.dtype).newbyteorder("=")
        self.num_rows, self.num_features = (int(length) for length in array.shape)

    def bytes_per_row(self) -> float:
        return max(1, self.num_features) * (self.stored_dtype.itemsize + ENTRY_BYTES)

    def estimated_nonzeros(self) -> int:
        if not self.num_rows:
            return 0
        # Ten stretches spread over the file: dense files are often sorted by depth or by sample.
        starts = np.unique(np.linspace(0, max(0, self.num_rows - 100), 10).astype(int))
        counts = [np.count_nonzero(self._array[start : start + 100]) for start in starts]
        rows = sum(min(100, self.num_rows - start) for start in starts)
        return int(1.2 * sum(counts) / rows * self.num_rows)

    def stored(self, start: int, stop: int) -> SparseRows:
        with reading(self.where, f"rows {start}:{stop}"):
            block = np.asarray(self._array[start:stop], self.stored_dtype)
        rows, columns = np.nonzero(block)
        lengths = np.bincount(rows, minlength=len(block))
        return SparseRows(offsets_of(lengths), columns, block[rows, columns], self.num_features)


class CompressedColumns(StoredMatrix):
    """CSC, for an ingest alone: the entries are dealt to files of consecutive rows, then each file is put in order.

    Reads the matrix twice and writes it once to the spill folder (12 bytes per non-zero for float32).
    """

    def __init__(self, where: str, shape: tuple[int, int], group: Any) -> None:
        super().__init__()
        check_arrays(f"{where} (CSC)", group, num_offsets=shape[1] + 1)
        self.where, (self.num_rows, self.num_features) = where, shape
        self._data, self._indices, self._indptr = group["data"], group["indices"], group["indptr"]
        self.stored_dtype = np.dtype(self._data.dtype).newbyteorder("=")

    def estimated_nonzeros(self) -> int:
        return int(self._data.shape[0])

    def peek(self) -> SparseRows | None:
        return None

    def stored(self, start: int, stop: int) -> SparseRows:
        raise ValueError(
            f"{self.where}: got a matrix compressed by column (CSC), whose rows cannot be streamed; write it as CSR"
            f" (`adata.X = adata.X.tocsr()`), or ingest it, which takes it by column"
        )

    def parts(self, memory: int) -> list[tuple[int, int]]:
        return [(0, self.num_rows)]

    def chunks(self, part: tuple[int, int], *, memory: int, spill: Path) -> Iterator[tuple[int, SparseRows]]:
        columns = read_offsets(f"{self.where} (CSC)", self._indptr, num_values=self._data.shape[0])
        step = max(1, memory // (2 * ENTRY_BYTES))
        counts = np.zeros(self.num_rows, np.int64)
        for first in range(0, self._data.shape[0], step):
            rows = self._read(self._indices, first, step)
            if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
                raise ValueError(
                    f"{self.where}: got row {int(rows.max() if rows.max() >= self.num_rows else rows.min())} in a CSC "
                    f"matrix of {self.num_rows} rows; the file is damaged or was written wrongly: write it again from "
                    "its source"
                )
            counts += np.bincount(rows, minlength=self.num_rows)
        offsets = RowOffsets([offsets_of(counts)])
        ranges = list(offsets.ranges(step))
        folder = spill / "columns"
        folder.mkdir(exist_ok=True)
        try:
            self._deal(folder, np.array([start for start, _ in ranges]), columns.between(0, self.num_features), step)
            for number, (start, stop) in enumerate(ranges):
                edges = offsets.between(start, stop)
                yield start, self._collect(folder, number, start, edges - edges[0])
        finally:
            for file in folder.iterdir():
                file.unlink()

    def _deal(
        self, folder: Path, starts: npt.NDArray[np.int64], column_offsets: npt.NDArray[np.int64], step: int
    ) -> None:
        for first in range(0, self._data.shape[0], step):
            rows, values = (self._read(array, first, step) for array in (self._indices, self._data))
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

    def _read(self, array: Any, first: int, count: int) -> npt.NDArray[Any]:
        with reading(self.where, f"entries {first}:{first + count}"):
            return np.asarray(array[first : first + count], array.dtype.newbyteorder("="))

    def _collect(self, folder: Path, number: int, start: int, indptr: npt.NDArray[np.int64]) -> SparseRows:
        parts = {}
        for name, dtype in (("rows", np.uint32), ("columns", np.uint32), ("values", self.stored_dtype)):
            file = folder / f"{number}.{name}"
            parts[name] = np.fromfile(file, dtype) if file.exists() else np.zeros(0, dtype)
        columns, values = np.empty_like(parts["columns"]), np.empty_like(parts["values"])
        rows = parts["rows"] - np.uint32(start)
        scatter_entries(rows, parts["columns"], parts["values"], indptr[:-1].copy(), columns, values)
        return SparseRows(indptr, columns, values, self.num_features)
