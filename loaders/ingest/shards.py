"""Writes the shards of a 1-d Zarr v3 array as a stream: memory is one inner chunk, whatever the array's length.

zarr-python must hold a whole shard (64 chunks, up to 240 MB of ATAC indices) to write it; here every inner chunk is
compressed and appended to the shard's file as soon as it is full, and the shard's index follows when the shard is.
The bytes are those that zarr-python writes itself (a test compares).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import IO

import google_crc32c
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

CHUNKS_PER_SHARD = 64
"""Inner chunks of about 256 cells each: a shard holds about 16,000 cells, 10-15 MB of RNA on disk."""

_ABSENT = 2**64 - 1
"""Offset and length of an inner chunk that was never written, as the Zarr sharding codec defines it."""

_LZ4_LEVEL = 5

_PENDING_PER_ARRAY = 2
"""Chunks that may wait for compression; bounds memory when the producer is faster than the disk."""


def encode_chunk(values: npt.NDArray[np.generic]) -> bytes:
    """Compress one inner chunk: blosc (lz4, byte shuffle, level 5), then its crc32c in 4 little-endian bytes."""
    packed = numcodecs.blosc.compress(values, b"lz4", _LZ4_LEVEL, numcodecs.blosc.SHUFFLE)
    return packed + _checksum(packed)


def _checksum(packed: bytes) -> bytes:
    return int(google_crc32c.value(packed)).to_bytes(4, "little")


class ShardWriter:
    """The shards of a 1-d array, which grow by `append`; `create_sharded` makes an array of them.

    Parameters
    ----------
    folder
        Receives the shards, whose names are their numbers.
    dtype
        Type of the elements; what is appended is cast to it without checking.
    chunk_length
        Elements of one inner chunk.
    pool
        Threads that compress. Chunks reach the file in their order whatever the number of threads.
    first
        Number of the first shard.

    Attributes
    ----------
    length
        Elements appended.
    files
        Size and crc32c of each shard that is complete, by its name.
    """

    def __init__(
        self, folder: Path, *, dtype: npt.DTypeLike, chunk_length: int, pool: Executor, first: int = 0
    ) -> None:
        assert chunk_length >= 1, chunk_length
        self.length = 0
        self.files: dict[str, tuple[int, int]] = {}
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._chunk_length = chunk_length
        self._folder = folder
        self._pool = pool
        self._open_chunk = np.empty(chunk_length, self._dtype)
        self._filled = 0
        self._pending: deque[Future[bytes]] = deque()
        self._shard: IO[bytes] | None = None
        self._shard_number = first
        self._index: list[tuple[int, int]] = []
        self._offset = 0
        self._checksum = 0

    def append(self, values: npt.NDArray[np.generic]) -> None:
        """Add (n,) elements at the end."""
        self.length += len(values)
        start = 0
        while start < len(values):
            stop = min(len(values), start + self._chunk_length - self._filled)
            self._open_chunk[self._filled : self._filled + stop - start] = values[start:stop]
            self._filled += stop - start
            start = stop
            if self._filled == self._chunk_length:
                self._submit()

    def close(self) -> None:
        """Write what is left; all shards are complete on return."""
        if self._filled:
            # Zarr stores every inner chunk at full length; the tail carries the fill value.
            self._open_chunk[self._filled :] = 0
            self._submit()
        while self._pending:
            self._store(self._pending.popleft().result())
        self._finish_shard()

    def abort(self) -> None:
        """Let go of the open file; what was written stays and has no metadata."""
        for waiting in self._pending:
            waiting.cancel()
        self._pending.clear()
        if self._shard is not None:
            # On a full disk closing fails once more; the first error is already on its way.
            with suppress(OSError):
                self._shard.close()
            self._shard = None

    def _submit(self) -> None:
        self._pending.append(self._pool.submit(encode_chunk, self._open_chunk))
        self._open_chunk = np.empty(self._chunk_length, self._dtype)
        self._filled = 0
        while len(self._pending) > _PENDING_PER_ARRAY:
            self._store(self._pending.popleft().result())

    def _store(self, packed: bytes) -> None:
        if self._shard is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._shard = open(self._folder / str(self._shard_number), "wb")  # noqa: SIM115 (closed by the shard's end)
        self._index.append((self._offset, len(packed)))
        self._write(packed)
        if len(self._index) == CHUNKS_PER_SHARD:
            self._finish_shard()

    def _write(self, packed: bytes) -> None:
        assert self._shard is not None
        self._shard.write(packed)
        self._offset += len(packed)
        self._checksum = google_crc32c.extend(self._checksum, packed)

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        index = np.full((CHUNKS_PER_SHARD, 2), _ABSENT, "<u8")
        index[: len(self._index)] = self._index
        packed = index.tobytes()
        self._write(packed + _checksum(packed))
        self._shard.close()
        self.files[str(self._shard_number)] = self._offset, self._checksum
        self._shard = None
        self._shard_number += 1
        self._index = []
        self._offset = self._checksum = 0


def create_sharded(group: zarr.Group, name: str, *, length: int, dtype: npt.DTypeLike, chunk_length: int) -> Path:
    """Make the array that a number of shards are; returns the folder in which they belong."""
    array = group.create_array(
        name,
        shape=(length,),
        chunks=(chunk_length,),
        shards=(chunk_length * CHUNKS_PER_SHARD,),
        dtype=np.dtype(dtype).newbyteorder("<"),
        compressors=[BloscCodec(cname="lz4", clevel=_LZ4_LEVEL, shuffle="shuffle"), Crc32cCodec()],
        fill_value=0,
    )
    return Path(str(array.store_path.store.root)) / array.path / "c"
