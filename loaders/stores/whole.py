"""A whole store in memory, as scanpy and muon expect their data."""

from __future__ import annotations

import warnings

import h5py
import mudata
import numpy as np
import scipy.sparse

from loaders.ecosystem import plain_mudata
from loaders.formats.root import Address, describe_address, open_root
from loaders.formats.sealed import open_sealed
from loaders.formats.sharded import Damaged
from loaders.schema import SCHEMA_KEY


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
