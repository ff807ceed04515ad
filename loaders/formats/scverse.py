"""AnnData, MuData and the 10x matrix, in HDF5, Zarr or memory, told apart by what they contain: one rule for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import anndata
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders import intervals
from loaders.formats.compressed import CompressedRows
from loaders.formats.elements import open_matrix
from loaders.formats.frame import Frame, ObsTable, View, read_strings
from loaders.formats.matrix import StoredMatrix
from loaders.formats.root import check_foreign, not_a_store, reading
from loaders.formats.source import Part, Say, Source, split_by_type
from loaders.modalities import PRESETS, Kind, Kinds, agreed, check_modality, modality_of, ordered, saying
from loaders.schema import SCHEMA_KEY, check_unique


class HeldGroup(dict[str, Any]):
    """An AnnData or MuData in memory, taken apart as a file of it would be."""

    def __init__(self, data: anndata.AnnData | mudata.MuData) -> None:
        super().__init__(obs=data.obs)
        self.attrs = {"axis": getattr(data, "axis", 0)}
        if isinstance(data, mudata.MuData):
            self["mod"] = {name: HeldGroup(part) for name, part in data.mod.items()}
            return
        self.update(var=data.var, layers=data.layers)
        if data.X is not None:
            self["X"] = data.X
        if data.raw is not None:
            self["raw"] = {"X": data.raw.X, "var": data.raw.var}


def _layers_of(group: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the layers, and of all matrices besides X: "raw" also means AnnData's raw."""
    layers = tuple(group["layers"].keys()) if "layers" in group else ()
    # anndata writes a raw that is None too.
    has_raw = "raw" in group and hasattr(group["raw"], "keys") and "raw" not in layers
    return layers, (*layers, "raw") if has_raw else layers


def _counts_of(
    label: str, group: Any, at: str, layer: str | None, cells: npt.NDArray[np.int64] | None = None
) -> tuple[StoredMatrix, Frame, tuple[str, ...]]:
    """The matrix that holds the counts, its var, and the names of the others."""
    layers, known = _layers_of(group)
    var = Frame(group["var"], label)
    if layer is None or layer == "X":
        if "X" not in group:
            raise ValueError(
                f"{label}: {at or 'the file'} has no X; name the layer that holds the counts (it has "
                f"{', '.join(known) or 'none'})"
            )
        return open_matrix(group["X"], f"{label}: {at}X", cells=cells), var, known
    if layer in layers:
        others = ("X", *(name for name in known if name != layer))
        return open_matrix(group["layers"][layer], f"{label}: {at}layers/{layer}", cells=cells), var, others
    if layer in known:
        raw = group["raw"]
        return open_matrix(raw["X"], f"{label}: {at}raw/X", cells=cells), Frame(raw["var"], label), ("X", *layers)
    raise ValueError(
        f"layer: {label} has no layer {layer!r}{f' in {at[4:-1]}' if at else ''}; it has {', '.join(('X', *known))}: "
        "name one of them"
    )


def _check_shape(matrix: StoredMatrix, num_cells: int, num_features: int) -> None:
    if (matrix.num_rows, matrix.num_features) != (num_cells, num_features):
        raise ValueError(
            f"{matrix.where}: got a matrix of {matrix.num_rows} x {matrix.num_features}, obs and var have {num_cells} "
            f"and {num_features} rows; the file is damaged or was written wrongly: write it again from its source"
        )


def _cell_index(where: str, frame: Frame) -> npt.NDArray[Any]:
    ids = frame.index()
    check_unique(f"{where}: cell ids", pd.Index(ids.astype(object)), "call obs_names_make_unique() and save it again")
    return ids


def open_anndata(
    label: str, path: Path, root: Any, *, modality: str | None, layer: str | None, kinds: Kinds, say: Say
) -> Source:
    """An AnnData: one modality, several where var["feature_types"] says so, or none where it holds no matrix at all."""
    obs = Frame(root["obs"], label)
    ids = _cell_index(label, obs)
    if modality is None and layer is None and "X" not in root and not _layers_of(root)[1]:
        return Source(label, (path,), ids, {}, ObsTable(View(obs, None), {}))
    matrix, var_frame, layers = _counts_of(label, root, "", layer)
    var = var_frame.whole()
    _check_shape(matrix, len(ids), len(var))
    types = var["feature_types"].astype(str).to_numpy() if "feature_types" in var else None
    if modality is not None and (types is None or len(set(types)) == 1):
        parts = {modality: Part(modality, kinds[modality], matrix, var, layers=layers)}
    elif types is not None:
        parts = split_by_type(label, matrix, var, types, layers, kinds=kinds, say=say)
        if modality is not None and modality not in parts:
            raise ValueError(
                f"{label}: {modality} was asked for, var['feature_types'] has {', '.join(sorted(set(types)))}"
            )
        parts = parts if modality is None else {modality: parts[modality]}
    else:
        guessed = _guess_modality(label, var.index, say)
        parts = {guessed: Part(guessed, kinds[guessed], matrix, var, layers=layers)}
    return Source(label, (path,), ids, parts, ObsTable(View(obs, None), {}))


def _guess_modality(label: str, names: pd.Index, say: Say) -> str:
    share = float(np.mean([bool(intervals.NAME.match(str(name))) for name in names])) if len(names) else 0.0
    if 0.05 < share < 0.95:
        raise ValueError(
            f"{label}: {share:.0%} of the features are named like peaks (chr1:100-600) and nothing says which modality "
            "they are; add var['feature_types'] ('Gene Expression', 'Peaks', 'Antibody Capture') or give one file "
            "per modality: rna=a.h5ad,atac=b.h5ad"
        )
    modality, why = (
        ("atac", "its features are named like peaks") if share >= 0.95 else ("rna", "nothing says otherwise")
    )
    say(
        f"{label}: taken as {modality} ({why}); write {modality}=PATH or another modality before the path of an ingest,"
        f" or open it with modality=, to decide"
    )
    return modality


def open_mudata(label: str, path: Path, root: Any, *, layer: str | None, kinds: Kinds, say: Say) -> Source:
    """A MuData: cells that may lack modalities."""
    axis = int(root.attrs.get("axis", 0))
    if axis != 0:
        raise ValueError(
            f"{label}: a MuData with axis {axis}, expected 0 (modalities share cells); split it by axis first"
        )
    obs = Frame(root["obs"], label)
    ids = _cell_index(label, obs)
    found: dict[str, tuple[str, Part, View]] = {}
    for key in _modality_keys(root["mod"]):
        modality = modality_of(key, kinds)
        if modality is None:
            known = ", ".join(ordered(kinds))
            say(f"{label}: modality {key!r} is left out; known are {known}; to take it, {saying(key)}")
            continue
        if modality in found:
            raise ValueError(
                f"{label}: modalities {found[modality][0]!r} and {key!r} both mean {modality}; remove one of them"
            )
        group = root["mod"][key]
        frame = Frame(group["obs"], label)
        own = _cell_index(f"{label}: modality {key}", frame)
        rows = _rows_by_cell(label, key, ids, own, root["obsmap"][key][:] if key in root.get("obsmap", ()) else None)
        matrix, var, layers = _counts_of(label, group, f"mod/{key}/", layer, rows)
        whole = var.whole()
        _check_shape(matrix, len(own), len(whole))
        found[modality] = key, Part(modality, kinds[modality], matrix, whole, None, rows, layers), View(frame, rows)
    if not found:
        there = _modality_keys(root["mod"])
        raise ValueError(
            f"{label}: got modalities {', '.join(there)}, expected some of {', '.join(ordered(kinds))}; rename them, or"
            f" {saying(there[0] if there else '')}"
        )
    views = {name: view for name, (_, _, view) in found.items()}
    parts = {name: found[name][1] for name in ordered(found)}
    return Source(
        label, (path,), ids, parts, ObsTable(View(obs, None), views, tuple(key for key, _, _ in found.values()))
    )


def _modality_keys(mod: Any) -> list[str]:
    """Names of the modalities; those of the attribute, where there is one: a server may not list folders."""
    order = getattr(mod, "attrs", {}).get("mod-order", None)
    return [str(name) for name in (mod if order is None else order)]


def _rows_by_cell(
    label: str, key: str, ids: npt.NDArray[Any], own: npt.NDArray[Any], obsmap: npt.NDArray[Any] | None
) -> npt.NDArray[np.int64] | None:
    """Row of each cell in a modality; checked against the names of both."""
    if len(own) == len(ids) and (own == ids).all():
        return None
    rows = pd.Index(own.astype(object)).get_indexer(pd.Index(ids.astype(object))).astype(np.int64)
    lost = len(own) - int((rows >= 0).sum())
    if lost:
        stray = own[~np.isin(np.arange(len(own)), rows)][0]
        raise ValueError(
            f"{label}: modality {key} has {lost} cells that the common obs does not have, for example {str(stray)!r}; "
            "call update() on the MuData and save it again"
        )
    if obsmap is not None and not np.array_equal(np.ravel(obsmap).astype(np.int64) - 1, rows):
        cell = int(np.flatnonzero(np.ravel(obsmap).astype(np.int64) - 1 != rows)[0])
        raise ValueError(
            f"{label}: obsmap/{key} sends cell {str(ids[cell])!r} to row {int(np.ravel(obsmap)[cell]) - 1}, by its "
            f"name it is row {int(rows[cell])} (-1: absent); the modalities are not aligned: call update() on the "
            "MuData and save it again"
        )
    return rows


def is_tenx(root: Any) -> bool:
    """Whether an open HDF5 file is a 10x matrix, of whatever version."""
    return "matrix" in root or any("barcodes" in root[key] for key in root if hasattr(root[key], "keys"))


def open_tenx(label: str, path: Path, root: Any, *, kinds: Kinds, say: Say) -> Source:
    """The cells and modalities of a 10x file; feature names repeated in it get -1, -2, ... as scanpy gives them."""
    if "matrix" not in root or "features" not in root["matrix"]:
        raise ValueError(
            f"{label}: a 10x matrix of Cell Ranger 2 or older (no matrix/features); read it with scanpy.read_10x_h5 "
            "and save an .h5ad"
        )
    group = root["matrix"]
    features = group["features"]
    ids = read_strings(group["barcodes"])
    check_unique(
        f"{label}: barcodes", pd.Index(ids.astype(object)), "the file is damaged: write it again with Cell Ranger"
    )
    names = _make_unique(label, read_strings(features["name"]).astype(object), say)
    columns = {"gene_ids": read_strings(features["id"]).astype(object)}
    for key in ("feature_type", "genome", "interval"):
        if key in features and features[key].shape == features["name"].shape:
            columns["feature_types" if key == "feature_type" else key] = read_strings(features[key]).astype(object)
    num_features, num_cells = (int(n) for n in group["shape"][:])
    if (num_features, num_cells) != (len(names), len(ids)):
        raise ValueError(
            f"{label}: matrix/shape is {num_features} x {num_cells}, the file names {len(names)} features and "
            f"{len(ids)} barcodes; it is damaged: write it again with Cell Ranger"
        )
    var = pd.DataFrame(columns, index=names)
    # Compressed by barcode: read as cells x features it is CSR.
    matrix = CompressedRows(f"{label}: matrix", (num_cells, num_features), group)
    types = var["feature_types"].to_numpy() if "feature_types" in var else np.full(len(var), "Gene Expression", object)
    parts = split_by_type(label, matrix, var, types, (), kinds=kinds, say=say)
    obs = Frame(pd.DataFrame(index=ids.astype(object)), label)
    return Source(label, (path,), ids, parts, ObsTable(View(obs, None), {}))


def _make_unique(label: str, names: np.ndarray, say: Say) -> pd.Index:
    index = pd.Index(names)
    repeated = index.duplicated()
    if not repeated.any():
        return index
    taken, unique = set(names.tolist()), names.copy()
    count: dict[str, int] = {}
    for place in np.flatnonzero(repeated):
        name = names[place]
        while True:
            count[name] = count.get(name, 0) + 1
            new = f"{name}-{count[name]}"
            if new not in taken:
                break
        taken.add(new)
        unique[place] = new
    first = int(np.flatnonzero(repeated)[0])
    say(
        f"{label}: {int(repeated.sum())} feature names repeat another and got a number ({names[first]!r}: "
        f"{unique[first]!r})"
    )
    return pd.Index(unique)


Held: TypeAlias = anndata.AnnData | mudata.MuData
"""Data in memory."""


def open_held(data: Held, *, modality: str | None, layer: str | None, kinds: Kinds, say: Say) -> Source:
    """The cells and modalities of an AnnData or MuData in memory."""
    kind, options = type(data).__name__, {"modality": modality, "layer": layer}
    return open_group(HeldGroup(data), f"{kind} in memory", Path(kind), **options, kinds=kinds, say=say)


def open_group(
    root: Any, label: str, path: Path, *, modality: str | None, layer: str | None, kinds: Kinds = PRESETS, say: Say
) -> Source:
    """The cells and modalities that an open group holds.

    Parameters
    ----------
    label, path
        What messages call it, and the path whose end names it.
    modality
        Modality to take; it also names the features of an AnnData that does not.
    layer
        Layer that holds the counts ("raw" also means `.raw`); None: X.
    kinds
        What modalities of other names than the known ones are; a store that ingest made knows its own.
    say
        Takes remarks on what was assumed.

    Raises
    ------
    ValueError
        It is neither AnnData nor MuData nor a 10x matrix, or says contradictory things.
    """
    with reading(label):
        kinds = {**PRESETS, **agreed([("what was asked for", kinds), (label, _kinds_in(root))])}
    modality = None if modality is None else check_modality(modality, kinds)
    with reading(label):
        check_foreign(root, label)
        return _open(root, label, path, modality=modality, layer=layer, kinds=kinds, say=say)


def _kinds_in(root: Any) -> dict[str, Kind]:
    """What the modalities of other names than the known ones are, in a store that ingest made."""
    held = getattr(root, "attrs", {}).get(SCHEMA_KEY, {}).get("modalities", {})
    return {name: Kind(m["likelihood"], m["transform"]) for name, m in held.items() if "likelihood" in m}


def _open(
    root: Any, label: str, path: Path, *, modality: str | None, layer: str | None, kinds: Kinds, say: Say
) -> Source:
    if "obs" in root and "var" in root and "mod" not in root:
        return open_anndata(label, path, root, modality=modality, layer=layer, kinds=kinds, say=say)
    if "mod" in root:
        source = open_mudata(label, path, root, layer=layer, kinds=kinds, say=say)
    elif is_tenx(root):
        if layer is not None:
            raise ValueError(f"layer: got {layer!r} for {label}, a 10x file, which has no layers; leave it out")
        source = open_tenx(label, path, root, kinds=kinds, say=say)
    else:
        kind = root.attrs.get("encoding-type")
        inside = ", ".join(sorted(root)) or "nothing"
        raise not_a_store(label, f"a group of encoding {kind!r}" if kind else f"a group that holds {inside} at its top")
    return source if modality is None else source.only(modality)
