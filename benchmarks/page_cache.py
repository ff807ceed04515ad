"""Cold runs: pages of some folders are dropped from the page cache, without root's rights."""

from __future__ import annotations

import os
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
