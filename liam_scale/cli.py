"""The `liam-scale` command: one word for each thing a user does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro

from liam_scale.command import parse, run

COMMANDS = {
    "ingest": ("liam_scale.cli", "ingest_main", "source files -> one shuffled, checked store"),
    "train": (
        "liam_scale.train",
        "main",
        "store -> trained model (for several processes: torchrun -m liam_scale.train)",
    ),
    "embed": ("liam_scale.embed", "main", "trained model -> obsm['X_liam'] of the store"),
    "decode": ("liam_scale.decode", "main", "trained model -> normalised expression, accessibility, protein"),
    "map": ("liam_scale.map", "main", "cells of new samples -> the embedding of a trained model"),
    "evaluate": ("liam_scale.evaluate", "main", "embedding -> table of metrics and pictures"),
    "demo": ("liam_scale.demo", "main", "all of it on a small data set that comes with the package"),
}


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
    debug: bool = False
    """Show the traceback of an error."""


def ingest_main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        IngestConfig, argv, prog="liam-scale ingest", description="Source files -> one store.", positional="sources"
    )
    return run(lambda: _ingest(config), debug=config.debug)


def _ingest(config: IngestConfig) -> None:
    from loaders.ingest import ingest

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


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: liam-scale COMMAND [OPTIONS]",
            "",
            "Integrate multimodal single-cell data that does not fit in memory.",
            "",
            "commands:",
            *lines,
            "",
            "liam-scale COMMAND --help shows the options of a command; --version the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"liam-scale {version('liam-scale')}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: command: got {arguments[0]!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[arguments[0]]
    return int(getattr(importlib.import_module(module), function)(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
