"""Opens a source of an ingest, told apart by what it contains and not by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr

from loaders.ingest.sources.frames import Frame, ObsTable, View
from loaders.ingest.sources.parts import Part, Say, Source
from loaders.ingest.sources.scverse import open_anndata, open_mudata
from loaders.ingest.sources.streamed import is_streamed, open_streamed
from loaders.ingest.sources.tenx import is_tenx, open_tenx
from loaders.schema import MODALITIES
from loaders.stores.modalities import modality_of


def open_source(text: str, *, layer: str | None, files: ExitStack, say: Say) -> Source:
    """Open a source: a path, `modality=path`, or several of the latter joined by commas for one set of cells.

    Before any of these, `NAME=` names the sample of its cells, where NAME is no modality's.

    Parameters
    ----------
    text
        What the user gave.
    layer
        Layer that holds the counts ("raw" also means `.raw`); None: X.
    files
        Closes the files.
    say
        Takes remarks on what was assumed.
    """
    before, _, after = text.partition("=")
    if Path(text).exists() or not after or re.search(r"[/\\,]", before):
        return _open_one(text, None, layer, files, say)
    if modality_of(before) is None and ("," not in after or modality_of(after.partition("=")[0]) is not None):
        return replace(open_source(after, layer=layer, files=files, say=say), sample=before)
    named: dict[str, str] = {}
    for item in text.split(","):
        key, _, path = item.partition("=")
        modality = modality_of(key)
        if modality is None or not path:
            raise ValueError(
                f"source {text!r}: got {item!r}, expected modality=path with one of {', '.join(MODALITIES)}, for "
                "example rna=a.h5ad,atac=b.h5ad"
            )
        if modality in named:
            raise ValueError(
                f"source {text!r}: {modality} is named twice; give samples in separate files as sources of their own"
            )
        named[modality] = path
    opened = {name: _open_one(path, name, layer, files, say) for name, path in named.items()}
    return next(iter(opened.values())) if len(opened) == 1 else _pair(text, opened, say)


def _open_one(text: str, modality: str | None, layer: str | None, files: ExitStack, say: Say) -> Source:
    if is_streamed(text):
        source = open_streamed(text, layer, files)
        return source if modality is None else _only(source, modality)
    path = Path(text)
    root = _open_file(path, files)
    if "mod" in root:
        source = open_mudata(path, root, layer, say)
        return source if modality is None else _only(source, modality)
    if is_tenx(root):
        if layer is not None:
            raise ValueError(f"{path}: --layer {layer} was given, a 10x file has no layers; leave the option out")
        source = open_tenx(path, root, say)
        return source if modality is None else _only(source, modality)
    if "obs" in root and "var" in root:
        return open_anndata(path, root, modality, layer, say)
    raise ValueError(
        f"{path}: got a file with {', '.join(sorted(root)) or 'nothing'} at its top, expected an AnnData (obs, var, "
        "X), a MuData (mod) or a 10x matrix; convert it with anndata or mudata"
    )


def _open_file(path: Path, files: ExitStack) -> Any:
    if not path.exists():
        raise ValueError(f"source: {path} does not exist; check the path")
    if path.is_dir():
        try:
            return zarr.open_group(str(path), mode="r")
        except (FileNotFoundError, zarr.errors.BaseZarrError, ValueError) as error:
            raise ValueError(
                f"{path}: the folder is no Zarr group ({error}); give an .h5ad, .h5mu, 10x .h5 or .zarr"
            ) from error
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path}: not an HDF5 file; give an .h5ad, .h5mu, 10x .h5 or .zarr (uncompressed, complete)")
    try:
        return files.enter_context(h5py.File(path, "r"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error}); copy or download the file again") from error


def _only(source: Source, modality: str) -> Source:
    """A source without its other modalities; its cells stay."""
    if modality not in source.parts:
        raise ValueError(
            f"{source.label}: {modality} was asked for, the file has {', '.join(source.parts)}; name one of them"
        )
    part = source.parts[modality]
    return Source(source.label, source.paths, source.cell_ids, {modality: part}, source.obs)


def _pair(text: str, opened: Mapping[str, Source], say: Say) -> Source:
    """One source of files that hold a modality each; cells are the same where their names are."""
    names = pd.Index([], dtype=object)
    for source in opened.values():
        own = pd.Index(source.cell_ids.astype(object))
        names = names.append(own[~own.isin(names)])
    total = sum(len(source.cell_ids) for source in opened.values())
    if len(names) == total:
        examples = " and ".join(repr(str(source.cell_ids[0])) for source in opened.values() if len(source.cell_ids))
        raise ValueError(
            f"source {text!r}: no cell is in more than one of the files (for example {examples}); bring the cell ids "
            "to one form, or give the files as separate sources if they hold different cells"
        )
    parts, views = {}, {}
    for modality, source in opened.items():
        rows = pd.Index(source.cell_ids.astype(object)).get_indexer(names).astype(np.int64)
        part = source.parts[modality]
        absent = int((rows < 0).sum())
        if absent:
            say(f"{text}: {absent} of {len(names)} cells have no {modality}")
        in_matrix = rows if part.rows is None else np.where(rows >= 0, part.rows[rows], -1)
        parts[modality] = Part(modality, part.matrix, part.var, part.columns, in_matrix, part.layers)
        views[modality] = source.obs, rows
    paths = tuple(path for source in opened.values() for path in source.paths)
    ids = np.asarray(names.to_numpy(), dtype=object).astype(np.dtypes.StringDType())
    obs = ObsTable(None, {name: View(_TableFrame(table), rows) for name, (table, rows) in views.items()})
    return Source(text, paths, ids, parts, obs)


class _TableFrame(Frame):
    """The obs of a whole source, read like a frame."""

    def __init__(self, table: ObsTable) -> None:
        self._table = table

    @property
    def columns(self) -> list[str]:
        return self._table.columns

    def column(self, name: str) -> pd.Series:
        return self._table.column(name)
