"""X of one measurement of a TileDB-SOMA experiment, read by whole rows of tiles.

Shapes: n cells chosen of obs, F features, N non-zeros read.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.csr import (
    SparseRows,
    compiled,
    concat_rows,
    in_order,
    narrow,
    scatter_entries,
    slice_rows,
)
from loaders.formats.matrix import ENTRY_BYTES, StoredMatrix
from loaders.formats.measured import Measured, joined, measured

_log = logging.getLogger(__name__)

MIN_ROWS_PER_READ = 2048
MAX_ROWS_PER_READ = 8192
"""Bounds of one read, in cells: tiles are 2,048 x 2,048 by default and are decoded as a whole."""

_KEPT_GROUPS = 2
"""Groups kept decoded for readers that ask for few cells at a time, one after the other: about 20 MB of RNA each."""

_SCAN_THREADS = 2
"""Threads of the pass that counts: TileDB keeps one core busy per read, and each read holds 50 to 150 MB."""


class SomaMatrix(StoredMatrix):
    """Counts of the chosen cells in one measurement.

    Parameters
    ----------
    array
        The open SparseNDArray.
    joinids
        (n,) int64 ascending ids of the chosen cells; may have gaps.
    feature_joinids
        (F,) ids of the columns, ascending.
    where
        What messages call it.
    """

    def __init__(
        self,
        array: Any,
        *,
        joinids: npt.NDArray[np.int64],
        feature_joinids: npt.NDArray[np.int64],
        where: str,
    ) -> None:
        super().__init__()
        self._array, self._joinids, self.where = array, joinids, where
        self._feature_joinids, self._columns = feature_joinids, _place_of(feature_joinids)
        self.num_rows, self.num_features = len(joinids), len(feature_joinids)
        self.stored_dtype = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())
        tile = _tile_rows(array)
        self.row_alignment = max(tile, min(MAX_ROWS_PER_READ, tile * -(-MIN_ROWS_PER_READ // tile)))
        group = joinids // self.row_alignment
        self._edges = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [len(joinids)]])
        self._kept: OrderedDict[int, SparseRows] = OrderedDict()
        self._lock = threading.Lock()

    def of_cells(self, cells: npt.NDArray[np.int64]) -> SomaMatrix:
        """The same counts of (m,) ascending ones of the chosen cells; what was counted is not counted again."""
        lengths, sums, extents = self._measured()
        joinids = self._joinids[cells]
        chosen = SomaMatrix(self._array, joinids=joinids, feature_joinids=self._feature_joinids, where=self.where)
        chosen._measured = lambda: (lengths[cells], sums[cells], extents)
        return chosen

    def bytes_per_row(self) -> float:
        return ENTRY_BYTES * max(1.0, self.num_nonzeros() / max(1, self.num_rows))

    def stored(self, start: int, stop: int) -> SparseRows:
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        parts = []
        for group in range(first, len(self._edges) - 1):
            low, high = int(self._edges[group]), int(self._edges[group + 1])
            if low >= stop:
                break
            wanted = max(0, start - low), min(high, stop) - low
            # Whoever asks for half of a group or more does not come back for the rest at once.
            is_large = 2 * (wanted[1] - wanted[0]) >= high - low
            parts.append(slice_rows(self._decode(group) if is_large else self._keep(group), *wanted))
        if not parts:
            empty = np.zeros(0, self.value_dtype)
            return SparseRows(np.zeros(1, np.int64), np.zeros(0, np.int32), empty, self.num_features)
        return concat_rows(parts)

    def _keep(self, group: int) -> SparseRows:
        """A group of which only a part is wanted: the rest may be wanted next."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        rows = self._decode(group)
        with self._lock:
            self._kept[group] = rows
            while len(self._kept) > _KEPT_GROUPS:
                self._kept.popitem(last=False)
        return rows

    def _decode(self, group: int) -> SparseRows:
        joinids = self._joinids[self._edges[group] : self._edges[group + 1]]
        first, last = int(joinids[0]), int(joinids[-1])
        where = f"{self.where}: cells of joinid {first} to {last}"
        places = np.full(last - first + 1, -1, np.int32)
        places[joinids - first] = np.arange(len(joinids), dtype=np.int32)
        indptr = np.zeros(len(joinids) + 1, np.int64)
        pieces = []
        try:
            # Tables of 20 bytes an entry are cut down to 12 as they come, so that never two of them stand in memory.
            for table in self._array.read((slice(first, last),)).tables():
                ids = table["soma_dim_0"].to_numpy(), table["soma_dim_1"].to_numpy()
                values = narrow(table["soma_data"].to_numpy())
                pieces.append(_take(*ids, values, first, places, self._columns, indptr[1:]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        except Exception as error:  # TileDB's own: a damaged tile, a lost connection
            raise RuntimeError(f"{where} cannot be read: {error}; check or copy the experiment") from error
        np.cumsum(indptr, out=indptr)
        indices, kept = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], self.value_dtype)
        following = indptr[:-1].copy()
        while pieces:
            scatter_entries(*pieces.pop(0), following, indices, kept)
        return in_order(SparseRows(indptr, indices, kept, self.num_features))

    def _measure(self) -> Measured:
        _log.info(
            "%s: counting the entries of %d cells, as TileDB-SOMA does not hold them", self.where, len(self._joinids)
        )

        with ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="count") as pool:
            return joined(list(pool.map(lambda group: measured(self._decode(group)), range(len(self._edges) - 1))))


def _place_of(joinids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """(largest id + 1,) place of each id, -1 where there is none."""
    places = np.full(int(joinids[-1]) + 1 if len(joinids) else 0, -1, np.int32)
    places[joinids] = np.arange(len(joinids), dtype=np.int32)
    return places


def _tile_rows(array: Any) -> int:
    """Extent of the tiles along the cells."""
    dimensions = json.loads(array.schema_config_options().dims)
    return max(1, int(dimensions.get("soma_dim_0", {}).get("tile", MIN_ROWS_PER_READ)))


@compiled
def _take(row_ids, column_ids, values, first, places, columns, counts):  # type: ignore[no-untyped-def]
    """Places of rows and columns of a table's entries, and their values; adds to the counts of the rows.

    Ids without a place and zeros are dropped.
    """
    rows, indices = np.empty(len(values), np.int32), np.empty(len(values), np.int32)
    kept = np.empty_like(values)
    end = 0
    for k in range(len(values)):
        row, column = places[row_ids[k] - first], columns[column_ids[k]]
        if row >= 0 and column >= 0 and values[k] != 0:
            rows[end], indices[end], kept[end] = row, column, values[k]
            counts[row] += 1
            end += 1
    return rows[:end], indices[:end], kept[:end]
