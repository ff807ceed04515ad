"""Writing a small AnnData (cells, features, obsm) as Zarr v3."""

from __future__ import annotations

from pathlib import Path

import anndata


def write_anndata(data: anndata.AnnData, path: Path) -> None:
    """Write in format 3 and without automatic shards, whatever anndata's changing defaults are."""
    with anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        data.write_zarr(path)
