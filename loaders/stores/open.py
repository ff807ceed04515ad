"""Opening a store of any format: the one place that names the formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import zarr

from loaders.addresses import refuse_data_in_memory
from loaders.stores.base import Store
from loaders.stores.chained_store import ChainedStore
from loaders.stores.soma_store import SomaStore
from loaders.stores.zarr_root import Source, describe_source, local_path, not_a_store, open_root
from loaders.stores.zarr_store import ZarrStore

Format = Literal["zarr", "soma"]

ANNBATCH = "annbatch-preshuffled"
"""Encoding of an annbatch collection: a group of AnnData "dataset_0", "dataset_1", ..., parts of one shuffled whole."""

SOMA_MARKS = ("__tiledb_group.tdb", "__group", "__schema")
"""Entries of a folder that TileDB wrote: of a group, or of an array (which is then refused by its type)."""


def open_store(uri: Source | Sequence[Source], *, format: Format | None = None, **options: Any) -> Store:
    """Open a store.

    Parameters
    ----------
    uri
        Path or address of a store made by `liam-scale ingest`, an AnnData or MuData Zarr, an annbatch collection or a
        TileDB-SOMA experiment; or several of them, which are then one data set (see `ChainedStore`).
    format
        "zarr" or "soma"; default: what is found there, for a remote address Zarr unless it begins with tiledb://.
    options
        Handed to the format: see `ZarrStore` and `SomaStore`.

    Raises
    ------
    ValueError
        Nothing there that can be streamed; the message names what was found and what to do. An option that the format
        does not know.
    """
    refuse_data_in_memory(uri, "store")
    if isinstance(uri, Sequence) and not isinstance(uri, str):
        return ChainedStore([open_store(one, format=format, **options) for one in uri])
    is_soma = (format or _format_of(uri)) == "soma"
    try:
        return SomaStore(_address(uri), **options) if is_soma else _open_zarr(uri, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        name = "SomaStore" if is_soma else "ZarrStore"
        raise ValueError(f"options of {describe_source(uri)}: {error}; see {name} for those it knows") from None


def _format_of(uri: Source) -> Format:
    if not isinstance(uri, str | Path):
        return "zarr"
    path = local_path(uri)
    if path is None:
        return "soma" if str(uri).startswith("tiledb://") else "zarr"
    return "soma" if any((path / name).exists() for name in SOMA_MARKS) else "zarr"


def _address(uri: Source) -> str | Path:
    if not isinstance(uri, str | Path):
        raise ValueError(f"store {describe_source(uri)}: got format='soma' for an object of zarr; give its address")
    return uri


def _open_zarr(uri: Source, *, storage_options: Mapping[str, Any] | None = None, **options: Any) -> Store:
    root = open_root(uri, storage_options=storage_options)
    if root.attrs.get("encoding-type") == ANNBATCH:
        return ChainedStore([ZarrStore(part, **options) for part in _datasets(root)], is_shuffled=True)
    return ZarrStore(uri, storage_options=storage_options, **options)


def _datasets(root: zarr.Group) -> list[zarr.Group]:
    """The datasets of an annbatch collection, counted up as servers that cannot list a folder allow."""
    datasets: list[zarr.Group] = []
    while (name := f"dataset_{len(datasets)}") in root:
        datasets.append(root[name])
    if not datasets:
        raise not_a_store(describe_source(root), "an annbatch collection without a dataset")
    return datasets
