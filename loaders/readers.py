"""How the rows of one modality are read: by our own reader of sharded arrays, or through the store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.csr import OUT_OF_RANGE, SORTED, SparseRows, inspect_columns
from loaders.stores.base import Store
from loaders.stores.matrices import sort_rows
from loaders.stores.sharded import DamagedChunk, ShardedArray, UnsupportedArray
from loaders.windows import RowOffsets, RowReader

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

    def read_into(
        self,
        start: int,
        stop: int,
        entry_start: int,
        indices: npt.NDArray[np.generic],
        values: npt.NDArray[np.generic],
    ) -> None:
        for name, array, out in (("indices", self._indices, indices), ("data", self._values, values)):
            try:
                array.read_into(entry_start, out)
            except DamagedChunk as damage:
                raise RuntimeError(self._describe(name, array, damage)) from damage
        if self._is_trusted:
            return
        rows = SparseRows(self._offsets.between(start, stop), indices, values, self._num_features)  # type: ignore[arg-type]
        row, state = inspect_columns(rows.indptr, rows.indices, rows.num_features)
        if state == OUT_OF_RANGE:
            raise RuntimeError(_out_of_range(self._label, start + row, self._num_features))
        if state != SORTED:
            ordered = sort_rows(
                SparseRows(rows.indptr - rows.indptr[0], *(rows.indices, rows.values, rows.num_features))
            )
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


class StoreReader:
    """Reads through a store's own `read_rows`: any format, with one copy more."""

    def __init__(self, store: Store, modality: str) -> None:
        schema = store.schema.modalities[modality]
        self._store, self._modality, self._num_features = store, modality, schema.num_features
        self.index_dtype: np.dtype[Any] = np.dtype(np.uint16 if schema.num_features <= 1 << 16 else np.uint32)
        self.value_dtype: np.dtype[Any] = np.dtype(schema.value_dtype)

    def read_into(
        self,
        start: int,
        stop: int,
        entry_start: int,
        indices: npt.NDArray[np.generic],
        values: npt.NDArray[np.generic],
    ) -> None:
        label = f"store {self._store.uri}, {self._modality}"
        rows = self._store.read_rows(self._modality, start, stop)
        if len(rows.indices) != len(indices):
            raise RuntimeError(
                f"{label}: got {len(rows.indices)} entries in rows {start}:{stop} where its offsets say {len(indices)};"
                f" the store changed or is damaged: open it again, or ingest again"
            )
        row, state = inspect_columns(rows.indptr, rows.indices, self._num_features)
        if state == OUT_OF_RANGE:
            raise RuntimeError(_out_of_range(label, start + row, self._num_features))
        indices[:] = rows.indices
        values[:] = rows.values


def _out_of_range(label: str, row: int, num_features: int) -> str:
    return (
        f"{label}: got a column outside 0..{num_features - 1} in row {row}: the store is damaged and has no checksums;"
        f" copy it again, and ingest it, which adds them"
    )


def open_reader(store: Store, modality: str, *, cells: npt.NDArray[np.int32] | None) -> tuple[RowReader, RowOffsets]:
    """The fastest reader that knows a modality's format, and the offsets of its rows.

    Where that is not our own reader, a log line says why.
    """
    label = f"store {store.uri}, {modality}"
    find = getattr(store, "arrays", None)
    arrays = None if find is None else find(modality)
    offsets = RowOffsets([store.row_nonzeros(modality)] if arrays is None else _offset_pieces(arrays["indptr"]))
    try:
        if arrays is None:
            raise UnsupportedArray("it is not one csr_matrix on a local disk")
        reader: RowReader = ShardedRows(
            label,
            *(ShardedArray(_folder(arrays[name])) for name in ("indices", "data")),
            offsets=offsets,
            num_features=store.schema.modalities[modality].num_features,
            cells=cells,
        )
    except UnsupportedArray as reason:
        _log.info(
            "%s is read through the store's own library: %s; `liam-scale ingest` makes a faster copy", label, reason
        )
        reader = StoreReader(store, modality)
    return reader, offsets


def _offset_pieces(indptr: Any) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, indptr.shape[0], OFFSETS_PER_READ):
        yield np.asarray(indptr[start : start + OFFSETS_PER_READ]).astype(np.int64)


def _folder(array: Any) -> Path:
    """Folder of a zarr-python array on a local disk."""
    root = getattr(array.store_path.store, "root", None)
    if not isinstance(root, Path):
        raise UnsupportedArray("it is not on a local disk")
    return root / array.store_path.path
