"""Merge: `liam-scale merge site1.zarr site2.zarr --out atlas.zarr` makes one store of several."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from liam_scale.command import Command
from liam_scale.ingest import described
from loaders.ingest import merge


@dataclass(frozen=True)
class MergeConfig:
    """Make one store of several that ingest made; what fits is linked, not copied, and they stay as they are."""

    stores: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STORE ...")]
    """Stores to merge; embeddings are left out."""
    out: Path
    """Store to write."""
    join: Literal["inner", "outer"] = "inner"
    """Features kept where the stores differ: those of all, or those of any."""
    ignore_genome: bool = False
    """Take peaks together though the stores name different genomes in var, which else are refused."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "1GiB"
    """Memory of a reshuffle."""
    seed: int = 0
    """Seed of a reshuffle."""
    reshuffle: bool = False
    """Write all cells in one random order, instead of mixing those of the stores at reading."""
    overwrite: bool = False
    """Replace `out` if it exists."""


def _merge(config: MergeConfig) -> None:
    print(described(config.out, merge(**vars(config))))


main = Command(MergeConfig, _merge, prog="liam-scale merge", description="Stores -> one store.")

if __name__ == "__main__":
    sys.exit(main())
