"""Ingest: `liam-scale ingest donor1.h5mu donor2.h5mu --out atlas.zarr` makes one store of source files."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from liam_scale.columns import is_unusual, possible_keys
from liam_scale.command import Answer, Command
from liam_scale.tables import names_in
from loaders.ingest import ingest
from loaders.modalities import PRESETS
from loaders.schema import Schema
from loaders.stores import open_store


@dataclass(frozen=True)
class IngestConfig:
    """Read source files, check their counts, shuffle the cells, write one store."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """h5ad, h5mu, 10x .h5, AnnData or MuData Zarr, SOMA experiment; `rna=a.h5ad,atac=b.h5ad` pairs files by cell,
    `NAME=a.h5ad` names the sample."""
    out: Path
    """Store to write, e.g. atlas.zarr."""
    sample_key: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column that becomes `sample`; default: the column `sample`, else the name of each file."""
    sample_from_file: bool = False
    """Each file's name becomes `sample`, even where the files have such a column."""
    join: Literal["inner", "outer"] = "inner"
    """Features kept when several sources differ: those of all, or those of any."""
    peaks: Annotated[str, tyro.conf.arg(metavar="names|union|reference|PATH")] = "names"
    """How peaks (ATAC, and NM modalities whose features all name intervals) are matched: by name; or by overlap:
    overlapping peaks are one (union), or counts go to those of the first source (reference), a store or a BED file."""
    ignore_genome: bool = False
    """Take peaks together though their sources name different genomes in var, which else are refused."""
    feature_key: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Column of var by which genes and proteins are called, such as gene_ids; versions (ENSG00000141510.17) go."""
    modality: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=NM|NB ...")] = ()
    """What modalities of other names are: `h3k27ac=NM` (negative multinomial, as peaks), `hto=NB` (negative binomial,
    as RNA), `hto=NB:clr` with the transform that encoders read (none, log1p, clr)."""
    layer: str | None = None
    """Layer that holds the counts; default: X."""
    where: Annotated[str | None, tyro.conf.arg(metavar="EXPRESSION")] = None
    """Cells to keep, an expression over obs columns as pandas takes it: "tissue == 'blood' and n_counts > 500"."""
    features: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Text file with the features to keep, a name on each line; a modality of which none is named keeps all."""
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "1GiB"
    """Memory for chunks and shuffling, of each process that works; the peak does not grow with the number of cells."""
    seed: int = 0
    """Seed of the global shuffle."""
    overwrite: bool = False
    """Replace `out` if it exists."""
    dask: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
    """Workers of a Dask cluster do the work: `tcp://host:8786` of its scheduler, or `local:2` for 2 processes of this
    machine; default: threads of this process."""
    resume: Literal["auto", "never"] = "auto"
    """Go on with what a killed ingest of the same counts left beside `out`, or start anew."""


def _ingest(config: IngestConfig) -> Answer:
    if not config.sources:
        raise ValueError("sources: got none; name at least one file, e.g. a.h5mu")
    features = None if config.features is None else names_in(config.features)
    schema = ingest(**{**vars(config), "features": features})
    following, remark = _next_command(config.out)
    names = ("modalities", "obs_columns", "is_shuffled")
    document = {"uri": config.out, "cells": schema.num_cells, **{name: getattr(schema, name) for name in names}}
    text = f"{described(config.out, schema)}\nnext: {following}{remark}"
    return Answer(text, {**document, "next": following})


def described(out: Path, schema: Schema) -> str:
    """What was written."""
    lines = [f"wrote {out}: {schema.num_cells:,} cells"]
    for m in schema.modalities.values():
        lines.append(
            f"  {m.name}: {m.num_cells:,} cells x {m.num_features:,} features, "
            f"{m.nonzeros_per_cell:,.0f} non-zeros a cell, {m.value_dtype}{'' if m.name in PRESETS else f', {m.kind}'}"
        )
    return "\n".join([*lines, f"  obs: {', '.join(schema.obs_columns)}"])


def _next_command(out: Path) -> tuple[str, str]:
    """How to train, with the batch key that the store suggests, and a remark."""
    store = open_store(out)
    keys = ["sample"]
    if len(store.obs_column("sample").categories) < 2:
        keys = [name for name in possible_keys(store) if not is_unusual(name)]
    chosen = f" --batch-key {shlex.quote(keys[0])}" if keys else ""
    remark = "" if keys else "\n  (sample has one value; --batch-key would name the obs column whose effect to remove)"
    return f"liam-scale train {shlex.quote(str(out))}{chosen} --out runs/a", remark


main = Command(IngestConfig, _ingest, prog="liam-scale ingest", description="Source files -> one store.", answers=True)

if __name__ == "__main__":
    sys.exit(main())
