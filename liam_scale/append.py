"""Append: `liam-scale append atlas.zarr donor9.h5mu --sample-key donor` adds cells to a store."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from liam_scale.command import Command
from liam_scale.ingest import described
from loaders.ingest import append


@dataclass(frozen=True)
class AppendConfig:
    """Add the cells of further files to a store that ingest made. What stands there is linked, not written again."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to add to; it is the old one until all is written. Embeddings are left out, as new cells have none."""
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """The new cells, as ingest takes them."""
    sample_key: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column that becomes `sample`; default: the column `sample`, else the name of each file."""
    join: Literal["inner", "outer"] = "inner"
    """inner: sources must have the features of the store; outer: features of either are kept, zero where they lack."""
    peaks: Literal["names", "reference"] = "names"
    """reference: counts of ATAC go to the peak of the store with which theirs shares most bases."""
    ignore_genome: bool = False
    """Take peaks together though their sources name different genomes in var, which else are refused."""
    feature_key: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Column of var by which genes and proteins are called, such as gene_ids; versions (ENSG00000141510.17) go."""
    modality: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=NM|NB ...")] = ()
    """What modalities of other names are that the store lacks, as ingest takes it: `h3k27ac=NM`, `hto=NB`."""
    layer: str | None = None
    """Layer that holds the counts; default: X."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "1GiB"
    """Memory for chunks and shuffling; the peak does not grow with the number of cells."""
    seed: int = 0
    """Seed of the order of the new cells."""
    reshuffle: bool = False
    """Write the whole store anew in one random order, instead of mixing old and new cells at reading."""


def _append(config: AppendConfig) -> None:
    print(described(Path(config.store), append(**vars(config))))


main = Command(AppendConfig, _append, prog="liam-scale append", description="Further cells -> into a store.")

if __name__ == "__main__":
    sys.exit(main())
