"""Export: `liam-scale export atlas.zarr --to h5mu` writes a store, its embeddings with it, as one file for others."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from liam_scale.command import Command
from loaders.durable import replacing
from loaders.ecosystem import quiet_anndata
from loaders.stores import read_store


@dataclass(frozen=True)
class ExportConfig:
    """Write a store made by ingest, counts as float32 and embeddings included, as one file. All of it is in memory."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to export."""
    to: Literal["h5mu", "h5ad"] = "h5mu"
    """Format; h5ad for a store of one modality."""
    out: Path | None = None
    """File to write; default: beside the store, with the format's suffix."""
    overwrite: bool = False
    """Replace a file that exists."""


def export(config: ExportConfig) -> Path:
    """Write the file; returns its path.

    Raises
    ------
    ValueError
        The file exists, the store was not made by ingest, or it has several modalities and h5ad was asked for.
    """
    out = config.out or Path(config.store.rstrip("/")).with_suffix(f".{config.to}")
    if out.exists() and not config.overwrite:
        raise ValueError(f"--out: {out} exists; name a new file, or give --overwrite")
    if out.suffix != f".{config.to}":
        raise ValueError(f"--out: got {out}, which is no .{config.to}; name {out.with_suffix(f'.{config.to}')}")
    data = read_store(config.store)
    if config.to == "h5ad" and len(data.mod) > 1:
        raise ValueError(f"--to: got h5ad for {', '.join(data.mod)}; a file of several modalities is an h5mu")
    with replacing(out) as path, quiet_anndata():
        if config.to == "h5ad":
            next(iter(data.mod.values())).write_h5ad(path)
        else:
            data.write_h5mu(path)
    return out


main = Command(
    ExportConfig,
    lambda config: print(f"wrote {export(config)}"),
    prog="liam-scale export",
    description="A store -> one h5mu or h5ad.",
)

if __name__ == "__main__":
    sys.exit(main())
