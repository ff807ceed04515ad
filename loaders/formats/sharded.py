"""Our own reader of sharded 1-d Zarr v3 arrays: few large reads, decoded straight into their place.

Against zarr-python it saves copies, a thread hop per chunk and the decoding of what is not asked for at both ends of
a range: 3-4 times the elements per CPU second. Every checksum the array carries is verified.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numcodecs.zstd
import numpy as np
import numpy.typing as npt

from loaders.formats.damage import DamagedChunk, ReplacedStore
from loaders.formats.storage import File, Folder, Place

MAX_GAP_BYTES = 1 << 16
"""Bytes between two chunks that are read along rather than split a read."""

OPEN_FILES = 64
"""Shards whose files are kept open."""

ABSENT = 2**64 - 1
"""Offset and length, in a shard's index, of an inner chunk that was not written."""

BLOSC_HEADER = 16


class UnsupportedArray(Exception):
    """The array's layout is one that only zarr-python reads; the message says which part of it."""


@dataclass(frozen=True)
class ChunkLayout:
    """What `zarr.json` says about an array."""

    length: int
    dtype: np.dtype[np.generic]
    chunk: int
    chunks_per_shard: int
    separator: str
    index_at_end: bool
    has_index_checksum: bool
    compressor: str | None
    has_checksum: bool


def read_layout(place: Place) -> ChunkLayout:
    """Layout of the array at a place.

    Raises
    ------
    UnsupportedArray
        Not a sharded 1-d array of plain numbers whose chunks are raw, blosc or zstd, with or without crc32c.
    """
    try:
        meta = json.loads(place.content("zarr.json"))
    except (OSError, ValueError):
        raise UnsupportedArray("it is not a Zarr v3 array") from None
    if meta.get("node_type") != "array" or len(meta["shape"]) != 1:
        raise UnsupportedArray("it is not a one-dimensional array")
    if len(meta["codecs"]) != 1 or meta["codecs"][0]["name"] != "sharding_indexed":
        raise UnsupportedArray("it is not sharded")
    if meta["data_type"] not in ("uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32", "float64"):
        raise UnsupportedArray(f"its type is {meta['data_type']}")
    sharding = meta["codecs"][0]["configuration"]
    index = [codec["name"] for codec in sharding["index_codecs"]]
    if index not in (["bytes"], ["bytes", "crc32c"]):
        raise UnsupportedArray(f"its shard index is coded as {' + '.join(index)}")
    compressor, has_checksum = _chunk_codecs(sharding["codecs"])
    keys = meta.get("chunk_key_encoding", {"name": "default"})
    if keys["name"] != "default":
        raise UnsupportedArray(f"its chunk keys are of the kind {keys['name']}")
    chunk = sharding["chunk_shape"][0]
    return ChunkLayout(
        length=meta["shape"][0],
        dtype=np.dtype(meta["data_type"]),
        chunk=chunk,
        chunks_per_shard=meta["chunk_grid"]["configuration"]["chunk_shape"][0] // chunk,
        separator=keys.get("configuration", {}).get("separator", "/"),
        index_at_end=sharding.get("index_location", "end") == "end",
        has_index_checksum=len(index) == 2,
        compressor=compressor,
        has_checksum=has_checksum,
    )


def _chunk_codecs(codecs: list[dict[str, Any]]) -> tuple[str | None, bool]:
    """Compressor of the inner chunks, and whether a crc32c follows it."""
    names = [codec["name"] for codec in codecs]
    if names[0] != "bytes" or codecs[0].get("configuration", {}).get("endian", "little") != "little":
        raise UnsupportedArray(f"its chunks are coded as {' + '.join(names)}")
    has_checksum = names[-1] == "crc32c"
    middle = names[1 : len(names) - has_checksum]
    if len(middle) > 1 or (middle and middle[0] not in ("blosc", "zstd")):
        raise UnsupportedArray(f"its chunks are coded as {' + '.join(names)}")
    return (middle[0] if middle else None), has_checksum


class ShardedArray:
    """A sharded 1-d array. May be read from several threads at once.

    Parameters
    ----------
    place
        Where the array's `zarr.json` and its shards stand; a path is a folder on a local disk.

    Raises
    ------
    UnsupportedArray
        Only zarr-python reads this array.
    """

    slow_because: str | None = None

    def __init__(self, place: str | Path | Place) -> None:
        self._place: Place = Folder(place) if isinstance(place, str | Path) else place
        if not hasattr(os, "preadv"):
            raise UnsupportedArray("this system cannot read at an offset (preadv)")
        self.layout = read_layout(self._place)
        self.dtype, self.length, self.has_checksum = self.layout.dtype, self.layout.length, self.layout.has_checksum
        self._identity = self._place.identity()
        self._lock = threading.Lock()
        self._files: OrderedDict[int, File] = OrderedDict()
        self._indexes: dict[int, npt.NDArray[np.uint64]] = {}
        self._scratch = threading.local()

    def read_into(self, start: int, out: npt.NDArray[np.generic]) -> None:
        """Read len(out) elements from `start` on; `out` is contiguous and of the array's type.

        Raises
        ------
        DamagedChunk
            A chunk is missing, cut off, or does not match its checksum.
        """
        layout = self.layout
        stop = start + len(out)
        assert start >= 0, start
        assert stop <= layout.length, (stop, layout.length)
        assert out.dtype == layout.dtype, (out.dtype, layout.dtype)
        if start == stop:
            return
        first, last = start // layout.chunk, (stop - 1) // layout.chunk
        while first <= last:
            shard = first // layout.chunks_per_shard
            end = min(last + 1, (shard + 1) * layout.chunks_per_shard)
            self._read_shard(shard, first, end, start, out)
            first = end

    def _read_shard(self, shard: int, first: int, end: int, start: int, out: npt.NDArray[np.generic]) -> None:
        """Read the parts of `out`, which begins at element `start`, that the chunks [first, end) of a shard hold."""
        file, index = self._open(shard, first)
        base = shard * self.layout.chunks_per_shard
        extents = index[first - base : end - base].tolist()
        chunk = first
        while chunk < end:
            low, size = extents[chunk - first]
            if size == ABSENT:
                self._fill_absent(chunk, start, out)
                chunk += 1
                continue
            high, after = low + size, chunk + 1
            while after < end and high - low < self._place.read_bytes:
                offset, size = extents[after - first]
                if size == ABSENT or not high <= offset <= high + MAX_GAP_BYTES:
                    break
                high, after = offset + size, after + 1
            buffer = self._buffer("packed", high - low)
            try:
                got = file.read(low, buffer)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise self._damaged(chunk, f"the disk cannot read it: {error.strerror}") from error
            for k in range(chunk, after):
                offset, size = extents[k - first]
                if offset - low + size > got:
                    raise self._damaged(k, f"the file ends {offset - low + size - got} bytes before its end")
                self._decode(k, buffer[offset - low : offset - low + size], start, out)
            chunk = after

    def _decode(self, chunk: int, packed: npt.NDArray[np.uint8], start: int, out: npt.NDArray[np.generic]) -> None:
        """Decode the part of a chunk that belongs into `out`; may write over `packed`."""
        layout = self.layout
        if layout.has_checksum:
            if (difference := verify_chunk(packed)) is not None:
                raise self._damaged(chunk, difference)
            packed = packed[:-4]
        begin = chunk * layout.chunk
        low, high = max(start, begin) - begin, min(start + len(out), begin + layout.chunk) - begin
        target = out[begin + low - start : begin + high - start].view(np.uint8)
        itemsize = layout.dtype.itemsize
        try:
            self._decompress(packed, low * itemsize, high * itemsize, layout.chunk * itemsize, target)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(chunk, f"it cannot be decoded: {error}") from error

    def _decompress(
        self, packed: npt.NDArray[np.uint8], low: int, high: int, size: int, target: npt.NDArray[np.uint8]
    ) -> None:
        """Put the bytes [low, high) of a chunk of `size` bytes into `target`."""
        kind = self.layout.compressor
        if kind == "blosc":
            packed, skipped, size = cut_blosc(packed, low, high, size)
            low, high = low - skipped, high - skipped
        decompress = {"blosc": numcodecs.blosc.decompress, "zstd": numcodecs.zstd.decompress, None: None}[kind]
        if decompress is None:
            if len(packed) != size:
                raise ValueError(f"got {len(packed)} bytes, expected {size}")
            target[:] = packed[low:high]
        elif high - low == size:
            decompress(packed, target)
        else:
            whole = self._buffer("whole", size)
            decompress(packed, whole)
            target[:] = whole[low:high]

    def _fill_absent(self, chunk: int, start: int, out: npt.NDArray[np.generic]) -> None:
        """Zarr leaves out chunks of zeros; where every chunk carries a checksum none is left out."""
        if self.layout.has_checksum:
            raise self._damaged(chunk, "it is missing from its shard")
        begin = chunk * self.layout.chunk
        out[max(start, begin) - start : begin + self.layout.chunk - start] = 0

    def _open(self, shard: int, chunk: int) -> tuple[File, npt.NDArray[np.uint64]]:
        """File and index of a shard that is to be read for a chunk."""
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                try:
                    file = self._place.open(self._name(shard))
                    # After the opening: a folder that took the place of this one in between is then seen.
                    if self._place.identity() != self._identity:
                        what = "another store has taken the place of this one; start again"
                        raise self._damaged(chunk, what, ReplacedStore)
                except OSError as error:
                    what = f"its file {shard} cannot be opened: {error.strerror or 'it is not there'}"
                    raise self._damaged(chunk, what) from error
                self._files[shard] = file
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            index = self._indexes.get(shard)
            if index is None:
                index = self._indexes[shard] = self._read_index(file, chunk)
            return file, index

    def _read_index(self, file: File, chunk: int) -> npt.NDArray[np.uint64]:
        layout = self.layout
        size = 16 * layout.chunks_per_shard + 4 * layout.has_index_checksum
        raw = np.empty(size, np.uint8)
        begin = file.size - size if layout.index_at_end else 0
        if begin < 0 or file.read(begin, raw) != size:
            raise self._damaged(chunk, "its file is shorter than the index of its shard")
        if layout.has_index_checksum:
            stored = int.from_bytes(raw[-4:].tobytes(), "little")
            raw = raw[:-4]
            if google_crc32c.value(raw) != stored:
                raise self._damaged(chunk, "the index of its shard does not match its checksum")
        return raw.view("<u8").reshape(-1, 2)

    def _buffer(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        """Memory of this thread, used again at every read."""
        buffer = getattr(self._scratch, name, None)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size + size // 4, np.uint8)
            setattr(self._scratch, name, buffer)
        return buffer[:size]

    def _damaged(self, chunk: int, what: str, kind: type[DamagedChunk] = DamagedChunk) -> DamagedChunk:
        length = self.layout.chunk
        entries = chunk * length, min(self.layout.length, (chunk + 1) * length)
        return kind(
            what, chunk=chunk, file=self._place.name(self._name(chunk // self.layout.chunks_per_shard)), entries=entries
        )

    def _name(self, shard: int) -> str:
        return self.layout.separator.join(("c", str(shard)))

    def first_missing(self, start: int, stop: int) -> str | None:
        """None: a file that is missing is an error when it is read."""
        return None


def verify_chunk(packed: npt.NDArray[np.uint8]) -> str | None:
    """Compare a chunk with the crc32c in its last four bytes; the difference in words, or None."""
    stored, computed = int.from_bytes(packed[-4:].tobytes(), "little"), google_crc32c.value(packed[:-4])
    return None if computed == stored else f"its checksum is {computed:08x}, stored was {stored:08x}"


def cut_blosc(packed: npt.NDArray[np.uint8], low: int, high: int, size: int) -> tuple[npt.NDArray[np.uint8], int, int]:
    """Cut a blosc frame down to the blocks that hold the bytes [low, high); writes over the parts cut off.

    A frame of 256 cells holds 3-5 blocks, and a read needs whole chunks only between its ends. Layout of a frame
    (c-blosc 1, README_CHUNK_FORMAT): version, versionlz, flags, typesize, then nbytes, blocksize, cbytes as uint32,
    then the offset of each block as int32. Blocks need not stand in order, so all bytes stay and only the header
    moves up to the first block's entry.

    Returns
    -------
    The frame, the bytes skipped before it, and the bytes it decodes to.
    """
    if len(packed) < BLOSC_HEADER:
        raise ValueError(f"got {len(packed)} bytes for a blosc frame")
    flags = int(packed[2])
    num_bytes, block, packed_bytes = struct.unpack_from("<III", packed.data, 4)
    if num_bytes != size or packed_bytes > len(packed) or block == 0:
        raise ValueError(f"got a blosc frame of {num_bytes} bytes in {packed_bytes}, expected {size} in {len(packed)}")
    num_blocks = -(-num_bytes // block)
    first, last = low // block, -(-high // block)
    is_copy = flags & 0x2
    if is_copy or (first == 0 and last == num_blocks):
        return packed, 0, size
    skipped = first * block
    kept = min(num_bytes, last * block) - skipped
    if kept < block:
        # The short last block alone: blosc never splits it by byte, which the flag must say once it stands alone.
        block, flags = kept, flags | 0x10
    offsets = packed[BLOSC_HEADER : BLOSC_HEADER + 4 * num_blocks].view("<i4")
    offsets[first:last] -= 4 * first
    frame = packed[4 * first :]
    frame[0:4] = packed[0], packed[1], flags, packed[3]
    struct.pack_into("<III", frame.data, 4, kept, block, packed_bytes - 4 * first)
    return frame, skipped, kept
