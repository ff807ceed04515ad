"""JSON and TOML that may be damaged: their size is looked at before they are read, and what is no table is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_BYTES = 256 << 20
"""Names of millions of features take a fifth of it; read, a document takes ten times its size."""


def check_size(file: Path, most: int = MOST_BYTES) -> None:
    """ValueError for a file that would fill the memory."""
    if (size := file.stat().st_size) > most:
        raise ValueError(f"{file.name} has {size:,} bytes, expected at most {most:,}")


def read_table(file: Path, parse: Callable[[str], Any] = json.loads, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The table in a file.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It holds none, or is larger than `most` bytes.
    """
    check_size(file, most)
    try:
        table = parse(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply; write it anew") from None
    if not isinstance(table, dict):
        raise ValueError(f"it holds {type(table).__name__}, expected a table")
    return table
