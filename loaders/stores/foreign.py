"""What an AnnData or MuData Zarr that others wrote holds: its schema, derived on opening."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from loaders.schema import MODALITIES, ModalitySchema, Schema, sha256_of_names
from loaders.stores import columns
from loaders.stores.base import ObsColumn
from loaders.stores.matrices import CsrMatrix, DenseMatrix, Matrix, ReorderedRows, SelectedColumns, once
from loaders.stores.modalities import check_modality, looks_like_peaks, modality_of
from loaders.stores.parts import ModalityPart, totals_by_reading
from loaders.stores.zarr_root import not_a_store

_log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64] | None
"""(n,) row of each cell in a modality, -1 where the cell lacks it; None if row i is cell i."""


class ObsSource:
    """Obs columns of a store: those of its own obs, then those that only modalities have."""

    def __init__(self, obs: zarr.Group, modalities: Mapping[str, tuple[zarr.Group, Callable[[], Rows]]]) -> None:
        self._obs = obs
        self._modalities = modalities
        self._columns = columns.column_names(obs)
        self._modality_columns = {name: columns.column_names(part[0]) for name, part in modalities.items()}

    @property
    def names(self) -> tuple[str, ...]:
        further = [name for names in self._modality_columns.values() for name in names]
        return tuple(dict.fromkeys([*self._columns, *further]))

    def ids(self, start: int, stop: int | None) -> npt.NDArray[np.str_]:
        return columns.read_index(self._obs, start, stop)

    def column(self, name: str) -> ObsColumn:
        """A column as codes over all cells; KeyError if there is none of this name."""
        if name in self._columns:
            return columns.read_column(self._obs, name)
        holders = [m for m, names in self._modality_columns.items() if name in names]
        if not holders:
            raise KeyError(name)
        parts = [columns.read_column(self._modalities[m][0], name) for m in holders]
        return unite_columns(parts, [self._modalities[m][1]() for m in holders])

    def frame(self) -> pd.DataFrame:
        frame = columns.read_frame(self._obs)
        for name in self.names:
            if name not in self._columns:
                try:
                    column = self.column(name)
                except ValueError:  # a floating point or date column of one modality: not for the whole store
                    continue
                frame[name] = pd.Categorical.from_codes(column.codes, pd.Index(column.categories))
        return frame


@dataclass(frozen=True)
class Derived:
    schema: Schema
    parts: dict[str, ModalityPart]
    obs: ObsSource


def unite_columns(parts: list[ObsColumn], rows: list[Rows]) -> ObsColumn:
    """One column over all cells from the columns of modalities; where two have a value, the first one counts."""
    categories = tuple(dict.fromkeys(category for part in parts for category in part.categories))
    place = {category: code for code, category in enumerate(categories)}
    num_cells = next((len(row) for row in rows if row is not None), len(parts[0].codes))
    united = np.full(num_cells, -1, np.int32)
    for part, row in zip(parts, rows, strict=True):
        renamed = np.array([*(place[c] for c in part.categories), -1], np.int32)[part.codes]
        codes = renamed if row is None else np.where(row >= 0, renamed[row], np.int32(-1))
        united = np.where(united >= 0, united, codes)
    return ObsColumn(united.astype(np.int32), categories)


def rows_of(obsmap: zarr.Array) -> npt.NDArray[np.int64]:
    """(n,) row of each cell, -1 where it lacks the modality: MuData counts rows from 1 and writes 0 for none."""
    return np.asarray(obsmap[:]).astype(np.int64) - 1


def derive(root: zarr.Group, uri: str, *, modality: str | None, layer: str | None) -> Derived:
    """Derive the schema of a store without one.

    Raises
    ------
    ValueError
        The group is neither AnnData nor MuData, or holds no matrix that can be streamed.
    """
    encoding = root.attrs.get("encoding-type")
    if encoding == "MuData" or (encoding is None and "mod" in root):
        parts, obs = _mudata_parts(root, uri, modality=modality, layer=layer)
    elif encoding == "anndata" or (encoding is None and "X" in root and "obs" in root):
        parts = _anndata_parts(root, uri, modality=modality, layer=layer)
        obs = ObsSource(root["obs"], {})
    else:
        raise not_a_store(
            uri, f"a Zarr group of encoding {encoding!r}" if encoding else "a Zarr group of nothing known"
        )
    _log.info(
        "%s was not made by `liam-scale ingest`: cells are taken in the order on disk, with small blocks and large"
        " windows; ingesting once shuffles them and makes reading faster",
        uri,
    )
    parts = {name: parts[name] for name in MODALITIES if name in parts}
    ids = obs.ids(0, None)
    schema = Schema(
        num_cells=len(ids),
        modalities={name: _modality_schema(name, part) for name, part in parts.items()},
        obs_columns=obs.names,
        is_shuffled=False,
        cells_sha256=sha256_of_names(ids),
    )
    return Derived(schema, parts, obs)


def _modality_schema(name: str, part: ModalityPart) -> ModalitySchema:
    return ModalitySchema(
        name=name,
        num_cells=part.matrix.num_rows,
        num_features=part.matrix.num_features,
        num_nonzeros=int(part.matrix.indptr()[-1]),
        value_dtype=part.matrix.value_dtype.name,
        features_sha256=sha256_of_names(part.feature_names()),
    )


def _mudata_parts(
    root: zarr.Group, uri: str, *, modality: str | None, layer: str | None
) -> tuple[dict[str, ModalityPart], ObsSource]:
    if root.attrs.get("axis", 0) != 0:
        raise ValueError(
            f"store {uri}: got a MuData of axis {root.attrs['axis']}; only shared cells (axis 0) can be streamed"
        )
    if modality is not None:
        raise ValueError(f"modality: got {modality!r} for the MuData {uri}, which names its modalities; leave it out")
    mod = root["mod"]
    names = [str(name) for name in mod.attrs.get("mod-order", None) or sorted(mod.group_keys())]
    if layer is not None and not any(_has_layer(mod[name], layer) for name in names):
        raise ValueError(f"layer: got {layer!r}, which no modality of {uri} has; leave it out to read X")
    parts: dict[str, ModalityPart] = {}
    obs: dict[str, tuple[zarr.Group, Callable[[], Rows]]] = {}
    for name in names:
        known = modality_of(name)
        if known is None:
            _log.info("%s: modality %r is left out, as it is none of %s", uri, name, ", ".join(MODALITIES))
        elif known in parts:
            raise ValueError(f"store {uri}: got two modalities that mean {known!r} ({', '.join(names)}); rename one")
        else:
            parts[known], rows = _mudata_part(root, name, uri, layer)
            obs[known] = (mod[name]["obs"], once(lambda rows=rows: rows))  # type: ignore[misc]
    if not parts:
        raise ValueError(f"store {uri}: got modalities {', '.join(names)}; name at least one {', '.join(MODALITIES)}")
    return parts, ObsSource(root["obs"], obs)


def _mudata_part(root: zarr.Group, name: str, uri: str, layer: str | None) -> tuple[ModalityPart, Rows]:
    group = root["mod"][name]
    label = f"{uri}/mod/{name}"
    chosen = layer if layer is not None and _has_layer(group, layer) else None
    if layer is not None and chosen is None:
        _log.info("%s has no layer %r: its X is read", label, layer)
    matrix, var = _open_matrix(group, label, chosen)
    stored = _stored_rows(root, name, matrix.num_rows)
    present = stored >= 0
    order = stored[present]
    if not np.array_equal(order, np.arange(matrix.num_rows)):
        _log.info(
            "%s: its cells stand in another order than those of the whole; reading is slower until ingested", label
        )
        matrix = ReorderedRows(matrix, order)
    rows = None if present.all() else np.where(present, np.cumsum(present) - 1, -1)
    part = _part(matrix, var, label, rows)
    return part, None if present.all() and np.array_equal(order, np.arange(len(order))) else stored


def _stored_rows(root: zarr.Group, name: str, num_rows: int) -> npt.NDArray[np.int64]:
    """(n,) row on disk of each cell, -1 where it lacks the modality."""
    if "obsmap" in root and name in root["obsmap"]:
        return rows_of(root["obsmap"][name])
    ids, own = columns.read_index(root["obs"]), columns.read_index(root["mod"][name]["obs"])
    return pd.Index(own).get_indexer(pd.Index(ids)).astype(np.int64)


def _anndata_parts(root: zarr.Group, uri: str, *, modality: str | None, layer: str | None) -> dict[str, ModalityPart]:
    if layer is not None and not _has_layer(root, layer):
        raise ValueError(f"layer: got {layer!r}, which {uri} does not have; leave it out to read X")
    matrix, var = _open_matrix(root, uri, layer)
    if modality is not None:
        return {check_modality(modality): _part(matrix, var, uri, None)}
    if "feature_types" not in columns.column_names(var):
        name = "atac" if looks_like_peaks(columns.read_index(var)) else "rna"
        _log.info("%s: taken as %s, as var has no column feature_types; pass modality= to name it", uri, name)
        return {name: _part(matrix, var, uri, None)}
    types = columns.read_column(var, "feature_types")
    known = np.array([*(_known_type(category, uri) for category in types.categories), ""], dtype=object)[types.codes]
    names = [name for name in MODALITIES if (known == name).any()]
    if not names:
        raise ValueError(
            f"store {uri}: got var['feature_types'] of {', '.join(types.categories) or 'nothing'}, which names none of"
            f" {', '.join(MODALITIES)}; pass modality= to name the whole matrix"
        )
    if len(names) == 1 and (known == names[0]).all():
        return {names[0]: _part(matrix, var, uri, None)}
    return {name: _selected_part(matrix, var, uri, np.flatnonzero(known == name)) for name in names}


def _known_type(category: str, uri: str) -> str:
    known = modality_of(category)
    if known is None:
        _log.info("%s: features of type %r are left out, as it is none of %s", uri, category, ", ".join(MODALITIES))
    return known or ""


def _selected_part(matrix: Matrix, var: zarr.Group, uri: str, chosen: npt.NDArray[np.int64]) -> ModalityPart:
    selected = SelectedColumns(matrix, chosen)
    return ModalityPart(
        matrix=selected,
        feature_names=once(lambda: columns.read_index(var)[chosen]),
        rows=lambda: None,
        totals=once(lambda: totals_by_reading(selected, uri)),
    )


def _part(matrix: Matrix, var: zarr.Group, label: str, rows: Rows) -> ModalityPart:
    return ModalityPart(
        matrix=matrix,
        feature_names=once(lambda: columns.read_index(var)),
        rows=lambda: rows,
        totals=once(lambda: totals_by_reading(matrix, label)),
    )


def _has_layer(group: zarr.Group, layer: str) -> bool:
    return (layer == "raw" and "raw" in group) or ("layers" in group and layer in group["layers"])


def _open_matrix(group: zarr.Group, label: str, layer: str | None) -> tuple[Matrix, zarr.Group]:
    """The matrix of counts of an AnnData group, and the var of its columns."""
    if layer == "raw":
        holder, name, var = group["raw"], "X", group["raw"]["var"]
    elif layer is None:
        holder, name, var = group, "X", group["var"]
    else:
        holder, name, var = group["layers"], layer, group["var"]
    label = f"{label}/{name}" if layer in (None, "raw") else f"{label}/layers/{name}"
    if name not in holder:
        raise ValueError(f"{label}: got no such matrix; name the layer that holds the counts (layer=)")
    node = holder[name]
    if isinstance(node, zarr.Array):
        return DenseMatrix(node, label), var
    encoding = node.attrs.get("encoding-type")
    if encoding != "csr_matrix":
        raise ValueError(
            f"{label}: got encoding {encoding!r}, whose rows cannot be streamed;"
            f" write it as CSR (`adata.X = adata.X.tocsr()`), or run `liam-scale ingest`"
        )
    return CsrMatrix(node, label), var
