"""A window: the rows of some blocks of one modality are read into memory, by the fastest way their matrix offers.

Shapes: B cells of the window, R rows of the modality, N entries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loaders import resident
from loaders.buffers import Pool
from loaders.device_rows import DeviceRows, rows_on
from loaders.formats.damage import Damaged
from loaders.formats.matrix import Matrix, Prepared
from loaders.plan import Epoch, Rows, Window
from loaders.stores.base import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowRows:
    """One modality of a window.

    Attributes
    ----------
    indices, values
        (N,) entries as stored.
    starts, lengths
        (B,) int64: the entries of each cell, in the order of training; length 0 where the cell lacks the modality, or
        its row is on a device.
    present
        (B,) bool, or None where every cell has the modality.
    lost
        (B,) bool, cells in damaged chunks, which have no entries here; None where there is none.
    device_starts, device_lengths
        (B,) int64: the same of rows on a device, starts negative for cells whose rows are not there. None: none stay.
    """

    indices: npt.NDArray[np.generic]
    values: npt.NDArray[np.generic]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_] | None
    lost: npt.NDArray[np.bool_] | None = None
    device_starts: npt.NDArray[np.int64] | None = None
    device_lengths: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class ModalityInput:
    """What the windows of one modality are read from, and their memory.

    Attributes
    ----------
    rows
        (n,) int32 row of each cell in the matrix, -1 where it lacks the modality; None if every cell has it.
    nonzeros_per_cell
        Mean over all cells of the store.
    """

    matrix: Matrix
    rows: npt.NDArray[np.int32] | None
    nonzeros_per_cell: float
    indices_pool: Pool
    values_pool: Pool
    resident: resident.Rows | None = None
    """Where rows that were read stay."""
    on_device: DeviceRows | None = None
    """Where rows that were sent stay."""

    @property
    def bytes_per_cell(self) -> float:
        """Mean bytes of a cell in a window."""
        return sum(dtype.itemsize for dtype in self.matrix.window_dtypes) * self.nonzeros_per_cell + 24


def open_inputs(store: Store, modalities: Sequence[str] | None = None) -> dict[str, ModalityInput]:
    """What each modality is read from, in the order of the schema; a log line says why one is read slowly.

    Raises
    ------
    ValueError
        A modality the store does not have.
    """
    known = store.schema.modalities
    for name in modalities or ():
        if name not in known:
            raise ValueError(f"modalities: got {name!r}; {store.uri} holds {', '.join(known)}")
    inputs = {}
    for name in (name for name in known if modalities is None or name in modalities):
        matrix, rows = store.matrix(name), store.modality_rows(name)
        if matrix.slow_because is not None:
            _tell_once(store.uri, name, matrix.slow_because)
        inputs[name] = ModalityInput(
            matrix=matrix,
            rows=None if rows is None else rows.astype(np.int32),
            nonzeros_per_cell=known[name].num_nonzeros / max(1, store.schema.num_cells),
            indices_pool=Pool(),
            values_pool=Pool(),
        )
    return inputs


def keeping(
    inputs: Mapping[str, ModalityInput],
    store: Store,
    residence: resident.Residence,
    device: torch.device | None,
    *,
    cells: Rows,
    dtypes: Mapping[str, np.dtype[np.generic]],
) -> tuple[dict[str, ModalityInput], dict[str, DeviceRows]]:
    """Inputs of which rows stay, on a device that has room for them, else in memory; and those on the device.

    Parameters
    ----------
    cells
        Rows of the store that take part.
    dtypes
        Of the values that reach the device.
    """
    num, there = store.schema.num_cells, {}
    if device is not None and residence != "off":
        there = rows_on(
            device, residence, num, {name: (_entries(inputs[name], cells), dtypes[name]) for name in inputs}
        )
    known = store.schema.modalities
    forms = {name: (known[name].num_nonzeros, *own.matrix.window_dtypes) for name, own in inputs.items()}
    if there or not resident.stays(residence, forms):
        return {name: replace(own, on_device=there.get(name)) for name, own in inputs.items()}, there
    return {name: replace(own, resident=resident.Rows(num, *forms[name])) for name, own in inputs.items()}, {}


def _entries(source: ModalityInput, cells: Rows) -> int:
    """Non-zeros of some cells; of a store that does not tell them a pass, as the mean of library sizes is."""
    rows = cells.astype(np.int64) if source.rows is None else source.rows[cells]
    return int(source.matrix.lengths()[rows[rows >= 0]].sum())


@cache
def _warn_once(message: str) -> None:
    """A window is read again in every epoch."""
    _log.warning(message)


@cache
def _tell_once(uri: str, modality: str, reason: str) -> None:
    """Training opens its inputs for each of its loaders."""
    _log.info(
        "store %s, %s is read through the store's own library: %s; an ingest makes a faster copy",
        uri,
        modality,
        reason,
    )


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


def read_window(
    source: ModalityInput, cells: npt.NDArray[np.integer], order: npt.NDArray[np.int64], *, skip_damaged: bool = False
) -> WindowRows:
    """Read the rows of a window's cells.

    Parameters
    ----------
    cells
        (B,) rows of the store in the order of reading.
    order
        (B,) place in `cells` of each cell in the order of training.
    skip_damaged
        Leave out the cells of damaged chunks, and say which they are.
    """
    rows = cells.astype(np.int64) if source.rows is None else source.rows[cells].astype(np.int64)
    present = None if source.rows is None else rows >= 0
    in_order = None if present is None else present[order]
    if source.resident is not None and (held := source.resident.find(cells)) is not None:
        indices, values, starts, lengths = held
        return WindowRows(indices, values, starts[order], lengths[order], in_order)
    on_device = () if source.on_device is None else source.on_device.find(cells)
    is_read = (rows >= 0) & (on_device[0] < 0) if on_device else present
    wanted = rows if is_read is None else rows[is_read]
    try:
        prepared = source.matrix.prepare(wanted)
        indices, values = _take(source, prepared.num_entries)
        prepared.fill(indices, values)
        starts, lengths, lost = prepared.starts, prepared.lengths, None
    except Damaged as error:
        if not (skip_damaged and error.is_of_chunk):
            raise
        indices, values, starts, lengths, lost = _read_around(source, wanted)
    if is_read is not None:
        starts, lengths = _spread(starts, is_read), _spread(lengths, is_read)
        lost = None if lost is None else _spread(lost, is_read)
    if source.resident is not None and lost is None:
        source.resident.keep(cells, indices, values, starts, lengths)
    lost = None if lost is None else lost[order]
    return WindowRows(
        indices, values, starts[order], lengths[order], in_order, lost, *(column[order] for column in on_device)
    )


def _take(source: ModalityInput, size: int) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    index_dtype, value_dtype = source.matrix.window_dtypes
    return source.indices_pool.take(size, index_dtype), source.values_pool.take(size, value_dtype)


def _spread(values: npt.NDArray[Any], is_read: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """(B,) values of the cells that were read, zero for the others."""
    whole = np.zeros(len(is_read), values.dtype)
    whole[is_read] = values
    return whole


def _read_around(source: ModalityInput, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    """Indices, values, starts, lengths, and which rows cannot be read: those that cannot be read alone."""
    pieces = list(_sound_pieces(source.matrix, rows, 0))
    indices, values = _take(source, sum(piece.num_entries for _, piece, *_ in pieces))
    starts, lengths, lost = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64), np.ones(len(rows), np.bool_)
    done = 0
    for begin, piece, own_indices, own_values in pieces:
        span, entries = slice(begin, begin + len(piece.starts)), slice(done, done + piece.num_entries)
        starts[span], lengths[span], lost[span] = piece.starts + done, piece.lengths, False
        indices[entries], values[entries] = own_indices, own_values
        done = entries.stop
    return indices, values, starts, lengths, lost


def _sound_pieces(
    matrix: Matrix, rows: npt.NDArray[np.int64], begin: int
) -> Iterator[tuple[int, Prepared, npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
    """What can be read, by halves: place of the first row, and its entries."""
    try:
        prepared = matrix.prepare(rows)
        indices, values = (np.empty(prepared.num_entries, dtype) for dtype in matrix.window_dtypes)
        prepared.fill(indices, values)
    except Damaged as error:
        if not error.is_of_chunk:
            raise
        middle = len(rows) // 2
        if middle == 0:
            _warn_once(f"{error}; its cells are left out")
        else:
            yield from _sound_pieces(matrix, rows[:middle], begin)
            yield from _sound_pieces(matrix, rows[middle:], begin + middle)
    else:
        yield begin, prepared, indices, values
