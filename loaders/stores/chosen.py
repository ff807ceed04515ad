"""A store of which some cells and features are seen: nothing is copied."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.choice import cells_where, named_features, nothing_left
from loaders.formats.matrix import Matrix, once
from loaders.schema import ObsColumn, sha256_of_names
from loaders.stores.base import Store, at_rows, check_embedding, describe_store, ids_of
from loaders.stores.views import MatchedStore

_log = logging.getLogger(__name__)

WHERE_ATTRIBUTE = "liam_scale_where"
"""Attribute of an embedding of some of a store's cells: the expression that chose them; the others are NaN."""

_SAMPLED_PLACES, _SAMPLED_ROWS = 16, 64
"""Rows that tell which share of the non-zeros lies in the features chosen."""

_SLACK = 1.1
"""On that estimate."""


def choose(store: Store, *, where: str | None = None, features: Sequence[str] | None = None) -> Store:
    """The store as it is where neither is given, else the part of it that they choose.

    Parameters
    ----------
    where
        Cells, an expression over obs columns as `pandas.DataFrame.query` takes it.
    features
        Names of features, in whose place the store's order holds; a modality of which none is named keeps all.

    Raises
    ------
    ValueError
        The expression cannot be evaluated, names no column or leaves no cell; no modality has any of the features.
    """
    if where is not None:
        chosen = cells_where(where, store.uri, store.schema.obs_columns, store.obs_frame)
        if not chosen.any():
            raise nothing_left(where)
        _log.info("%s: %s of %s cells are taken (%s)", store.uri, f"{chosen.sum():,}", f"{len(chosen):,}", where)
        store = ChosenCells(store, np.flatnonzero(chosen), where)
    if features is not None:
        names = {name: store.feature_names(name) for name in store.schema.modalities}
        kept = named_features({name: pd.Index(own) for name, own in names.items()}, features, _log.info)
        store = _narrowed(store, {name: own[kept[name]] for name, own in names.items()})
    return store


def with_embedding(store: Store, name: str) -> Store:
    """The cells that were chosen for an embedding; the store as it is where that is of all cells, or not there."""
    wheres = {one.get(WHERE_ATTRIBUTE) for one in store.embedding_attributes(name)}
    return choose(store, where=wheres.pop()) if len(wheres) == 1 else store


def _narrowed(store: Store, features: Mapping[str, npt.NDArray[np.str_]]) -> Store:
    """The store with some of its features; their non-zeros, which memory rests on, are estimated from some rows."""
    seen = MatchedStore(store, {name: own.tolist() for name, own in features.items()})
    modalities = dict(seen.schema.modalities)
    for name, held in store.schema.modalities.items():
        if len(features[name]) == held.num_features:
            continue
        rows = store.matrix(name).num_rows
        starts = range(0, rows, max(_SAMPLED_ROWS, rows // _SAMPLED_PLACES))
        stops = [min(rows, start + _SAMPLED_ROWS) for start in starts]
        whole, kept = (
            sum(len(one.matrix(name).read(start, stop).values) for start, stop in zip(starts, stops, strict=True))
            for one in (store, seen)
        )
        number = round(min(1.0, _SLACK * kept / max(1, whole)) * held.num_nonzeros)
        modalities[name] = replace(modalities[name], num_nonzeros=number)
    seen.schema = replace(seen.schema, modalities=modalities)
    return seen


class ChosenCells:
    """Some cells of a store as one of their own: its rows are counted anew, its matrices are those of the whole.

    An embedding is written into the whole, where the other cells are NaN.

    Parameters
    ----------
    rows
        Of the cells, ascending.
    where
        The expression that chose them.
    """

    def __init__(self, store: Store, rows: npt.NDArray[np.int64], where: str) -> None:
        self.store, self.uri, self._rows, self._where = store, store.uri, rows, where
        # Blocks of chosen cells begin anywhere.
        self.row_alignment = 1
        self._modality_rows = {name: once(self._rows_in(name)) for name in store.schema.modalities}
        modalities = {}
        for name, held in store.schema.modalities.items():
            own = self._modality_rows[name]()
            own = own[own >= 0]
            if len(own):
                number = int(store.matrix(name).lengths()[own].sum())
                modalities[name] = replace(held, num_cells=len(own), num_nonzeros=number)
        digest = sha256_of_names([store.schema.cells_sha256, *map(str, rows.tolist())])
        parts = np.diff(np.searchsorted(rows, np.cumsum((0, *store.schema.parts)))).tolist()
        self.schema = replace(
            store.schema, num_cells=len(rows), modalities=modalities, cells_sha256=digest, parts=tuple(parts)
        )

    __repr__ = describe_store

    def _rows_in(self, modality: str) -> Callable[[], npt.NDArray[np.int64]]:
        def rows() -> npt.NDArray[np.int64]:
            of_cells = self.store.modality_rows(modality)
            return self._rows if of_cells is None else of_cells[self._rows]

        return rows

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        return ids_of(self.store, self._rows[start:stop])

    def obs_column(self, name: str) -> ObsColumn:
        column = self.store.obs_column(name)
        codes = column.codes[self._rows]
        used = np.unique(codes[codes >= 0])
        place = np.full(len(column.categories) + 1, -1, codes.dtype)
        place[used] = np.arange(len(used))
        return ObsColumn(place[codes], tuple(column.categories[code] for code in used))

    def obs_frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        frame = self.store.obs_frame(columns).iloc[self._rows].copy()
        for name in frame.columns[frame.dtypes == "category"]:
            frame[name] = frame[name].cat.remove_unused_categories()
        return frame

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        return self.store.feature_names(modality)

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        if modality not in self.schema.modalities:
            raise ValueError(f"modality: got {modality!r}; the cells chosen have {', '.join(self.schema.modalities)}")
        return self._modality_rows[modality]()

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        return self.store.totals(modality)

    def matrix(self, modality: str) -> Matrix:
        return self.store.matrix(modality)

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        check_embedding(self, name, values)
        whole = np.full((self.store.schema.num_cells, values.shape[1]), np.nan, np.float32)
        whole[self._rows] = values
        self.store.write_embedding(name, whole, {**(attributes or {}), WHERE_ATTRIBUTE: self._where})

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        if start >= stop:
            return self.store.read_embedding(name, 0, 0)
        return at_rows(lambda first, last: self.store.read_embedding(name, first, last), self._rows[start:stop])

    def embedding_names(self) -> list[str]:
        return self.store.embedding_names()

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        # Here it is one of all cells.
        held = self.store.embedding_attributes(name)
        return [{key: value for key, value in one.items() if key != WHERE_ATTRIBUTE} for one in held]

    def close(self) -> None:
        self.store.close()
