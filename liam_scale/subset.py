"""Subset: `liam-scale subset atlas.zarr --where "tissue == 'blood'" --out blood.zarr` keeps some cells."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from liam_scale.command import Command
from liam_scale.ingest import described
from liam_scale.tables import names_in
from loaders.ingest import ingest


@dataclass(frozen=True)
class SubsetConfig:
    """Write a new store with some of the cells or features of one; the counts are checked and shuffled again."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to take them from, which stays as it is; embeddings are not taken over."""
    out: Path
    """Store to write."""
    where: Annotated[str | None, tyro.conf.arg(metavar="EXPRESSION")] = None
    """Cells to keep, an expression over obs columns as pandas takes it: "tissue == 'blood' and n_counts > 500"."""
    features: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Text file with the features to keep, a name on each line; a modality of which none is named keeps all."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "1GiB"
    """Memory for chunks and shuffling; the peak does not grow with the number of cells."""
    seed: int = 0
    """Seed of the global shuffle."""
    overwrite: bool = False
    """Replace `out` if it exists."""

    def __post_init__(self) -> None:
        if self.where is None and self.features is None:
            raise ValueError("--where, --features: got neither; name the cells or the features to keep")


def subset(config: SubsetConfig) -> None:
    """Make the store and print what it holds."""
    names = None if config.features is None else names_in(config.features)
    options = {key: value for key, value in vars(config).items() if key not in ("store", "features")}
    print(described(config.out, ingest(config.store, **options, features=names)))


main = Command(SubsetConfig, subset, prog="liam-scale subset", description="Some cells or features -> a new store.")

if __name__ == "__main__":
    sys.exit(main())
