"""Opening a store of any format: the one place that names the formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.stores.base import Store
from loaders.stores.zarr_root import Source
from loaders.stores.zarr_store import ZarrStore


def open_store(uri: Source | Sequence[Source], **options: Any) -> Store:
    """Open a store.

    Parameters
    ----------
    uri
        Path or address of a store made by `liam-scale ingest`, an AnnData or MuData Zarr.
    options
        Handed to the format: see `ZarrStore`.

    Raises
    ------
    ValueError
        Nothing there that can be streamed; the message names what was found and what to do.
    """
    assert isinstance(uri, str | Path) or not isinstance(uri, Sequence)
    return ZarrStore(uri, **options)
