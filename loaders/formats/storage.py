"""Where the files of an array stand, a folder or an object store, and how a range of bytes of one is read."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from zarr.storage import ObjectStore

from loaders.formats.cache import the_cache

_PAUSES = (0.5, 2.0, 5.0)
"""Seconds before a request is made again whose answer broke off: obstore repeats only those that were not answered."""


class RemoteStore(ObjectStore):
    """Objects as Zarr reads them."""

    async def get(self, *arguments: Any, **options: Any) -> Any:
        from obstore.exceptions import GenericError

        for pause in _PAUSES:
            try:
                return await super().get(*arguments, **options)
            except GenericError:
                await asyncio.sleep(pause)
        return await super().get(*arguments, **options)


class File(Protocol):
    """A file that ranges are read from, by several threads at once.

    Attributes
    ----------
    size
        Bytes.
    """

    size: int

    def read(self, offset: int, into: npt.NDArray[np.uint8]) -> int:
        """Fill an array; returns the bytes read, fewer only at the end of the file."""
        ...


class Place(Protocol):
    """Where the files of an array stand.

    Attributes
    ----------
    read_bytes
        Chunks that lie side by side are read together up to at least this many bytes.
    """

    read_bytes: int

    def name(self, file: str) -> str:
        """How messages name a file."""
        ...

    def content(self, file: str) -> bytes:
        """All of a file; OSError where it cannot be read."""
        ...

    def open(self, file: str) -> File:
        """OSError where it is not there."""
        ...

    def identity(self) -> object:
        """What tells this place from another that takes its place."""
        ...


class _LocalFile:
    """Closed when nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, offset: int, into: npt.NDArray[np.uint8]) -> int:
        view, done = into.data, 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done


class Folder:
    """A folder on a local disk."""

    read_bytes = 1 << 18
    """More would not stay in the cache of the processor between reading and decoding."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def name(self, file: str) -> str:
        return str(self.path / file)

    def content(self, file: str) -> bytes:
        return (self.path / file).read_bytes()

    def open(self, file: str) -> File:
        return _LocalFile(self.path / file)

    def identity(self) -> tuple[int, int]:
        return identify(self.path)


def identify(folder: Path) -> tuple[int, int]:
    """What tells a folder from another that takes its place; zeros where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


class _Object:
    """An object of a store, read by requests for ranges, through the cache where there is one."""

    def __init__(self, store: Any, key: str, version: str, size: int) -> None:
        self._store, self._key, self._version, self.size = store, key, version, size

    def read(self, offset: int, into: npt.NDArray[np.uint8]) -> int:
        into = into[: max(0, self.size - offset)]
        if len(into) and (cache := the_cache()) is not None:
            cache.read(self._version, self.size, offset, into, self._fetch)
        elif len(into):
            into[:] = np.frombuffer(self._fetch(offset, offset + len(into)), np.uint8)
        return len(into)

    def _fetch(self, start: int, stop: int) -> Any:
        import obstore
        from obstore.exceptions import GenericError

        for pause in _PAUSES:
            try:
                return obstore.get_range(self._store, self._key, start=start, end=stop)
            except GenericError:
                time.sleep(pause)
        return obstore.get_range(self._store, self._key, start=start, end=stop)


class Objects:
    """The objects below a prefix of a store of obstore."""

    read_bytes = 8 << 20
    """A window of a few thousand cells is one request."""

    def __init__(self, store: Any, prefix: str) -> None:
        self._store, self._prefix = store, prefix.strip("/")

    def _key(self, file: str) -> str:
        return f"{self._prefix}/{file}" if self._prefix else file

    def name(self, file: str) -> str:
        return f"{self._store}/{self._key(file)}"

    def content(self, file: str) -> bytes:
        import obstore

        return obstore.get(self._store, self._key(file)).bytes().to_bytes()

    def open(self, file: str) -> File:
        import obstore

        found, endpoint = obstore.head(self._store, self._key(file)), getattr(self._store, "config", {}).get("endpoint")
        version = f"{endpoint} {self.name(file)} {found['e_tag']} {found['last_modified']} {found['size']}"
        return _Object(self._store, self._key(file), version, found["size"])

    def identity(self) -> None:
        return None
