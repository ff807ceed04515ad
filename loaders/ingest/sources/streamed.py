"""What the loader can stream, as a source of an ingest: TileDB-SOMA experiments, and stores at remote addresses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loaders.ingest.checks import check_unique
from loaders.ingest.sources.frames import Frame, ObsTable, Strings, View
from loaders.ingest.sources.matrices import ENTRY_BYTES, PEEK_ROWS, RawRows
from loaders.ingest.sources.parts import Part, Source
from loaders.stores.base import Store
from loaders.stores.open import SOMA_MARKS, open_store


def is_streamed(address: str) -> bool:
    """Whether an address is for the stores to open: a remote one, or a folder that TileDB wrote."""
    return "://" in address or any((Path(address) / mark).exists() for mark in SOMA_MARKS)


def open_streamed(address: str, layer: str | None, files: ExitStack) -> Source:
    """The cells and modalities of a store; features have their names only."""
    options: dict[str, Any] = {} if layer is None else {"layer": layer}
    store = open_store(address, **options)
    if hasattr(store, "close"):
        files.callback(store.close)
    num_cells = store.schema.num_cells
    ids = np.asarray(store.cell_ids(0, num_cells), dtype=object).astype(Strings)
    check_unique(f"{address}: cell ids", pd.Index(ids.astype(object)), "make them unique in the source")
    parts = {}
    for modality in store.schema.modalities:
        names = pd.Index(np.asarray(store.feature_names(modality), dtype=object))
        rows = store.modality_rows(modality)
        parts[modality] = Part(modality, StoredRows(store, modality), pd.DataFrame(index=names), None, rows)
    name = address.rstrip("/").rpartition("/")[2] if "://" in address else address
    return Source(address, (Path(name),), ids, parts, ObsTable(View(_ObsFrame(store), None), {}))


class StoredRows:
    """One modality of a store as a `Matrix`.

    A chunk has at least as many cells as the store decodes together (2,048 of a TileDB-SOMA experiment), whatever the
    memory.
    """

    def __init__(self, store: Store, modality: str) -> None:
        held = store.schema.modalities[modality]
        self.where = f"{store.uri}: {modality}"
        self.num_rows, self.num_features = held.num_cells, held.num_features
        self._store, self._modality, self._held = store, modality, held

    def estimated_nonzeros(self) -> int:
        return self._held.num_nonzeros

    def peek(self) -> RawRows | None:
        return self._read(0, min(PEEK_ROWS, self.num_rows))

    def chunks(self, *, memory: int, spill: Path | None = None) -> Iterator[RawRows]:
        together = int(getattr(self._store, "row_alignment", 1))
        cells = int(memory / ENTRY_BYTES / max(1.0, self._held.nonzeros_per_cell))
        step = max(1, cells // together) * together
        for start in range(0, self.num_rows, step):
            yield self._read(start, min(self.num_rows, start + step))

    def _read(self, start: int, stop: int) -> RawRows:
        rows = self._store.read_rows(self._modality, start, stop)
        return RawRows(start, rows.indptr, rows.indices, rows.values)


class _ObsFrame(Frame):
    """The obs of a store, read when the first column is asked for and then kept: the protocol gives it as a whole."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._whole = None

    @property
    def columns(self) -> list[str]:
        return list(self._store.schema.obs_columns)

    def column(self, name: str) -> pd.Series:
        if self._whole is None:
            self._whole = self._store.obs_frame().reset_index(drop=True)
        return self._whole[name]
