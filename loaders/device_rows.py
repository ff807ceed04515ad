"""Rows that stay on a device as the minibatches of the first epoch brought them: later ones send where they begin.

The order of cells is the plan's, and what is gathered there are the bits that the host would have sent.

Shapes: B cells of a group of minibatches, C of them whose rows are sent, N entries, n cells of the store.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loaders.minibatch import Minibatch

_log = logging.getLogger(__name__)

SPARE = 1 << 30
"""Bytes of the device that are left to the training: with less, rows are given up and streamed again."""

ABSENT = -1
"""In place of where a row begins: it is not there."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Type that stands for values of so many bytes: CUDA gathers no uint16."""

Forms = Mapping[str, tuple[int, np.dtype[Any]]]
"""Per modality its non-zeros, and the type of values in a minibatch."""


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take there; the largest number where the device does not tell."""
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return sys.maxsize
    return int(module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device))


class DeviceRows:
    """The rows of one modality that have arrived on a device, by cell of the store. Used on one stream of the device.

    Parameters
    ----------
    num_cells
        n.
    num_entries
        Non-zeros of all cells that may come.
    value_dtype
        Of the values of minibatches, 5 bytes an entry where it is uint8.
    """

    def __init__(
        self, device: torch.device, num_cells: int, num_entries: int, value_dtype: np.dtype[np.generic]
    ) -> None:
        bits = _BITS[value_dtype.itemsize]
        self._indices = torch.empty(num_entries, dtype=torch.int32, device=device)
        self._values = torch.empty(num_entries, dtype=bits, device=device)
        self._starts, self._lengths = np.full(num_cells, ABSENT, np.int64), np.zeros(num_cells, np.int64)
        self._used = 0

    def find(self, cells: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the rows of (B,) cells begin, ABSENT for those that are not there, and how many entries each has."""
        return self._starts[cells], self._lengths[cells]

    def keep(
        self, cells: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64], indices: Tensor, values: Tensor
    ) -> int:
        """Copy the rows of (C,) cells within the device; where the first begins."""
        first, stop = self._used, self._used + len(indices)
        self._indices[first:stop].copy_(indices)
        self._values[first:stop].copy_(values.view(self._values.dtype))
        self._lengths[cells] = lengths
        self._starts[cells] = first + np.cumsum(lengths) - lengths
        self._used = stop
        return first

    def gather(
        self, starts: Tensor, offsets: Tensor, num_entries: int, value_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(N,) indices and values of rows that begin there, packed at these (B + 1,) offsets; waits for nothing."""
        shifts, lengths = starts - offsets[:-1], offsets[1:] - offsets[:-1]
        places = torch.repeat_interleave(shifts, lengths, output_size=num_entries)
        places += torch.arange(num_entries, device=places.device)
        return self._indices[places], self._values[places].view(value_dtype)

    def give_up(self) -> int:
        """Free the memory; how many bytes it was."""
        num_bytes = self._indices.nbytes + self._values.nbytes
        self._starts.fill(ABSENT)
        self._indices, self._values = (memory.new_empty(0) for memory in (self._indices, self._values))
        return num_bytes


def rows_on(device: torch.device, residence: str, num_cells: int, forms: Forms) -> dict[str, DeviceRows]:
    """Memory there for the rows of all modalities; none where it is short, which is said.

    Parameters
    ----------
    residence
        "auto": what takes at most half of the free memory; "on": what leaves SPARE bytes.
    num_cells
        Of the store.
    """
    needed = sum(num * (4 + dtype.itemsize) for num, dtype in forms.values())
    free = free_bytes(device)
    if needed <= (free // 2 if residence == "auto" else free - SPARE):
        try:
            return {name: DeviceRows(device, num_cells, *form) for name, form in forms.items()}
        except torch.OutOfMemoryError:
            free = free_bytes(device)
    level = logging.INFO if residence == "auto" else logging.WARNING
    message = "resident: %d MiB of counts do not stay on %s, of which %d MiB are free"
    _log.log(level, message, needed >> 20, device, free >> 20)
    return {}


def has_given_up(rows: Mapping[str, DeviceRows], device: torch.device) -> bool:
    """Whether the device's memory is short, and the rows had to go; then all of them are streamed."""
    if not rows or free_bytes(device) >= SPARE:
        return False
    freed = sum(own.give_up() for own in rows.values())
    _log.warning(
        "resident: less than %d MiB of memory of %s are free; %d MiB of counts are given up and streamed from here on",
        SPARE >> 20,
        device,
        freed >> 20,
    )
    return True


@dataclass(frozen=True)
class Arrival:
    """One modality of a group of minibatches on a device where rows stay.

    Attributes
    ----------
    rows
        Where they stay.
    cells, lengths
        (C,) cells of the store whose rows are sent, and how many entries each has.
    indices, values
        Entries that are sent, cell by cell.
    starts
        (B,) int64: where the row of each cell begins in `rows`; -1 - i where it is sent, from entry i on. None where
        all rows are sent, in the order of the minibatches.
    offsets
        (B + 1,) int64: where the entries of each cell begin in the group; None where `starts` is.
    edges
        (S + 1,) entries before each of S minibatches.
    """

    rows: DeviceRows
    cells: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]
    indices: Tensor
    values: Tensor
    starts: Tensor | None
    offsets: Tensor | None
    edges: npt.NDArray[np.int64]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Arrival:
        held: dict[str, Any] = {name: getattr(self, name) for name in ("indices", "values", "starts", "offsets")}
        changed: dict[str, Any] = {name: None if own is None else function(own) for name, own in held.items()}
        return replace(self, **changed)

    def settle(self) -> list[tuple[Tensor, Tensor]] | None:
        """Keep what was sent; indices and values of each minibatch, or None where they are what was sent."""
        first = self.rows.keep(self.cells, self.lengths, self.indices, self.values) if len(self.cells) else 0
        if self.starts is None or self.offsets is None:
            return None
        starts = torch.where(self.starts < 0, first - 1 - self.starts, self.starts) if len(self.cells) else self.starts
        whole = self.rows.gather(starts, self.offsets, int(self.edges[-1]), self.values.dtype)
        indices, values = (entries.split_with_sizes(np.diff(self.edges).tolist()) for entries in whole)
        return list(zip(indices, values, strict=True))


def settled(minibatches: Sequence[Minibatch], arrivals: Mapping[str, Arrival]) -> list[Minibatch]:
    """Minibatches on the device, whose rows stay, and in which those stand that were there."""
    counts = [dict(minibatch.counts) for minibatch in minibatches]
    for name, arrival in arrivals.items():
        for own, (indices, values) in zip(counts, arrival.settle() or (), strict=False):
            own[name] = replace(own[name], indices=indices, values=values)
    return [replace(minibatch, counts=own) for minibatch, own in zip(minibatches, counts, strict=True)]
