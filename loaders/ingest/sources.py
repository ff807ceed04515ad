"""The sources of an ingest: which cells and modalities a file holds, whatever its format.

h5ad, h5mu and AnnData/MuData Zarr are told apart by what they contain, not by their names; the 10x form is in tenx.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from loaders.ingest.checks import check_unique
from loaders.ingest.frames import Frame, ObsTable, View
from loaders.ingest.matrices import Matrix, open_matrix
from loaders.ingest.parts import Part, Say, Source, modality_of, split_by_type
from loaders.ingest.tenx import is_tenx, open_tenx
from loaders.schema import MODALITIES

_INTERVAL = re.compile(r"^[\w.]+[:\-_]\d+[\-_]\d+$")
"""Genomic intervals such as chr1:100-600, the usual names of peaks."""


def open_source(text: str, *, layer: str | None, files: ExitStack, say: Say) -> Source:
    """Open a source: a path, `modality=path`, or several of the latter joined by commas for one set of cells.

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
    if Path(text).exists() or "=" not in text:
        return _open_one(Path(text), None, layer, files, say)
    named: dict[str, Path] = {}
    for item in text.split(","):
        key, _, path = item.partition("=")
        modality = modality_of(key)
        if modality is None or not path:
            raise ValueError(
                f"source {text!r}: got {item!r}, expected modality=path with one of {', '.join(MODALITIES)}, "
                "for example rna=a.h5ad,atac=b.h5ad"
            )
        if modality in named:
            raise ValueError(
                f"source {text!r}: {modality} is named twice; give samples in separate files as sources of their own"
            )
        named[modality] = Path(path)
    opened = {name: _open_one(path, name, layer, files, say) for name, path in named.items()}
    return next(iter(opened.values())) if len(opened) == 1 else _pair(text, opened, say)


def _open_one(path: Path, modality: str | None, layer: str | None, files: ExitStack, say: Say) -> Source:
    root = _open_file(path, files)
    if "mod" in root:
        source = _open_mudata(path, root, layer, say)
        if modality is None:
            return source
        if modality not in source.parts:
            raise ValueError(
                f"{path}: {modality} was asked for, the file has {', '.join(source.parts)}; name one of them"
            )
        return _only(source, modality)
    if is_tenx(root):
        if layer is not None:
            raise ValueError(f"{path}: --layer {layer} was given, a 10x file has no layers; leave the option out")
        source = open_tenx(path, root, say)
        return source if modality is None else _only(source, modality)
    if "obs" in root and "var" in root:
        return _open_anndata(path, root, modality, layer, say)
    raise ValueError(
        f"{path}: got a file with {', '.join(sorted(root)) or 'nothing'} at its top, expected an AnnData (obs, var, "
        "X), a MuData "
        "(mod) or a 10x matrix; convert it with anndata or mudata"
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
    return files.enter_context(h5py.File(path, "r"))


def _counts_of(path: Path, group: Any, at: str, layer: str | None) -> tuple[Matrix, Frame, tuple[str, ...]]:
    """The matrix that holds the counts, its var, and the names of the others."""
    layers = tuple(group["layers"].keys()) if "layers" in group else ()
    known = (*layers, *(("raw",) if "raw" in group and "raw" not in layers else ()))
    var = Frame(group["var"])
    if layer is None or layer == "X":
        if "X" not in group:
            raise ValueError(
                f"{path}: {at or 'the file'} has no X; name a layer with --layer (it has {', '.join(known) or 'none'})"
            )
        return open_matrix(group["X"], f"{path}: {at}X"), var, known
    if layer in layers:
        others = ("X", *(name for name in known if name != layer))
        return open_matrix(group["layers"][layer], f"{path}: {at}layers/{layer}"), var, others
    if layer in known:
        return open_matrix(group["raw"]["X"], f"{path}: {at}raw/X"), Frame(group["raw"]["var"]), ("X", *layers)
    raise ValueError(
        f"--layer: {path} has no layer {layer!r}{f' in {at[4:-1]}' if at else ''}; it has {', '.join(('X', *known))}: "
        "name one of them"
    )


def _check_shape(matrix: Matrix, num_cells: int, num_features: int) -> None:
    if (matrix.num_rows, matrix.num_features) != (num_cells, num_features):
        raise ValueError(
            f"{matrix.where}: got a matrix of {matrix.num_rows} x {matrix.num_features}, obs and var have {num_cells} "
            "and "
            f"{num_features} rows; the file is damaged or was written wrongly: write it again from its source"
        )


def _cell_index(where: str, frame: Frame) -> npt.NDArray[Any]:
    ids = frame.index()
    check_unique(
        f"{where}: cell ids", pd.Index(ids.astype(object)), "call obs_names_make_unique() and save the file again"
    )
    return ids


def _open_anndata(path: Path, root: Any, modality: str | None, layer: str | None, say: Say) -> Source:
    obs = Frame(root["obs"])
    ids = _cell_index(str(path), obs)
    matrix, var_frame, layers = _counts_of(path, root, "", layer)
    var = var_frame.whole()
    _check_shape(matrix, len(ids), len(var))
    types = var["feature_types"].astype(str).to_numpy() if "feature_types" in var else None
    if modality is not None and (types is None or len(set(types)) == 1):
        parts = {modality: Part(modality, matrix, var, layers=layers)}
    elif types is not None:
        parts = split_by_type(path, matrix, var, types, layers, say)
        if modality is not None and modality not in parts:
            raise ValueError(
                f"{path}: {modality} was asked for, var['feature_types'] has {', '.join(sorted(set(types)))}"
            )
        parts = parts if modality is None else {modality: parts[modality]}
    else:
        guessed = _guess_modality(path, var.index, say)
        parts = {guessed: Part(guessed, matrix, var, layers=layers)}
    return Source(str(path), (path,), ids, parts, ObsTable(View(obs, None), {}))


def _guess_modality(path: Path, names: pd.Index, say: Say) -> str:
    share = float(np.mean([bool(_INTERVAL.match(str(name))) for name in names])) if len(names) else 0.0
    if 0.05 < share < 0.95:
        raise ValueError(
            f"{path}: {share:.0%} of the features are named like peaks (chr1:100-600) and nothing says which modality "
            "they are; "
            "add var['feature_types'] ('Gene Expression', 'Peaks', 'Antibody Capture') or give one file per modality: "
            "rna=a.h5ad,atac=b.h5ad"
        )
    modality, why = (
        ("atac", "its features are named like peaks") if share >= 0.95 else ("rna", "nothing says otherwise")
    )
    say(
        f"{path}: taken as {modality} ({why}); write {modality}={path.name} or another modality before the path to "
        "decide"
    )
    return modality


def _open_mudata(path: Path, root: Any, layer: str | None, say: Say) -> Source:
    axis = int(root.attrs.get("axis", 0))
    if axis != 0:
        raise ValueError(
            f"{path}: a MuData with axis {axis}, expected 0 (modalities share cells); split it by axis first"
        )
    obs = Frame(root["obs"])
    ids = _cell_index(str(path), obs)
    parts: dict[str, Part] = {}
    views: dict[str, View] = {}
    aliases: dict[str, str] = {}
    for key in root["mod"]:
        modality = modality_of(key)
        if modality is None:
            say(f"{path}: modality {key!r} is left out; known are {', '.join(MODALITIES)}")
            continue
        if modality in parts:
            raise ValueError(
                f"{path}: modalities {aliases[modality]!r} and {key!r} both mean {modality}; remove one of them"
            )
        group = root["mod"][key]
        frame = Frame(group["obs"])
        own = _cell_index(f"{path}: modality {key}", frame)
        matrix, var, layers = _counts_of(path, group, f"mod/{key}/", layer)
        whole = var.whole()
        _check_shape(matrix, len(own), len(whole))
        rows = _rows_by_cell(path, key, ids, own, root["obsmap"][key][:] if key in root.get("obsmap", ()) else None)
        parts[modality] = Part(modality, matrix, whole, None, rows, layers)
        views[modality] = View(frame, rows)
        aliases[modality] = key
    if not parts:
        raise ValueError(
            f"{path}: got modalities {', '.join(root['mod'])}, expected some of {', '.join(MODALITIES)}; rename them"
        )
    parts = {name: parts[name] for name in MODALITIES if name in parts}
    return Source(str(path), (path,), ids, parts, ObsTable(View(obs, None), views, tuple(aliases.values())))


def _rows_by_cell(
    path: Path, key: str, ids: npt.NDArray[Any], own: npt.NDArray[Any], obsmap: npt.NDArray[Any] | None
) -> npt.NDArray[np.int64] | None:
    """Row of each cell in a modality; checked against the names of both."""
    if len(own) == len(ids) and (own == ids).all():
        return None
    rows = pd.Index(own.astype(object)).get_indexer(pd.Index(ids.astype(object))).astype(np.int64)
    lost = len(own) - int((rows >= 0).sum())
    if lost:
        stray = own[~np.isin(np.arange(len(own)), rows)][0]
        raise ValueError(
            f"{path}: modality {key} has {lost} cells that the common obs does not have, for example {str(stray)!r}; "
            "call update() on the MuData and save it again"
        )
    if obsmap is not None and not np.array_equal(np.ravel(obsmap).astype(np.int64) - 1, rows):
        cell = int(np.flatnonzero(np.ravel(obsmap).astype(np.int64) - 1 != rows)[0])
        raise ValueError(
            f"{path}: obsmap/{key} sends cell {str(ids[cell])!r} to row {int(np.ravel(obsmap)[cell]) - 1}, by its "
            "name it is row "
            f"{int(rows[cell])} (-1: absent); the modalities are not aligned: call update() on the MuData and save it "
            "again"
        )
    return rows


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
            "to one form, or "
            "give the files as separate sources if they hold different cells"
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
