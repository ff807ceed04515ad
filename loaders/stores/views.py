"""Stores over stores: one seen through the features of a model, and several as one data set."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.csr import widest_dtype
from loaders.formats.compressed import CompressedRows
from loaders.formats.features import shared_names
from loaders.formats.matrix import ChainedMatrix, Matrix, SelectedColumns, once
from loaders.intervals import are_peaks, intervals_of
from loaders.modalities import PRESETS, Kind, Kinds, agreed, ordered
from loaders.schema import ModalitySchema, ObsColumn, Schema, sha256_of_names, unite_categories
from loaders.stores.base import Store, check_embedding, describe_store

_log = logging.getLogger(__name__)


class MatchedStore:
    """Presents `store` with exactly the given features per modality, in their order.

    A feature that the store lacks is zero everywhere; one that is not asked for is left out; a modality that the store
    lacks is absent in every cell.

    Parameters
    ----------
    by_overlap
        Match peaks (see `are_peaks`) by the intervals that they are named after: each to the one asked for with which
        it shares most bases, counts that come together added up.
    kinds
        What the modalities are that the store lacks, where their names do not tell.

    Raises
    ------
    ValueError
        A modality has no feature in common with those asked for.
    """

    def __init__(
        self,
        store: Store,
        features: Mapping[str, Sequence[str]],
        *,
        by_overlap: bool = False,
        kinds: Kinds = PRESETS,
    ) -> None:
        self.store, self.uri, self._by_overlap = store, store.uri, by_overlap
        self._names = {name: np.asarray(list(own), dtype=np.str_) for name, own in features.items()}
        self._targets = {name: self._match(name) for name in features if name in store.schema.modalities}
        if not self._targets:
            raise ValueError(
                f"store: {store.uri} holds {', '.join(store.schema.modalities)}, and none of the modalities asked for: "
                f"{', '.join(features)}"
            )
        held = store.schema.modalities
        kinds = {**PRESETS, **kinds}
        blank = replace(next(iter(held.values())), num_cells=0, num_nonzeros=0)
        modalities = {
            name: replace(
                held[name] if name in held else replace(blank, name=name, **vars(kinds[name])),
                num_features=len(own),
                features_sha256=sha256_of_names(map(str, own)),
            )
            for name, own in self._names.items()
        }
        self.schema = replace(store.schema, modalities=modalities)
        self.row_alignment = store.row_alignment
        self._matrices: dict[str, Matrix] = {}

    def _match(self, modality: str) -> npt.NDArray[np.int32]:
        """(F of the store,) column of the model of each feature, -1 for those it does not know."""
        column = {str(name): i for i, name in enumerate(self._names[modality])}
        names = self.store.feature_names(modality).tolist()
        kind = self.store.schema.kinds[modality]
        if self._by_overlap and are_peaks(modality, kind, column, names):
            asked = intervals_of(list(column), "the peaks asked for")
            where = f"{modality} of {self.uri}"
            target = intervals_of(names, where).best(asked).astype(np.int32)
            lost = int((target < 0).sum())
            _log.info("%s: %d of its %d peaks overlap none of those asked for", where, lost, len(names))
        else:
            target = np.array([column.get(str(name), -1) for name in names], dtype=np.int32)
        found = len(np.unique(target[target >= 0]))
        if not found:
            what = "feature" if self._by_overlap else "feature name"
            raise ValueError(
                f"store: {modality} of {self.uri} has no {what} in common with the "
                f"{len(column):,} asked for (it has {names[0]!r}, ...; asked for is {next(iter(column))!r}, ...); "
                "rename one of them" + (", or match peaks by overlap" if kind.likelihood == "NM" else "")
            )
        if found < len(column):
            _log.info(
                "%s of %s: %d of %d features found, the others count as zero",
                modality, self.uri, found, len(column),
            )  # fmt: skip
        return target

    def _is_whole(self, modality: str) -> bool:
        """Whether the store has exactly these features, in this order."""
        held = self.store.schema.modalities.get(modality)
        return held is not None and held.features_sha256 == self.schema.modalities[modality].features_sha256

    __repr__ = describe_store

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        return self.store.cell_ids(start, stop)

    def obs_column(self, name: str) -> ObsColumn:
        return self.store.obs_column(name)

    def obs_frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        return self.store.obs_frame(columns)

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        return self._names[modality]

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        if modality in self._targets:
            return self.store.modality_rows(modality)
        return np.full(self.schema.num_cells, -1, dtype=np.int64)

    def matrix(self, modality: str) -> Matrix:
        if modality not in self._matrices:
            self._matrices[modality] = self._select(modality)
        return self._matrices[modality]

    def _select(self, modality: str) -> Matrix:
        if self._is_whole(modality):
            return self.store.matrix(modality)
        if modality in self._targets:
            return SelectedColumns(self.store.matrix(modality), self._targets[modality], len(self._names[modality]))
        nothing = {"data": np.zeros(0, np.uint8), "indices": np.zeros(0, np.int32), "indptr": np.zeros(1, np.int64)}
        width = len(self._names[modality])
        empty = CompressedRows(f"{self.uri}: {modality}", (0, width), nothing)
        return SelectedColumns(empty, np.arange(width, dtype=np.int32), width)

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        return self.store.totals(modality) if self._is_whole(modality) else self.matrix(modality).sums()

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        self.store.write_embedding(name, values, attributes)

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self.store.read_embedding(name, start, stop)

    def embedding_names(self) -> list[str]:
        return self.store.embedding_names()

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        return self.store.embedding_attributes(name)

    def close(self) -> None:
        self.store.close()


class ChainedStore:
    """The cells of several stores, in the order of the stores.

    A modality has the features that all stores with this modality share, in the order of the first of them; a store
    without it gives cells that lack it. Obs columns are united by name: a store without a column gives missing values.

    Parameters
    ----------
    stores
        At least one store; those of other formats may stand among them.
    is_shuffled
        The stores are random parts of one whole, each in random order.

    Raises
    ------
    ValueError
        No store; stores whose features of a modality have no name in common, or whose names are not unique.
    """

    def __init__(self, stores: Sequence[Store], *, is_shuffled: bool = False) -> None:
        if not stores:
            raise ValueError("stores: got none; give at least one")
        self.uri = " + ".join(store.uri for store in stores)
        self.stores = tuple(stores)
        self._starts = _starts(store.schema.num_cells for store in stores)
        kinds = agreed((store.uri, store.schema.kinds) for store in stores)
        names = ordered(kinds)
        self._names = {name: _shared_features(self.stores, name) for name in names}
        self._views = {name: [_view(store, name, self._names[name]) for store in stores] for name in names}
        self._row_starts = {
            name: _starts(0 if view is None else view.schema.modalities[name].num_cells for view in views)
            for name, views in self._views.items()
        }
        self.schema = Schema(
            num_cells=self._starts[-1],
            modalities={name: self._modality_schema(name, kinds[name]) for name in names},
            obs_columns=tuple(dict.fromkeys(column for store in stores for column in store.schema.obs_columns)),
            is_shuffled=is_shuffled or (len(stores) == 1 and stores[0].schema.is_shuffled),
            cells_sha256=sha256_of_names(store.schema.cells_sha256 for store in stores),
        )
        self._matrices = {name: once(partial(self._chain, name)) for name in names}
        self.row_alignment = max(store.row_alignment for store in stores)

    __repr__ = describe_store

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        parts = [self.stores[i].cell_ids(first, last) for i, first, last in _pieces(self._starts, start, stop)]
        return np.concatenate([np.zeros(0, np.str_), *parts])

    def obs_column(self, name: str) -> ObsColumn:
        if name not in self.schema.obs_columns:
            known = ", ".join(self.schema.obs_columns) or "none"
            raise ValueError(f"obs column: got {name!r}, which no store of {self.uri} has; columns are: {known}")
        return unite_categories(
            [
                store.obs_column(name) if name in store.schema.obs_columns else store.schema.num_cells
                for store in self.stores
            ]
        )

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        self._check(modality)
        return self._names[modality]

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        self._check(modality)
        if self._row_starts[modality][-1] == self.schema.num_cells:
            return None
        parts = []
        for store, view, start in zip(self.stores, self._views[modality], self._row_starts[modality], strict=False):
            rows = np.full(store.schema.num_cells, -1, np.int64) if view is None else view.modality_rows(modality)
            rows = np.arange(store.schema.num_cells) if rows is None else rows
            parts.append(np.where(rows >= 0, rows + start, -1))
        return np.concatenate(parts)

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        return np.concatenate([view.totals(modality) for _, view in self._holders(modality)])

    def matrix(self, modality: str) -> Matrix:
        self._check(modality)
        return self._matrices[modality]()

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        check_embedding(self, name, values)
        for store, start in zip(self.stores, self._starts, strict=False):
            store.write_embedding(name, values[start : start + store.schema.num_cells], attributes)

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        pieces = _pieces(self._starts, start, stop) or [(0, 0, 0)]
        return np.concatenate([self.stores[i].read_embedding(name, first, last) for i, first, last in pieces])

    def embedding_names(self) -> list[str]:
        held = [store.embedding_names() for store in self.stores]
        return [name for name in held[0] if all(name in names for names in held)]

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        return [entry for store in self.stores for entry in store.embedding_attributes(name)]

    def obs_frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        if columns is None:
            return pd.concat([store.obs_frame() for store in self.stores])
        held = [store.obs_frame([c for c in columns if c in store.schema.obs_columns]) for store in self.stores]
        return pd.concat(held).reindex(columns=list(columns))

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def _chain(self, modality: str) -> Matrix:
        matrices = [view.matrix(modality) for _, view in self._holders(modality)]
        return ChainedMatrix(matrices, f"store {self.uri}, {modality}")

    def _check(self, modality: str) -> None:
        if modality not in self._views:
            raise ValueError(f"modality: got {modality!r}; {self.uri} holds {', '.join(self._views)}")

    def _holders(self, modality: str) -> list[tuple[Store, Store]]:
        """The stores that have a modality, each with its view through the shared features."""
        self._check(modality)
        pairs = zip(self.stores, self._views[modality], strict=True)
        return [(store, view) for store, view in pairs if view is not None]

    def _modality_schema(self, name: str, kind: Kind) -> ModalitySchema:
        held = [store.schema.modalities[name] for store, _ in self._holders(name)]
        return ModalitySchema(
            name=name,
            num_cells=self._row_starts[name][-1],
            num_features=len(self._names[name]),
            num_nonzeros=sum(entry.num_nonzeros for entry in held),
            value_dtype=widest_dtype(np.dtype(entry.value_dtype) for entry in held).name,
            features_sha256=sha256_of_names(self._names[name]),
            **vars(kind),
        )


def _starts(lengths: Iterable[int]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


def _pieces(starts: Sequence[int], start: int, stop: int) -> list[tuple[int, int, int]]:
    """Parts of [start, stop) by store: (number of the store, first, last) counted within the store."""
    bounds = enumerate(pairwise(starts))
    return [(i, max(start, a) - a, min(stop, b) - a) for i, (a, b) in bounds if max(start, a) < min(stop, b)]


def _shared_features(stores: Sequence[Store], modality: str) -> npt.NDArray[np.str_]:
    """Names that all stores with a modality share, in the order of the first of them."""
    holders = [store for store in stores if modality in store.schema.modalities]
    if len({store.schema.modalities[modality].features_sha256 for store in holders}) == 1:
        return holders[0].feature_names(modality)
    names = [pd.Index(store.feature_names(modality)) for store in holders]
    shared = shared_names(modality, [(store.uri, own) for store, own in zip(holders, names, strict=True)])
    for store, own in zip(holders, names, strict=True):
        if len(shared) < len(own):
            _log.info("%s: %d of its %d features of %s are in every store", store.uri, len(shared), len(own), modality)
    return np.asarray(shared, dtype=np.str_)


def _view(store: Store, modality: str, names: npt.NDArray[np.str_]) -> Store | None:
    """One modality of a store with the shared features; None where the store lacks it."""
    held = store.schema.modalities.get(modality)
    if held is None:
        return None
    return store if held.features_sha256 == sha256_of_names(names) else MatchedStore(store, {modality: [*names]})
