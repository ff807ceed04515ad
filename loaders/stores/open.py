"""Opening a store of any format: the one place that names the formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from loaders.stores.base import Store
from loaders.stores.soma_store import SomaStore
from loaders.stores.zarr_root import Source, local_path
from loaders.stores.zarr_store import ZarrStore

Format = Literal["zarr", "soma"]


def open_store(uri: Source | Sequence[Source], *, format: Format | None = None, **options: Any) -> Store:
    """Open a store.

    Parameters
    ----------
    uri
        Path or address of a store made by `liam-scale ingest`, an AnnData or MuData Zarr, an annbatch collection or a
        TileDB-SOMA experiment. Several are one data set: see `ChainedStore`.
    format
        "zarr" or "soma"; default: what is found there, for a remote address Zarr.
    options
        Handed to the format: see `ZarrStore` and `SomaStore`.

    Raises
    ------
    ValueError
        Nothing there that can be streamed; the message names what was found and what to do. An option that the format
        does not know.
    """
    kind: type[ZarrStore] | type[SomaStore] = SomaStore if (format or _format_of(uri)) == "soma" else ZarrStore
    try:
        return kind(uri, **options)  # type: ignore[arg-type]
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"options of {uri}: {error}; see {kind.__name__} for those it knows") from None


def _format_of(uri: Source) -> Format:
    if not isinstance(uri, str | Path):
        return "zarr"
    path = local_path(uri)
    if path is None:
        return "soma" if str(uri).startswith("tiledb://") else "zarr"
    return "soma" if any((path / name).exists() for name in SOMA_MARKS) else "zarr"


SOMA_MARKS = ("__tiledb_group.tdb", "__group", "__schema")
"""Entries of a folder that TileDB wrote: of a group, or of an array (which is then refused by its type)."""
