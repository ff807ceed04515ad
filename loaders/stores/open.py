"""Opening a store of any format, to stream or whole."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import anndata
import h5py
import mudata
import numpy as np
import scipy.sparse
import zarr
from zarr.storage import LocalStore, ObjectStore

from loaders.ecosystem import plain_mudata
from loaders.formats.cache import the_cache
from loaders.formats.damage import Damaged
from loaders.formats.elements import CompressedColumns
from loaders.formats.root import Address, describe_address, is_soma, not_a_store, open_root, reading
from loaders.formats.scverse import Held, open_group, open_held
from loaders.formats.sealed import open_sealed
from loaders.formats.soma import SomaExperiment
from loaders.formats.source import Source
from loaders.modalities import PRESETS, Declared, Kinds, agreed, check_found, declared
from loaders.schema import SCHEMA_KEY
from loaders.stores.base import Store
from loaders.stores.embeddings import HeldEmbeddings, SomaEmbeddings, ZarrEmbeddings
from loaders.stores.store import own_store, store_of
from loaders.stores.views import ChainedStore

_log = logging.getLogger(__name__)

ANNBATCH = "annbatch-preshuffled"
"""Encoding of an annbatch collection: a group of AnnData "dataset_0", "dataset_1", ..., parts of one shuffled whole."""


def open_store(
    address: Address | Held | Sequence[Address | Held],
    *,
    format: Literal["zarr", "soma"] | None = None,
    modality: Declared | None = None,
    layer: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    obs_filter: str | None = None,
    measurements: Mapping[str, str] | None = None,
    tiledb_config: Mapping[str, str | float] | None = None,
) -> Store:
    """Open a store.

    Parameters
    ----------
    address
        Path or address of a store made by `ingest`, an AnnData or MuData (.zarr, .h5ad, .h5mu), a 10x .h5,
        an annbatch collection or a TileDB-SOMA experiment; an AnnData or MuData in memory; or several of them, which
        are then one data set (see `ChainedStore`).
    format
        "zarr" or "soma"; default: what is found there, for a remote address Zarr unless it begins with tiledb://.
    modality
        A text: the one modality to take ("adt"); it also names the features of an AnnData that does not. Without it:
        var["feature_types"] where there is one, which may split the columns into several modalities; else atac where
        features are named as intervals; else rna. Not for this package's own stores.
        A mapping or several texts: what modalities of other names are, {"h3k27ac": "NM", "hto": "NB:clr"}, as for an
        ingest; "h3k27ac=NM" says it of the one to take.
    layer
        Layer that holds the counts ("counts", or "raw" for AnnData's raw) instead of X; of TileDB-SOMA the X layer,
        default the only one, or the first of counts, raw and data. Not for this package's own stores.
    storage_options
        Of a remote address; see `loaders.formats.root.open_root`.
    obs_filter, measurements, tiledb_config
        Of TileDB-SOMA; see `SomaExperiment`.

    Raises
    ------
    ValueError
        Nothing there that can be streamed; the message names what was found and what to do.
    """
    is_name = isinstance(modality, str) and "=" not in modality
    kinds = declared(None if is_name else modality)
    one = modality.partition("=")[0] if isinstance(modality, str) else None
    store = open_known(
        address,
        kinds,
        format=format,
        modality=one,
        layer=layer,
        storage_options=storage_options,
        obs_filter=obs_filter,
        measurements=measurements,
        tiledb_config=tiledb_config,
    )
    check_found(kinds, store.schema.modalities, store.uri)
    return store


def open_known(
    address: Address | Held | Sequence[Address | Held],
    kinds: Kinds,
    *,
    format: Literal["zarr", "soma"] | None = None,
    modality: str | None = None,
    layer: str | None = None,
    foreign_layer: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **of_soma: Any,
) -> Store:
    """`open_store` where it is known what modalities of other names are, though they need not be there.

    `foreign_layer` is the layer of a store that no ingest made; one that ingest made holds its counts in one place.
    """
    kinds = {**PRESETS, **kinds}
    choice = {"modality": modality, "layer": layer or foreign_layer}
    if isinstance(address, anndata.AnnData | mudata.MuData):
        _refuse(of_soma, f"{type(address).__name__} in memory")
        return store_of(_streamable(open_held(address, **choice, kinds=kinds, say=_log.info)), HeldEmbeddings(address))
    if isinstance(address, Sequence) and not isinstance(address, str):
        layers = {"layer": layer, "foreign_layer": foreign_layer}
        options: Any = {"format": format, "storage_options": storage_options, **choice, **layers, **of_soma}
        return ChainedStore([open_known(one, kinds, **options) for one in address])
    if format == "soma" or (format is None and is_soma(address)):
        if not isinstance(address, str | Path):
            raise ValueError(f"store {describe_address(address)}: got format='soma' for an object of zarr; give a path")
        _refuse({"modality": modality, "storage_options": storage_options}, "a TileDB-SOMA experiment")
        experiment = SomaExperiment(address, layer=layer or foreign_layer, kinds=kinds, **of_soma, say=_log.info)
        _tell_unshuffled(experiment.uri)
        return store_of(experiment.source, SomaEmbeddings(experiment), close=experiment.close)
    _refuse(of_soma, describe_address(address))
    return _open_root(address, storage_options, kinds, modality=modality, layer=layer, foreign_layer=foreign_layer)


def _open_root(
    address: Address,
    storage_options: Mapping[str, Any] | None,
    kinds: Kinds,
    *,
    modality: str | None,
    layer: str | None,
    foreign_layer: str | None,
) -> Store:
    root, label = open_root(address, storage_options=storage_options), describe_address(address)
    with reading(label):
        attributes = dict(root.attrs)
    if attributes.get("encoding-type") == ANNBATCH:
        choice: Any = {"modality": modality, "layer": layer, "foreign_layer": foreign_layer}
        parts = [_open_root(part, None, kinds, **choice) for part in _datasets(root)]
        return ChainedStore(parts, is_shuffled=True)
    if isinstance(root, zarr.Group) and isinstance(root.store, ObjectStore):
        if the_cache() is None:
            _log.info("%s is read over the network in every epoch; cache='DIR' keeps it on a local disk", label)
    elif isinstance(root, zarr.Group) and not isinstance(root.store, LocalStore):
        _log.info(
            "%s is read through zarr-python, as it is neither on a local disk nor in an object store: every chunk is a"
            " request; copy it, or give the loader more memory so that reads are longer",
            label,
        )
    if SCHEMA_KEY in attributes:
        _refuse({"modality": modality, "layer": layer}, f"{label}, whose modalities and counts are fixed")
        store = own_store(root, label, ZarrEmbeddings(address, storage_options))
        agreed([("what was asked for", kinds), (label, store.schema.kinds)])
        return store
    options: Any = {"modality": modality, "layer": layer or foreign_layer, "kinds": kinds}
    source = _streamable(open_group(root, label, Path(label), **options, say=_log.info))
    _tell_unshuffled(label)
    close = root.close if isinstance(root, h5py.File) else None
    return store_of(source, ZarrEmbeddings(address, storage_options), close=close)


def _streamable(source: Source) -> Source:
    for part in source.parts.values():
        if isinstance(part.matrix, CompressedColumns):
            part.matrix.stored(0, 0)  # says why not, and the cure
    return source


def _tell_unshuffled(label: str) -> None:
    _log.info(
        "%s was not made by an ingest: cells are taken in the order there, with small blocks and large"
        " windows; ingesting once shuffles them and makes reading faster",
        label,
    )


def _refuse(options: Mapping[str, Any], what: str) -> None:
    """Refuse options that do not go with what is opened."""
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"open_store: got {', '.join(given)} for {what}; leave that out")


def _datasets(root: zarr.Group) -> list[zarr.Group]:
    """The datasets of an annbatch collection, counted up as servers that cannot list a folder allow."""
    datasets: list[zarr.Group] = []
    while (name := f"dataset_{len(datasets)}") in root:
        datasets.append(root[name])
    if not datasets:
        raise not_a_store(describe_address(root), "an annbatch collection without a dataset")
    return datasets


def read_store(store: Address) -> mudata.MuData:
    """Read a store made by `ingest` into memory, ready for scanpy.

    The store keeps counts in the narrowest type that holds them, with which scanpy overflows or fails; here they are
    float32. Cells stand in the store's order, in the modalities those that have it.

    Parameters
    ----------
    store
        Its path, or what else Zarr opens.

    Returns
    -------
    A MuData whose every modality has all obs columns and embeddings (`obsm["X_liam"]`) of its cells, so that it can be
    used alone.

    Raises
    ------
    ValueError
        Not a store made by ingest.
    """
    root, uri = open_root(store), describe_address(store)
    if SCHEMA_KEY not in root.attrs or isinstance(root, h5py.File):
        raise ValueError(
            f"read_store: got {uri}, which no ingest made; read it with mudata.read_zarr or anndata.read_zarr"
        )
    with plain_mudata(), warnings.catch_warnings():
        # SciPy's remark on unsigned indices.
        warnings.filterwarnings("ignore", message="indices array has non-integer dtype")
        try:
            data = mudata.read_zarr(open_sealed(root, uri, root.attrs[SCHEMA_KEY].get("metadata") or {}).store)
        except Damaged:
            raise
        except Exception as error:  # those of codecs are of every kind
            raise Damaged(uri, "", f"{type(error).__name__}: {error}") from error
        embeddings = {name: values for name, values in data.obsm.items() if name not in data.mod}
        for modality in data.mod.values():
            counts = modality.X
            parts = (counts.data.astype(np.float32), counts.indices.astype(np.int32), counts.indptr)
            modality.X = scipy.sparse.csr_matrix(parts, counts.shape)
            rows = data.obs_names.get_indexer(modality.obs_names)
            common = data.obs.columns.difference(modality.obs.columns, sort=False)
            modality.obs = data.obs.iloc[rows][common].join(modality.obs)
            for name, values in embeddings.items():
                modality.obsm[name] = values[rows]
    return data
