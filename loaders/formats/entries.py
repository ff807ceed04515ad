"""One-dimensional arrays of a compressed matrix: read by our own reader where they are sharded and on a local disk."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from loaders.formats.sharded import ShardedArray, UnsupportedArray


class Entries(Protocol):
    """An array of values or columns; may be read from several threads at once.

    Attributes
    ----------
    has_checksum
        Every chunk carries one, and it is verified.
    slow_because
        Why this is not our own reader; None where it is.
    """

    dtype: np.dtype[Any]
    length: int
    has_checksum: bool
    slow_because: str | None

    def read_into(self, start: int, out: npt.NDArray[np.generic]) -> None:
        """Read len(out) elements from `start` on; `out` is contiguous and of the array's type."""
        ...

    def first_missing(self, start: int, stop: int) -> str | None:
        """Name of the first file that holds elements [start, stop) and is not there."""
        ...


class SlicedEntries:
    """An array that its own library reads: zarr-python, h5py or NumPy."""

    has_checksum = False

    def __init__(self, array: Any, reason: str) -> None:
        self._array = array
        self.slow_because: str | None = reason
        self.dtype, self.length = np.dtype(array.dtype), int(array.shape[0])

    def read_into(self, start: int, out: npt.NDArray[np.generic]) -> None:
        out[:] = self._array[start : start + len(out)]

    def first_missing(self, start: int, stop: int) -> str | None:
        length = (self._array.shards or self._array.chunks)[0]
        for number in range(start // length, max(start, stop - 1) // length + 1):
            key = self._array.metadata.encode_chunk_key((number,))
            if not sync((self._array.store_path / key).exists()):
                return str(key)
        return None


def open_entries(array: Any) -> Entries:
    """The fastest way to read an array."""
    if not isinstance(array, zarr.Array) or not isinstance(array.store_path.store, LocalStore):
        return SlicedEntries(array, "it is not on a local disk, or not in Zarr")
    try:
        return ShardedArray(array.store_path.store.root / array.path)
    except UnsupportedArray as reason:
        return SlicedEntries(array, str(reason))
