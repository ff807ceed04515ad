"""The sources that a user names: paths, addresses, and files of one modality each that are paired by cell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from loaders.formats.frame import Frame, ObsTable, View
from loaders.formats.root import is_soma, open_root
from loaders.formats.scverse import open_group
from loaders.formats.soma import SomaExperiment
from loaders.formats.source import Say, Source
from loaders.modalities import PRESETS, Kinds, modality_of, ordered, saying


@dataclass(frozen=True)
class Named:
    """What a user named as one source."""

    text: str
    files: Mapping[str | None, str]
    """Path by modality; under None that of a file whose modalities are its own affair."""
    sample: str | None = None
    """The sample of all its cells."""
    kinds: Kinds = field(default_factory=lambda: PRESETS)
    """What its modalities may be."""

    def absolute(self) -> Named:
        """The same for a process in another folder."""
        paths = {key: path if "://" in path else os.path.abspath(path) for key, path in self.files.items()}
        return replace(self, files=paths)


def parse_source(text: str, kinds: Kinds = PRESETS) -> Named:
    """Read what a user wrote: a path, `modality=path`, or several of the latter joined by commas for one set of cells.

    Before any of these, `NAME=` names the sample of its cells, where NAME is no modality's.
    """
    before, _, after = text.partition("=")
    if Path(text).exists() or not after or re.search(r"[/\\,]", before):
        return Named(text, {None: text}, kinds=kinds)
    is_paired = "," not in after or modality_of(after.partition("=")[0], kinds) is not None
    if modality_of(before, kinds) is None and is_paired:
        return replace(parse_source(after, kinds), sample=before)
    named: dict[str | None, str] = {}
    for item in text.split(","):
        key, _, path = item.partition("=")
        modality = modality_of(key, kinds)
        if modality is None or not path:
            raise ValueError(
                f"source {text!r}: got {item!r}, expected modality=path with one of {', '.join(ordered(kinds))}, for"
                f" example rna=a.h5ad,atac=b.h5ad; of another one, {saying(key)}"
            )
        if modality in named:
            raise ValueError(
                f"source {text!r}: {modality} is named twice; give samples in separate files as sources of their own"
            )
        named[modality] = path
    return Named(text, named, kinds=kinds)


def open_source(named: Named, *, layer: str | None, files: ExitStack, say: Say) -> Source:
    """Open a source.

    Parameters
    ----------
    layer
        Layer that holds the counts ("raw" also means `.raw`); None: X.
    files
        Closes the files.
    say
        Takes remarks on what was assumed.
    """
    opened = {name: _open_one(path, name, layer, named.kinds, files, say) for name, path in named.files.items()}
    source = next(iter(opened.values()))
    if len(opened) > 1:
        source = _pair(named.text, {str(name): one for name, one in opened.items()}, say)
    return source if named.sample is None else replace(source, sample=named.sample)


def _open_one(text: str, modality: str | None, layer: str | None, kinds: Kinds, files: ExitStack, say: Say) -> Source:
    if is_soma(text):
        experiment = files.enter_context(SomaExperiment(text, layer=layer, kinds=kinds, say=say))
        return experiment.source if modality is None else experiment.source.only(modality)
    root = open_root(text)
    if isinstance(root, h5py.File):
        files.enter_context(root)
    path = Path(text.rstrip("/").rpartition("/")[2] if "://" in text else text)
    return open_group(root, text, path, modality=modality, layer=layer, kinds=kinds, say=say)


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
        parts[modality] = replace(part, rows=in_matrix)
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
