"""What the machine gives to this process, where systems differ: Linux, macOS, and Windows for reading and inference."""

from __future__ import annotations

import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_FILE_LOCKS = fcntl is not None


def num_cores() -> int:
    """Cores this process may use; those of the machine where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Threads of a pool whose user chose no number: the cores, at most 4, beyond which readers and writers idle."""
    return min(4, num_cores())


def lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock a file or folder for this process until it is closed; nothing where the system has no such locks.

    Raises
    ------
    BlockingIOError
        Another process holds it, and `wait` is not set.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
