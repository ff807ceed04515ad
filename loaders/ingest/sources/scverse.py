"""AnnData and MuData in HDF5 or Zarr: their cells, modalities, layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.ingest.checks import check_unique
from loaders.ingest.sources.frames import Frame, ObsTable, View
from loaders.ingest.sources.matrices import Matrix, open_matrix
from loaders.ingest.sources.parts import Part, Say, Source, split_by_type
from loaders.schema import MODALITIES
from loaders.stores.modalities import modality_of

_INTERVAL = re.compile(r"^[\w.]+[:\-_]\d+[\-_]\d+$")
"""Genomic intervals such as chr1:100-600, the usual names of peaks."""


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
            f"and {num_features} rows; the file is damaged or was written wrongly: write it again from its source"
        )


def _cell_index(where: str, frame: Frame) -> npt.NDArray[Any]:
    ids = frame.index()
    check_unique(
        f"{where}: cell ids", pd.Index(ids.astype(object)), "call obs_names_make_unique() and save the file again"
    )
    return ids


def open_anndata(path: Path, root: Any, modality: str | None, layer: str | None, say: Say) -> Source:
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
            "they are; add var['feature_types'] ('Gene Expression', 'Peaks', 'Antibody Capture') or give one file "
            "per modality: rna=a.h5ad,atac=b.h5ad"
        )
    modality, why = (
        ("atac", "its features are named like peaks") if share >= 0.95 else ("rna", "nothing says otherwise")
    )
    say(
        f"{path}: taken as {modality} ({why}); write {modality}={path.name} or another modality before the path to "
        "decide"
    )
    return modality


def open_mudata(path: Path, root: Any, layer: str | None, say: Say) -> Source:
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
            f"name it is row {int(rows[cell])} (-1: absent); the modalities are not aligned: call update() on the "
            "MuData and save it again"
        )
    return rows
