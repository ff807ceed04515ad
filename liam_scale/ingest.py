"""Ingest: `liam-scale ingest donor1.h5mu donor2.h5mu --out atlas.zarr` makes one store of source files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from liam_scale.command import Command
from loaders.ingest import ingest


@dataclass(frozen=True)
class IngestConfig:
    """Read source files, check their counts, shuffle the cells, write one store."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """h5ad, h5mu, 10x .h5, AnnData or MuData Zarr, SOMA experiment; `rna=a.h5ad,atac=b.h5ad` pairs files by cell."""
    out: Path
    """Store to write, e.g. atlas.zarr."""
    sample_key: str | None = None
    """Obs column that becomes the column `sample`; default: the name of each file."""
    join: Literal["inner", "outer"] = "inner"
    """Features kept when several sources differ: those of all, or those of any."""
    layer: str | None = None
    """Layer that holds the counts; default: X."""
    memory: str = "1GiB"
    """Memory for chunks and shuffling; the peak does not grow with the number of cells."""
    seed: int = 0
    """Seed of the global shuffle."""
    overwrite: bool = False
    """Replace `out` if it exists."""


def _ingest_and_tell(config: IngestConfig) -> None:
    if not config.sources:
        raise ValueError("sources: got none; name at least one file, e.g. a.h5mu")
    schema = ingest(
        config.sources,
        out=config.out,
        sample_key=config.sample_key,
        join=config.join,
        layer=config.layer,
        memory=config.memory,
        seed=config.seed,
        overwrite=config.overwrite,
    )
    print(f"wrote {config.out}: {schema.num_cells:,} cells")
    for m in schema.modalities.values():
        print(
            f"  {m.name}: {m.num_cells:,} cells x {m.num_features:,} features, "
            f"{m.nonzeros_per_cell:,.0f} non-zeros a cell, {m.value_dtype}"
        )
    print(f"  obs: {', '.join(schema.obs_columns)}")
    print(f"next: python -m liam_scale.train {config.out} --batch-key sample --out runs/a")


main = Command(IngestConfig, _ingest_and_tell, prog="liam-scale ingest", description="Source files -> one store.")

if __name__ == "__main__":
    sys.exit(main())
