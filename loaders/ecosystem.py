"""anndata and mudata as this package uses them: what differs between versions, and an AnnData written in Zarr v3."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import anndata
import mudata
import numpy as np
import zarr


@contextmanager
def quiet_anndata(zarr_format: Literal[2, 3] = 3) -> Iterator[None]:
    """Write unsharded Zarr, without the notices of anndata and zarr about what is to come.

    String arrays and consolidated metadata have no final Zarr v3 specification yet; anndata and zarr write and read
    them all the same.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="zarr v3 autosharding will be the default")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        warnings.filterwarnings("ignore", message=".*not.* part in the Zarr format 3 specification.*")
        # anndata 0.13 deprecates the choice of a format, and even reading that setting warns.
        warnings.filterwarnings("ignore", message="This setting will be removed", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="zarr v3 will become the only option", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Writing zarr v2 data will no longer be the default")
        with anndata.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
            yield


@contextmanager
def plain_mudata() -> Iterator[None]:
    """MuData keeps cells and columns where they are; before 0.4 it moves them, and warns, unless told not to."""
    options = mudata.set_options if hasattr(mudata, "set_options") else mudata.settings.override
    with options(pull_on_update=False):
        yield


def write_anndata(data: anndata.AnnData, path: Path) -> None:
    """Write an AnnData that fits in memory."""
    with quiet_anndata():
        data.write_zarr(path)


def add_dense_matrix(path: Path, num_columns: int, *, cells_per_chunk: int, name: str = "X") -> zarr.Array:
    """An empty float32 X or layer, (cells, columns), in an AnnData that was written without one."""
    with quiet_anndata():
        root = zarr.open_group(path, mode="r+", use_consolidated=False)
        num_cells = anndata.io.read_elem(root["obs"]).shape[0]
        array = root.create_array(
            name,
            shape=(num_cells, num_columns),
            chunks=(min(cells_per_chunk, num_cells), min(num_columns, 1_024)),
            dtype=np.float32,
            overwrite=True,
            attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
        )
        zarr.consolidate_metadata(root.store)
    return array
