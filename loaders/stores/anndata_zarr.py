"""Writing an AnnData in Zarr v3."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import zarr

from loaders.ecosystem import quiet_anndata


def write_anndata(data: anndata.AnnData, path: Path) -> None:
    """Write an AnnData that fits in memory."""
    with quiet_anndata():
        data.write_zarr(path)


def add_dense_matrix(path: Path, num_columns: int, *, cells_per_chunk: int) -> zarr.Array:
    """An empty float32 X, (cells, columns), in an AnnData that was written without one."""
    with quiet_anndata():
        root = zarr.open_group(path, mode="r+", use_consolidated=False)
        num_cells = anndata.io.read_elem(root["obs"]).shape[0]
        array = root.create_array(
            "X",
            shape=(num_cells, num_columns),
            chunks=(min(cells_per_chunk, num_cells), min(num_columns, 1_024)),
            dtype=np.float32,
            overwrite=True,
            attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
        )
        zarr.consolidate_metadata(root.store)
    return array
