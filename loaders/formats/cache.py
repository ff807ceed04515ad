"""Blocks of remote objects that were read, kept on a local disk up to a size: a second epoch reads them there.

A block is a file of its own: BLOCK_BYTES of an object (its end: fewer), then the crc32c of them. It appears in one step
and never changes, so that any number of processes may share the folder, now and after a restart; where it is damaged or
was removed it is fetched again. The blocks used longest ago go first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from loaders.sizing import describe_memory, parse_memory

BLOCK_BYTES = 4 << 20
"""A request of 30 ms and the copy of so much over 1 Gb/s take equally long; a window of 2,000 cells is 2 to 8 MB."""

FOLDER, SIZE = "LIAM_SCALE_CACHE", "LIAM_SCALE_CACHE_SIZE"
"""Variables of the environment, which child processes inherit."""

DEFAULT_SIZE = "100GB"

_SUFFIX, _PARTIAL = ".block", ".partial"
_LOOK_AFTER = 1 / 50
"""Share of the size that a process adds before it looks how much there is in all."""
_ABANDONED = 3_600.0
"""Seconds after which a block that was never finished is removed."""

_log = logging.getLogger(__name__)


def use_cache(folder: str | Path | None, size: str | int = DEFAULT_SIZE) -> None:
    """Keep what this process and those that it starts read of remote stores, from the next store that is opened on.

    Parameters
    ----------
    folder
        On a local disk; it is made. None: keep nothing.
    size
        Such as "200GB"; the blocks used longest ago are removed beyond it.

    Raises
    ------
    ValueError
        The folder cannot be written, or the size is no amount.
    """
    if folder is None:
        os.environ.pop(FOLDER, None)
        return
    amount, path = parse_memory(size), Path(folder).absolute()
    if amount < 16 * BLOCK_BYTES:
        raise ValueError(f"cache_size: got {size}; give at least {describe_memory(16 * BLOCK_BYTES)}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}{_PARTIAL}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cache: got {folder}, which cannot be written ({error}); name another folder") from None
    os.environ[FOLDER], os.environ[SIZE] = str(path), str(amount)


def the_cache() -> BlockCache | None:
    """The cache that was chosen, the same for all stores of a process."""
    folder, size = os.environ.get(FOLDER), os.environ.get(SIZE, DEFAULT_SIZE)
    if not folder:
        return None
    with _lock:
        if (folder, size) not in _caches:
            use_cache(folder, size)
            _caches[folder, size] = BlockCache(Path(folder), parse_memory(size))
        return _caches[folder, size]


_lock, _caches = threading.Lock(), dict[tuple[str, str], "BlockCache"]()


class BlockCache:
    """Blocks in a folder; may be used by several threads and processes at once."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._lock = threading.Lock()
        self._sound: set[Path] = set()
        self._added = size  # so that it looks at the first block
        self._is_told = False

    def read(
        self, name: str, length: int, offset: int, into: npt.NDArray[np.uint8], fetch: Callable[[int, int], Any]
    ) -> None:
        """Fill an array with the bytes of an object from `offset` on.

        Parameters
        ----------
        name
            Tells the object, and its version, from all others.
        length
            Bytes of the object.
        fetch
            Gives its bytes [start, stop).
        """
        key, end, at = hashlib.sha256(name.encode()).hexdigest()[:40], offset + len(into), offset
        while at < end:
            block = at // BLOCK_BYTES
            stop = min(end, (block + 1) * BLOCK_BYTES)
            if self._read_block(key, block, length, at, into[at - offset : stop - offset]):
                at = stop
                continue
            # Those after it that are not here either come with the same request.
            after = block + 1
            while after * BLOCK_BYTES < end and not self._path(key, after).exists():
                after += 1
            begin, stop = block * BLOCK_BYTES, min(length, after * BLOCK_BYTES)
            found = np.frombuffer(fetch(begin, stop), np.uint8)
            for number in range(block, after):
                self._keep(self._path(key, number), found[(number - block) * BLOCK_BYTES :][:BLOCK_BYTES])
            stop = min(stop, end)
            into[at - offset : stop - offset] = found[at - begin : stop - begin]
            at = stop

    def _path(self, key: str, block: int) -> Path:
        return self.folder / key[:2] / f"{key[2:]}-{block}{_SUFFIX}"

    def _read_block(self, key: str, block: int, length: int, at: int, into: npt.NDArray[np.uint8]) -> bool:
        """Fill an array from a block; False where it is not there, or not sound."""
        path = self._path(key, block)
        try:
            with path.open("rb", buffering=0) as file:
                if path not in self._sound:
                    size = min(BLOCK_BYTES, length - block * BLOCK_BYTES)
                    whole = file.read()
                    if len(whole) != size + 4 or google_crc32c.value(whole[:-4]) != int.from_bytes(
                        whole[-4:], "little"
                    ):
                        path.unlink(missing_ok=True)
                        return False
                    self._sound.add(path)
                os.utime(file.fileno())
                return os.preadv(file.fileno(), [into.data], at - block * BLOCK_BYTES) == len(into)
        except OSError:
            self._sound.discard(path)
            return False

    def _keep(self, path: Path, content: npt.NDArray[np.uint8]) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{_PARTIAL}")
        try:
            self._make_room(len(content))
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb", buffering=0) as file:
                written = file.write(content.data) + file.write(google_crc32c.value(content).to_bytes(4, "little"))
                if written != len(content) + 4:
                    raise OSError("the disk is full")
            partial.rename(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._is_told:
                self._is_told = True
                _log.warning(
                    "cache %s: cannot be written (%s); what is read now is not kept: make room there, or name another"
                    " folder or a smaller size",
                    self.folder,
                    error,
                )

    def _make_room(self, added: int) -> None:
        """Look at all blocks now and then, and remove those used longest ago where there are too many."""
        with self._lock:
            self._added += added
            if self._added < self.size * _LOOK_AFTER:
                return
            self._added = 0
            blocks, total = [], 0
            for file in self.folder.glob(f"??/*{_SUFFIX}*"):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    if file.suffix == _PARTIAL and time.time() - status.st_mtime > _ABANDONED:
                        file.unlink()
                        continue
                    blocks.append((status.st_mtime, status.st_size, file))
                    total += status.st_size
            for _, size, file in sorted(blocks, key=lambda block: block[0]):
                # Others look as seldom as this process: what they may add until then is left free.
                if total <= self.size * (1 - 2 * _LOOK_AFTER):
                    break
                with suppress(FileNotFoundError):
                    file.unlink()
                    self._sound.discard(file)
                    total -= size
