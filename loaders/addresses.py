"""What a user names as source or store: paths and addresses, not data in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

_SUFFIXES = {"AnnData": "h5ad", "MuData": "h5mu"}


def addresses(given: Any, what: str) -> list[str]:
    """A path or address, or several of them, as texts.

    Raises
    ------
    ValueError
        It is something else, such as an AnnData in memory.
    """
    several = list(given) if isinstance(given, Sequence | Iterator) and not isinstance(given, str) else [given]
    for one in several:
        if not isinstance(one, str | os.PathLike):
            refuse_data_in_memory(one, what)
            raise ValueError(f"{what}: got {one!r} ({type(one).__name__}); give the path or address of a file or store")
    return [str(one) for one in several]


def refuse_data_in_memory(given: Any, what: str) -> None:
    """Refuse an AnnData or MuData object.

    Raises
    ------
    ValueError
        It is one; the message says how to make a store of it.
    """
    # By name: neither library needs to be imported to know that it is not one of theirs.
    suffix = _SUFFIXES.get(type(given).__name__)
    if suffix is not None:
        raise ValueError(
            f"{what}: got an {type(given).__name__} in memory ({given.n_obs:,} cells); write it to a file, "
            f'data.write("data.{suffix}"), and make a store of that: ingest("data.{suffix}", out="data.zarr")'
        )
