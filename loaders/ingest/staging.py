"""A folder under a temporary name that becomes the store by one rename, and is cleared away when its process died."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loaders.machine import HAS_FILE_LOCKS, lock
from loaders.stores.zarr_root import HDF5_SUFFIXES

_LOCK = "lock"
_GRACE_SECONDS = 60.0
"""A staging folder without a lock file may belong to a process that is just creating it."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _prefix(out: Path) -> str:
    return f".{out.name}.ingest-"


def remove_stale(out: Path) -> list[Path]:
    """Remove staging folders of `out` whose process is gone; its lock died with it. Returns what was removed."""
    removed = []
    for folder in sorted(out.parent.glob(f"{_prefix(out)}*")):
        try:
            with open(folder / _LOCK, "r+b") as handle:
                lock(handle.fileno(), wait=False)
        except FileNotFoundError:
            if not folder.is_dir() or time.time() - folder.stat().st_mtime < _GRACE_SECONDS:
                continue
        except BlockingIOError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an `out` that exists, or that is not a Zarr store and may therefore not be overwritten."""
    if out.suffix in HDF5_SUFFIXES:
        raise ValueError(f"--out: got {out}, a store is a Zarr folder; name {out.with_suffix('.zarr')}")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"--out: {out} exists; name another path, or pass --overwrite to replace it")
    is_store = out.is_dir() and any((out / name).exists() for name in ("zarr.json", ".zgroup"))
    if not is_store:
        raise ValueError(f"--overwrite: {out} is not a Zarr store and is left alone; name another --out")


class Staging:
    """The folder in which a store is built, beside its final path so that the last step is one rename.

    Attributes
    ----------
    store
        Where the store is built.
    spill
        Folder for temporary data; gone when the store is published.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        if not HAS_FILE_LOCKS:
            raise RuntimeError(
                "ingest: got a system without file locks (Windows), which reads stores but does not make them;"
                " ingest on Linux, on macOS or in WSL, and copy the store"
            )
        check_out(out, overwrite=overwrite)
        self.out = out
        self._overwrite = overwrite
        with explain_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(out)
            self.folder = out.parent / f"{_prefix(out)}{os.getpid()}-{time.monotonic_ns()}"
            self.folder.mkdir()
            self._lock = open(self.folder / _LOCK, "wb")  # noqa: SIM115 (held open while the folder is in use)
            lock(self._lock.fileno())
            self.store = self.folder / "store"
            self.spill = self.folder / "spill"
            self.spill.mkdir()

    def publish(self) -> None:
        """Rename the finished store to its final path."""
        replaced = self.folder / "replaced"
        if self.out.exists():
            check_out(self.out, overwrite=self._overwrite)
            os.rename(self.out, replaced)
        try:
            os.rename(self.store, self.out)
        except OSError:
            if replaced.exists():
                os.rename(replaced, self.out)
            raise
        self.discard()

    def discard(self) -> None:
        """Remove everything but the published store."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


@contextmanager
def explain_disk_errors(out: Path) -> Iterator[None]:
    """Turn a full disk into a message that names the disk and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RuntimeError(
            f"writing {out}: the disk is full or a quota is reached ({_free(out.parent)} free in {out.parent}); "
            "nothing was left behind. Free space or choose another --out: an ingest needs 5 (RNA) to 8 (ATAC) bytes "
            "a non-zero count while it runs, of which a third stays"
        ) from error


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB"
    except OSError:
        return "unknown space"
