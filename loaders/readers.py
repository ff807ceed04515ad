"""How the rows of one modality are read: by our own reader of sharded arrays, or through the store."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.csr import OUT_OF_RANGE, SORTED, SparseRows, gather_rows, inspect_columns, sort_rows
from loaders.stores.base import Store
from loaders.stores.chained_store import ChainedStore
from loaders.stores.sharded import DamagedChunk, ShardedArray, UnsupportedArray
from loaders.windows import PreparedRows, RowOffsets, RowReader, runs_of

_log = logging.getLogger(__name__)

OFFSETS_PER_READ = 1 << 18
"""Row offsets read at a time: they shrink to a quarter at once, so that millions of cells add little memory."""

DIRECT_INDICES = ("uint16", "uint32", "int32", "int64")
DIRECT_VALUES = ("uint8", "uint16", "uint32", "float32", "float64")


class ShardedRows:
    """Reads the data and indices of a csr_matrix on a local disk.

    Parameters
    ----------
    label
        Store and modality, for messages.
    indices, values
        The arrays; UnsupportedArray where only zarr-python reads them.
    cells
        (n,) row of each cell in the matrix, or None where they are the same.
    """

    def __init__(
        self,
        label: str,
        indices: ShardedArray,
        values: ShardedArray,
        *,
        offsets: RowOffsets,
        num_features: int,
        cells: npt.NDArray[np.int32] | None,
    ) -> None:
        self._label, self._indices, self._values = label, indices, values
        self._offsets, self._num_features, self._cells = offsets, num_features, cells
        self.index_dtype, self.value_dtype = indices.layout.dtype, values.layout.dtype
        if self.index_dtype.name not in DIRECT_INDICES or self.value_dtype.name not in DIRECT_VALUES:
            raise UnsupportedArray(f"it holds {self.value_dtype} values at {self.index_dtype} columns")
        # Only stores made by `ingest` carry checksums, and it sorts columns and checks their range.
        self._is_trusted = indices.layout.has_checksum and values.layout.has_checksum

    def prepare(self, rows: npt.NDArray[np.int64]) -> PreparedRows:
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        runs, total = [], 0
        for begin, end in runs_of(rows):
            edges = self._offsets.between(int(rows[begin]), int(rows[end - 1]) + 1)
            inside = rows[begin:end] - rows[begin]
            lengths[begin:end] = edges[inside + 1] - edges[inside]
            # Of a run of which less than half is wanted only that half goes into the window.
            is_sparse = 2 * (end - begin) < len(edges) - 1
            offsets = np.cumsum(lengths[begin:end]) - lengths[begin:end] if is_sparse else edges[inside] - edges[0]
            starts[begin:end] = total + offsets
            size = int(lengths[begin:end].sum() if is_sparse else edges[-1] - edges[0])
            runs.append((begin, end, edges, is_sparse, total, total + size))
            total += size

        def fill(indices: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
            for begin, end, edges, is_sparse, low, high in runs:
                first, into = int(rows[begin]), (indices[low:high], values[low:high])
                if not is_sparse:
                    self._read_into(first, edges, *into)
                    continue
                count = int(edges[-1] - edges[0])
                whole = (np.empty(count, indices.dtype), np.empty(count, values.dtype))
                self._read_into(first, edges, *whole)
                wanted = edges[rows[begin:end] - first] - edges[0]
                gather_rows(*whole, wanted, lengths[begin:end], starts[begin:end] - low, *into)

        return PreparedRows(starts, lengths, total, fill)

    def _read_into(
        self,
        start: int,
        edges: npt.NDArray[np.int64],
        indices: npt.NDArray[np.generic],
        values: npt.NDArray[np.generic],
    ) -> None:
        """Read the rows from `start` on whose entries lie between the edges."""
        for name, array, out in (("indices", self._indices, indices), ("data", self._values, values)):
            try:
                array.read_into(int(edges[0]), out)
            except DamagedChunk as damage:
                raise RuntimeError(self._describe(name, array, damage)) from damage
        if self._is_trusted:
            return
        row, state = inspect_columns(edges, indices, self._num_features)
        if state == OUT_OF_RANGE:
            raise RuntimeError(_out_of_range(self._label, start + row, self._num_features))
        if state != SORTED:
            columns: Any = indices
            ordered = sort_rows(SparseRows(edges - edges[0], columns, values, self._num_features))
            indices[:], values[:] = ordered.indices, ordered.values

    def _describe(self, name: str, array: ShardedArray, damage: DamagedChunk) -> str:
        start, stop = self._offsets.rows_of(*damage.entries)
        first, last = start, stop - 1
        if self._cells is not None:
            first, last = (int(np.flatnonzero(self._cells == row)[0]) for row in (first, last))
        shard = damage.chunk // array.layout.chunks_per_shard
        return (
            f"{self._label}/{name}: got a damaged chunk {damage.chunk} (file {array.folder}/c/{shard}): {damage};"
            f" it holds counts of the cells {first} to {last}: copy the store again, or ingest again"
        )


class StoreRows:
    """Reads through a store's own `read_rows`: any format, with one copy more."""

    def __init__(self, store: Store, modality: str) -> None:
        schema = store.schema.modalities[modality]
        self._store, self._modality, self._num_features = store, modality, schema.num_features
        self.index_dtype: np.dtype[Any] = np.dtype(np.uint16 if schema.num_features <= 1 << 16 else np.uint32)
        self.value_dtype: np.dtype[Any] = np.dtype(schema.value_dtype)

    def prepare(self, rows: npt.NDArray[np.int64]) -> PreparedRows:
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        parts, total = [], 0
        for begin, end in runs_of(rows):
            part = self._read(int(rows[begin]), int(rows[end - 1]) + 1)
            inside = rows[begin:end] - rows[begin]
            starts[begin:end] = total + part.indptr[inside] - part.indptr[0]
            lengths[begin:end] = part.indptr[inside + 1] - part.indptr[inside]
            parts.append(part)
            total += len(part.indices)

        def fill(indices: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
            done = 0
            for part in parts:
                indices[done : done + len(part.indices)] = part.indices
                values[done : done + len(part.indices)] = part.values
                done += len(part.indices)

        return PreparedRows(starts, lengths, total, fill)

    def _read(self, start: int, stop: int) -> SparseRows:
        rows = self._store.read_rows(self._modality, start, stop)
        row, state = inspect_columns(rows.indptr, rows.indices, self._num_features)
        if state == OUT_OF_RANGE:
            label = f"store {self._store.uri}, {self._modality}"
            raise RuntimeError(_out_of_range(label, start + row, self._num_features))
        return rows


class ChainedRows:
    """Rows of several matrices below each other.

    Parameters
    ----------
    parts
        Reader and number of rows of each matrix; all of the same types.
    """

    def __init__(self, parts: Sequence[tuple[RowReader, int]]) -> None:
        self._readers = [reader for reader, _ in parts]
        self._starts = np.cumsum([0, *(count for _, count in parts)])
        self.index_dtype, self.value_dtype = self._readers[0].index_dtype, self._readers[0].value_dtype
        if any((r.index_dtype, r.value_dtype) != (self.index_dtype, self.value_dtype) for r in self._readers):
            raise UnsupportedArray("the stores hold different types")

    def prepare(self, rows: npt.NDArray[np.int64]) -> PreparedRows:
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(rows)] if len(rows) else []
        parts, total = [], 0
        for begin, end in pairwise(edges):
            which = int(owner[begin])
            part = self._readers[which].prepare(rows[begin:end] - self._starts[which])
            starts[begin:end], lengths[begin:end] = part.starts + total, part.lengths
            parts.append((part, total))
            total += part.num_entries

        def fill(indices: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
            for part, low in parts:
                span = slice(low, low + part.num_entries)
                part.fill(indices[span], values[span])

        return PreparedRows(starts, lengths, total, fill)


def _out_of_range(label: str, row: int, num_features: int) -> str:
    return (
        f"{label}: got a column outside 0..{num_features - 1} in row {row}: the store is damaged and has no checksums;"
        f" copy it again, and ingest it, which adds them"
    )


def open_reader(store: Store, modality: str) -> RowReader:
    """The fastest reader that knows a modality's format; where that is not our own, a log line says why."""
    try:
        return _open_fast(store, modality)
    except UnsupportedArray as reason:
        _tell_once(store.uri, modality, str(reason))
        return StoreRows(store, modality)


@cache
def _tell_once(uri: str, modality: str, reason: str) -> None:
    """Training opens a reader for each of its loaders."""
    _log.info(
        "store %s, %s is read through the store's own library: %s; `liam-scale ingest` makes a faster copy",
        uri,
        modality,
        reason,
    )


def _open_fast(store: Store, modality: str) -> RowReader:
    if isinstance(store, ChainedStore):
        parts = store.parts(modality)
        return ChainedRows(
            [(open_reader(part, modality), part.schema.modalities[modality].num_cells) for part in parts]
        )
    find = getattr(store, "arrays", None)
    if find is None:
        # A SOMA experiment has said so when it was opened; a view by feature names reads a store as it can.
        return StoreRows(store, modality)
    arrays = find(modality)
    if arrays is None:
        raise UnsupportedArray("it is not one csr_matrix")
    indices, values = (ShardedArray(_folder(arrays[name])) for name in ("indices", "data"))
    rows = store.modality_rows(modality)
    return ShardedRows(
        f"store {store.uri}, {modality}",
        indices,
        values,
        offsets=RowOffsets(_offset_pieces(arrays["indptr"])),
        num_features=store.schema.modalities[modality].num_features,
        cells=None if rows is None else rows.astype(np.int32),
    )


def _offset_pieces(indptr: Any) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, indptr.shape[0], OFFSETS_PER_READ):
        yield np.asarray(indptr[start : start + OFFSETS_PER_READ]).astype(np.int64)


def _folder(array: Any) -> Path:
    """Folder of a zarr-python array on a local disk."""
    root = getattr(array.store_path.store, "root", None)
    if not isinstance(root, Path):
        raise UnsupportedArray("it is not on a local disk")
    return root / array.store_path.path
