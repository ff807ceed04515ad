"""Writing that a crash cannot tear: a file or folder is the old one or the new one, never a part.

The new one grows in a hidden folder beside its target, is flushed to the disk and takes the target's place in one step.
An error leaves the old one and nothing else; what a killed process left goes when the same target is written next.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_FILE_LOCKS = fcntl is not None

SUFFIX = ".partial"
_LOCK = "lock"
REPLACED = "replaced"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}


class Held(RuntimeError):
    """Another process is at it; the message says which one, where and since when."""


@contextmanager
def replacing(target: Path, *, hidden: Path | None = None, alone: bool = False) -> Iterator[Path]:
    """A path at which to make a file or folder, which becomes `target` when the block ends without an error.

    Parameters
    ----------
    hidden
        What the hidden folder is named after, and beside which it stands, instead of the target.
    alone
        Refuse to begin while another process is at it: for what takes long.

    Raises
    ------
    RuntimeError
        The disk is full or cannot be written, or another process is at it; what stood at `target` still stands.
    """
    with writing(target):
        staging = Staging(target, hidden=hidden, alone=alone)
        try:
            yield staging.path
            staging.publish()
        finally:
            staging.discard()


@contextmanager
def holding(target: Path) -> Iterator[None]:
    """Work on `target` that no other process may do at the same time; `Held` says which one does."""
    with writing(target):
        staging = Staging(target, hidden=target.with_name(f"{target.name}.lock"), alone=True)
    try:
        yield
    finally:
        staging.discard()


def write_text(target: Path, text: str) -> None:
    with replacing(target) as path:
        path.write_text(text, encoding="utf-8")


def remove(folder: Path) -> None:
    """Remove a folder that others read: it goes in one step, and what a kill leaves of it is hidden."""
    with writing(folder):
        staging = Staging(folder)
        os.rename(folder, staging.path)
        staging.discard()


@contextmanager
def gone_on_error(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Take files and folders away that a block makes in a folder, where it fails or is interrupted."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        for path in map(folder.joinpath, names):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(target: Path | str, *, cure: str = "", only_full: bool = False) -> Iterator[None]:
    """Turn an error of the disk into a message that names what was written, why it failed and the cure.

    Parameters
    ----------
    cure
        Said after the cure of a full disk.
    only_full
        Let other errors than a full disk pass: the block also reads.
    """
    try:
        yield
    except Exception as error:
        number = _errno_of(error)
        if number in _FULL:
            raise RuntimeError(
                f"writing {target}: disk full, or a quota is reached ({_free(Path(target).parent)}); what stood there"
                f" before is unchanged. Free some space and run the same command again{cure}"
            ) from error
        if number is None or only_full:
            raise
        raise RuntimeError(
            f"writing {target}: could not be written ({error}); make its folder writable, or name another"
        ) from error


class Staging:
    """A hidden folder beside `target`, held by this process, in which the next version of `target` grows.

    Attributes
    ----------
    path
        Where to make what becomes `target` by `publish`.
    folder
        The hidden folder; anything else in it is gone with `discard`. `adopt` says of one that a killed process left
        whether this one goes on with it.
    """

    def __init__(
        self,
        target: Path,
        *,
        hidden: Path | None = None,
        alone: bool = False,
        adopt: Callable[[Path], bool] | None = None,
    ) -> None:
        self.target = target
        hidden = hidden or target
        hidden.parent.mkdir(parents=True, exist_ok=True)
        self.folder, self._lock = (adopt and _adopt(hidden, adopt)) or _make_folder(hidden)
        self.path = self.folder / target.name
        remove_leftovers(target, hidden=hidden)
        if alone and HAS_FILE_LOCKS:
            self._refuse_if_second(hidden)

    def publish(self) -> None:
        """Flush what stands at `path` and put it in the place of `target`."""
        self._flush()
        if not os.path.lexists(self.target) or not (self.path.is_dir() or self.target.is_dir()):
            os.replace(self.path, self.target)
        elif not _exchange(self.path, self.target):
            os.rename(self.target, self.folder / REPLACED)
            try:
                os.rename(self.path, self.target)
            except OSError:
                os.rename(self.folder / REPLACED, self.target)
                raise
        _sync(self.target.parent)

    def discard(self) -> None:
        """Remove the hidden folder and what is left in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def leave(self) -> None:
        """Let go of the hidden folder without removing it: who adopts it goes on."""
        self._lock.close()

    def _refuse_if_second(self, hidden: Path) -> None:
        mine = json.loads((self.folder / _LOCK).read_text())
        for folder in leftovers(hidden):
            try:
                other = json.loads((folder / _LOCK).read_text())
            except (OSError, ValueError):  # It has just ended, or it has just begun and will see this one.
                continue
            if other["since"] < mine["since"]:
                self.discard()
                since = datetime.fromtimestamp(other["since"]).isoformat(" ", "seconds")
                raise Held(
                    f"{self.target}: process {other['pid']} on {other['host']} has been writing it since {since}; "
                    "wait until it has ended, or end it"
                )

    def _flush(self) -> None:
        """Flush every file and folder; files get the mode that the user's umask gives (safetensors makes them 0600)."""
        mode = os.fstat(self._lock.fileno()).st_mode & 0o777
        made = [self.path, *self.path.rglob("*")]
        # One thread waits 3.6 ms for each small file, sixteen together 0.35 ms.
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda path: _sync(path) if path.is_dir() else _sync_file(path, mode), made))


def leftovers(hidden: Path) -> list[Path]:
    """Hidden folders of a path (`*` in its name: of several), in use or left by a killed process."""
    name = hidden.name if "*" in hidden.name else glob.escape(hidden.name)
    return sorted(hidden.parent.glob(f".{name}.????????{SUFFIX}"))


def remove_leftovers(
    target: Path, *, hidden: Path | None = None, keep: Callable[[Path], bool] = lambda folder: False
) -> list[Path]:
    """Remove hidden folders whose process is gone: its lock died with it. An old version found in one is put back.

    Those for which `keep` is true stay.
    """
    removed = []
    # Without locks nobody can tell whose folder is left over.
    for folder in leftovers(hidden or target) if HAS_FILE_LOCKS else ():
        if keep(folder):
            continue
        try:
            with open(folder / _LOCK, "r+b") as file:
                lock(file.fileno(), wait=False)
                own = folder.name[1 : -len(f".????????{SUFFIX}")]
                place = target.with_name(own) if "*" in target.name else target
                if (folder / REPLACED).exists() and not place.exists():
                    os.rename(folder / REPLACED, place)
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            try:
                folder.rmdir()  # Its process was killed at once, or is about to make the lock and makes another folder.
            except OSError:
                if (folder / _LOCK).exists():
                    continue
                # The lock comes before all else: what is there without it was left by a kill while it was removed.
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # Its process lives.
            continue
        removed.append(folder)
    return removed


def _make_folder(hidden: Path) -> tuple[Path, IO[bytes]]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{hidden.name}.", suffix=SUFFIX, dir=hidden.parent))
        try:
            file = open(folder / _LOCK, "xb", buffering=0)  # noqa: SIM115 (held open while the folder is in use)
        except FileNotFoundError:  # taken for a leftover by another process
            continue
        try:
            lock(file.fileno())
            if (folder / _LOCK).exists():
                _sign(file)
                return folder, file
        except OSError:  # The disk is full.
            file.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        file.close()


def _adopt(hidden: Path, fits: Callable[[Path], bool]) -> tuple[Path, IO[bytes]] | None:
    """The hidden folder of a process that is gone, and its lock."""
    for folder in leftovers(hidden) if HAS_FILE_LOCKS else ():
        try:
            file = open(folder / _LOCK, "r+b")  # noqa: SIM115 (held open while the folder is in use)
        except OSError:
            continue
        try:
            lock(file.fileno(), wait=False)
            if (folder / _LOCK).exists() and fits(folder):
                _sign(file)
                return folder, file
        except OSError:  # Its process lives.
            pass
        file.close()
    return None


def _sign(file: IO[bytes]) -> None:
    """Say in a lock who holds it."""
    who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    file.truncate(0)
    file.write(json.dumps(who).encode())
    file.flush()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system cannot."""
    if sys.platform == "win32":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = library.renamex_np(os.fsencode(one), os.fsencode(other), 2)
    elif hasattr(library, "renameat2"):
        failed = library.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2)
    else:
        return False
    if failed and ctypes.get_errno() not in _CANNOT_EXCHANGE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return not failed


def _sync_file(path: Path, mode: int) -> None:
    path.chmod(mode)
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Flush the names in a folder; Windows has no such thing."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno_of(error: Exception) -> int | None:
    """Number of an error of the system; libraries written in Rust or C++ give it, or its name, in their text."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"os error (\d+)", str(error))
    if found:
        return int(found.group(1))
    return errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else None


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB free in {folder}"
    except OSError:
        return f"unknown space in {folder}"


def lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock a file or folder for this process until it is closed; nothing where the system has no such locks.

    Raises
    ------
    BlockingIOError
        Another process holds it, and `wait` is not set.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
