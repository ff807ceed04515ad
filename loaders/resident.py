"""Rows that were read once and stay in memory as stored, so that later epochs neither read nor decompress them.

The order of cells is the plan's, whether a row stands here or in the store: minibatches are the same bit for bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from loaders.csr import gather_rows, offsets_of
from loaders.sizing import available_memory, local_ranks

_log = logging.getLogger(__name__)

Residence = Literal["auto", "on", "off"]

SPARE = 1 << 30
"""Bytes that are left to the rest of the machine: with less, rows are given up and streamed again."""

ABSENT, COMING = -1, -2
"""In place of where a row begins: it is not here, or it is being written."""

Forms = Mapping[str, tuple[int, npt.DTypeLike, npt.DTypeLike]]
"""Per modality its non-zeros, and the types of indices and values."""


def stays(residence: Residence, forms: Forms) -> bool:
    """Whether the rows are to be kept; "auto": where they take at most half of this process's share of memory."""
    if residence != "auto":
        return residence == "on"
    needed = sum(n * (np.dtype(i).itemsize + np.dtype(v).itemsize) for n, i, v in forms.values())
    has_room = needed <= available_memory() // (2 * local_ranks())
    if not has_room:
        _log.info("resident: %d MiB of counts are more than half of the free memory; they are streamed", needed >> 20)
    return has_room


class Rows:
    """The rows of one modality that have been read, by cell of the store.

    Parameters
    ----------
    num_cells
        Cells of the store.
    num_entries
        Non-zeros of all its cells; memory is taken as rows are written.
    """

    def __init__(
        self, num_cells: int, num_entries: int, index_dtype: npt.DTypeLike, value_dtype: npt.DTypeLike
    ) -> None:
        self._indices, self._values = np.empty(num_entries, index_dtype), np.empty(num_entries, value_dtype)
        self._starts, self._lengths = np.full(num_cells, ABSENT, np.int64), np.zeros(num_cells, np.int64)
        self._used, self._is_open = 0, True
        self._lock = threading.Lock()

    def find(self, cells: npt.NDArray[np.integer]) -> tuple[npt.NDArray[Any], ...] | None:
        """Entries of all rows, indices and values, and where those of the cells begin and how many there are.

        None if one of the cells is not here.
        """
        # In this order: what is given up is marked before its memory goes.
        indices, values = self._indices, self._values
        starts = self._starts[cells]
        return None if starts.min(initial=0) < 0 else (indices, values, starts, self._lengths[cells])

    def keep(
        self,
        cells: npt.NDArray[np.integer],
        indices: npt.NDArray[np.generic],
        values: npt.NDArray[np.generic],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        """Copy the rows of cells that are not here yet, from a window that holds them at these places."""
        fresh, first = np.unique(cells, return_index=True)
        with self._lock:
            is_new = self._starts[fresh] == ABSENT
            fresh, first = fresh[is_new], first[is_new]
            offsets = self._used + offsets_of(lengths[first])
            if self._is_open and (offsets[-1] > len(self._indices) or available_memory() < SPARE):
                self._spill()
            if not self._is_open:
                return
            self._used = int(offsets[-1])
            self._starts[fresh] = COMING
            into = self._indices, self._values
        gather_rows(indices, values, starts[first], lengths[first], offsets[:-1], *into)
        with self._lock:
            if self._is_open:
                self._lengths[fresh] = lengths[first]
                self._starts[fresh] = offsets[:-1]

    def _spill(self) -> None:
        _log.warning(
            "resident: less than %d MiB of memory are free; %d MiB of counts are given up and streamed from here on",
            SPARE >> 20,
            self._used * (self._indices.itemsize + self._values.itemsize) >> 20,
        )
        self._is_open = False
        self._starts.fill(ABSENT)
        # Windows that are in use hold the memory until they have been gathered.
        self._indices, self._values = self._indices[:0].copy(), self._values[:0].copy()
