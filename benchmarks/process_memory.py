"""The kernel's view of a process and its files: peak memory, and cold runs without root's rights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path


def drop_from_page_cache(folders: Iterable[str | Path]) -> None:
    os.sync()  # pages not yet written stay
    for folder in folders:
        for path in Path(folder).rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def peak_of_process() -> float:
    """Highest resident memory since this program began; `ru_maxrss` would count the parent's before the exec."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
