"""A store seen through another one's features: columns matched by name, so that a trained model can read it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.formats.compressed import CompressedRows
from loaders.formats.matrix import Matrix, SelectedColumns
from loaders.schema import ObsColumn, sha256_of_names
from loaders.stores.base import Store, describe_store

_log = logging.getLogger(__name__)


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
        self.row_alignment = store.row_alignment
        self._matrices: dict[str, Matrix] = {}

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

    def matrix(self, modality: str) -> Matrix:
        if modality not in self._matrices:
            self._matrices[modality] = self._select(modality)
        return self._matrices[modality]

    def _select(self, modality: str) -> Matrix:
        if modality in self._targets:
            return SelectedColumns(self.store.matrix(modality), self._targets[modality], len(self._names[modality]))
        nothing = {"data": np.zeros(0, np.uint8), "indices": np.zeros(0, np.int32), "indptr": np.zeros(1, np.int64)}
        width = len(self._names[modality])
        empty = CompressedRows(f"{self.uri}: {modality}", (0, width), nothing)
        return SelectedColumns(empty, np.arange(width, dtype=np.int32), width)

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        return self.matrix(modality).sums()

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
