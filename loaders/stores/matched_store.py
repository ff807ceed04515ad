"""A store seen through another one's features: columns matched by name, so that a trained model can read it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.csr import SparseRows, row_sums, select_columns
from loaders.schema import sha256_of_names
from loaders.stores.base import ObsColumn, Store, describe_store

_log = logging.getLogger(__name__)

ROWS_PER_READ = 4_096


class MatchedStore:
    """Presents `store` with exactly the given features per modality, in their order.

    A feature that the store lacks is zero everywhere; one that is not asked for is left out; a modality that the store
    lacks is absent in every cell.

    Raises
    ------
    ValueError
        A modality has no feature in common with those asked for.
    """

    def __init__(self, store: Store, features: Mapping[str, Sequence[str]]) -> None:
        self.store, self.uri = store, store.uri
        self._names = {name: np.asarray(list(own), dtype=np.str_) for name, own in features.items()}
        self._targets = {name: self._match(name) for name in features if name in store.schema.modalities}
        if not self._targets:
            raise ValueError(
                f"store: {store.uri} holds {', '.join(store.schema.modalities)}, and none of the modalities asked for: "
                f"{', '.join(features)}"
            )
        held = store.schema.modalities
        blank = replace(next(iter(held.values())), num_cells=0, num_nonzeros=0)
        modalities = {
            name: replace(
                held.get(name, replace(blank, name=name)),
                num_features=len(own),
                features_sha256=sha256_of_names(map(str, own)),
            )
            for name, own in self._names.items()
        }
        self.schema = replace(store.schema, modalities=modalities)

    def _match(self, modality: str) -> npt.NDArray[np.int32]:
        """(F of the store,) column of the model of each feature, -1 for those it does not know."""
        column = {str(name): i for i, name in enumerate(self._names[modality])}
        target = np.array([column.get(str(name), -1) for name in self.store.feature_names(modality)], dtype=np.int32)
        found = int((target >= 0).sum())
        if not found:
            raise ValueError(
                f"store: {modality} of {self.uri} has no feature name in common with the {len(column):,} asked for "
                f"(it has {str(self.store.feature_names(modality)[0])!r}, ...; asked for is {next(iter(column))!r}, "
                "...); rename one of them"
            )
        if found < len(column):
            _log.info(
                "%s of %s: %d of %d features found by name, the others count as zero",
                modality, self.uri, found, len(column),
            )  # fmt: skip
        return target

    __repr__ = describe_store

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        return self.store.cell_ids(start, stop)

    def obs_column(self, name: str) -> ObsColumn:
        return self.store.obs_column(name)

    def obs_frame(self) -> pd.DataFrame:
        return self.store.obs_frame()

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        return self._names[modality]

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        if modality in self._targets:
            return self.store.modality_rows(modality)
        return np.full(self.schema.num_cells, -1, dtype=np.int64)

    def read_rows(self, modality: str, start: int, stop: int) -> SparseRows:
        if modality not in self._targets:
            assert start == stop == 0, "an absent modality has no rows"
            empty = np.zeros(0, dtype=np.uint32)
            return SparseRows(np.zeros(1, dtype=np.int64), empty, empty.astype(np.uint8), len(self._names[modality]))
        rows = self.store.read_rows(modality, start, stop)
        return select_columns(rows, self._targets[modality], len(self._names[modality]))

    @cache  # noqa: B019  (a view lives as long as the command that opened it)
    def _measure(self, modality: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Row sums and offsets over the matched columns, by one pass."""
        sums, lengths = [np.zeros(0)], [np.zeros(1, dtype=np.int64)]
        num_rows = self.schema.modalities[modality].num_cells
        for start in range(0, num_rows, ROWS_PER_READ):
            rows = self.read_rows(modality, start, min(num_rows, start + ROWS_PER_READ))
            sums.append(row_sums(rows.indptr, rows.values))
            lengths.append(np.diff(rows.indptr))
        return np.concatenate(sums), np.cumsum(np.concatenate(lengths))

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        return self._measure(modality)[0]

    def row_nonzeros(self, modality: str) -> npt.NDArray[np.int64]:
        return self._measure(modality)[1]

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        self.store.write_embedding(name, values, attributes)

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self.store.read_embedding(name, start, stop)

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        return self.store.embedding_attributes(name)
