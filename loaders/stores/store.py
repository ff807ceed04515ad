"""A source of cells as a store: this package's own, files of others, TileDB-SOMA, and data in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from loaders.formats.compressed import CompressedRows
from loaders.formats.damage import Damaged
from loaders.formats.frame import Frame, ObsTable, View, encode
from loaders.formats.matrix import Matrix, ReorderedRows, SelectedColumns, once
from loaders.formats.sealed import open_sealed
from loaders.formats.source import Part, Source
from loaders.modalities import Kind, modality_of, ordered
from loaders.schema import SCHEMA_KEY, ModalitySchema, NewerFormat, ObsColumn, Schema, sha256_of_names
from loaders.stores.base import check_embedding, describe_store

_log = logging.getLogger(__name__)


class Embeddings(Protocol):
    """The obsm of a store; see `Store` for what each method does."""

    def write(self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None: ...

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]: ...

    def names(self) -> list[str]: ...

    def attributes(self, name: str) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Modality:
    """A modality of a store; the callables compute once and may be called from several threads."""

    matrix: Matrix
    feature_names: Callable[[], npt.NDArray[np.str_]]
    rows: Callable[[], npt.NDArray[np.int64] | None]
    """(n,) row of each cell, -1 where the cell lacks the modality; None if row i is cell i."""
    totals: Callable[[], npt.NDArray[np.float64]]


class SourceStore:
    """A store over the modalities and obs of one source; see `Store`. Made by the functions below."""

    def __init__(
        self,
        uri: str,
        schema: Schema,
        *,
        modalities: Mapping[str, Modality],
        obs: ObsTable,
        embeddings: Embeddings,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.uri, self.schema = uri, schema
        self._modalities, self._obs, self._embeddings, self._close = modalities, obs, embeddings, close
        self.row_alignment = max((held.matrix.row_alignment for held in modalities.values()), default=1)

    __repr__ = describe_store

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        ids = self._obs.index(start, stop)
        # Said how wide, NumPy makes them without an object each, three times as fast.
        return np.asarray(ids.astype(f"U{max(1, int(np.strings.str_len(ids).max(initial=0)))}"))

    def obs_column(self, name: str) -> ObsColumn:
        if name not in self.schema.obs_columns:
            known = ", ".join(self.schema.obs_columns) or "none"
            raise ValueError(f"obs column: got {name!r}, which {self.uri} does not have; columns are: {known}")
        values = self._obs.column(name)
        try:
            return encode(values)
        except ValueError as error:
            raise ValueError(f"obs[{name!r}] of {self.uri}: {error}") from None

    def obs_frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        chosen = self.schema.obs_columns if columns is None else columns
        held = {name: self._obs.column(name).array for name in chosen}
        return pd.DataFrame(held, index=pd.Index(self.cell_ids(0, self.schema.num_cells), dtype=object))

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        return self._of(modality).feature_names()

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        return self._of(modality).rows()

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        return self._of(modality).totals()

    def matrix(self, modality: str) -> Matrix:
        return self._of(modality).matrix

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        check_embedding(self, name, values)
        self._embeddings.write(name, values, attributes or {})

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self._embeddings.read(name, start, stop)

    def embedding_names(self) -> list[str]:
        # MuData keeps there which cells have a modality, under its name.
        return [name for name in self._embeddings.names() if modality_of(name, self.schema.kinds) is None]

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        return self._embeddings.attributes(name)

    def close(self) -> None:
        if self._close is not None:
            self._close()

    def _of(self, modality: str) -> Modality:
        if modality not in self._modalities:
            raise ValueError(f"modality: got {modality!r}; {self.uri} holds {', '.join(self._modalities)}")
        return self._modalities[modality]


def store_of(source: Source, embeddings: Embeddings, *, close: Callable[[], None] | None = None) -> SourceStore:
    """A source as a store; what a schema says of our own stores is looked up."""
    held = {name: _modality_of(source.parts[name]) for name in ordered(source.parts)}
    schema = Schema(
        num_cells=len(source.cell_ids),
        modalities={name: _schema_of(name, modality, source.parts[name].kind) for name, modality in held.items()},
        obs_columns=tuple(source.obs.columns),
        is_shuffled=False,
        cells_sha256=sha256_of_names(map(str, source.cell_ids)),
    )
    return SourceStore(source.label, schema, modalities=held, obs=source.obs, embeddings=embeddings, close=close)


def own_store(root: zarr.Group, uri: str, embeddings: Embeddings) -> SourceStore:
    """A store made by ingest; offsets, rows and names of features are held against its schema at once."""
    schema = own_schema(root, uri)
    if schema.metadata is None:
        _log.info("%s was ingested by an older version and has checksums on the counts alone; ingest again", uri)
    else:
        root = open_sealed(root, uri, schema.metadata)
    held = {name: own_modality(root, name, uri, schema) for name in schema.modalities}
    for name, modality in held.items():
        modality.feature_names()
        modality.rows()
        told, found = schema.modalities[name].num_nonzeros, modality.matrix.num_nonzeros()
        if found != told:
            raise Damaged(uri, f"mod/{name}/X", f"it has {found} entries, ingest wrote {told}")
    obs = ObsTable(View(frame := Frame(root["obs"], uri), None), {})
    if (stored := frame.num_rows) != schema.num_cells:
        raise Damaged(uri, "obs", f"it has {stored} cells, ingest wrote {schema.num_cells}")
    if lost := [name for name in schema.obs_columns if name not in obs.columns]:
        raise Damaged(uri, "obs", f"it has no column {lost[0]!r}, which ingest wrote")
    return SourceStore(uri, schema, modalities=held, obs=obs, embeddings=embeddings)


def own_schema(root: zarr.Group, uri: str) -> Schema:
    """The schema of a store that ingest made; Damaged where it is not what was written."""
    try:
        return Schema.from_json(dict(root.attrs[SCHEMA_KEY]))
    except NewerFormat as error:
        raise ValueError(f"{uri}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(uri, "zarr.json", f"its schema cannot be read ({type(error).__name__}: {error})") from error


def own_modality(root: zarr.Group, name: str, uri: str, schema: Schema) -> Modality:
    """A modality of such a store; its callables hold what they read against the schema."""
    group, told = root["mod"][name], schema.modalities[name]
    shape = told.num_cells, told.num_features

    def rows() -> npt.NDArray[np.int64] | None:
        if shape[0] == schema.num_cells:
            return None
        # MuData counts rows from 1 and writes 0 for none.
        held = np.asarray(root["obsmap"][name][:]).astype(np.int64) - 1
        if len(held) != schema.num_cells or not np.array_equal(held[held >= 0], np.arange(shape[0])):
            raise Damaged(uri, f"obsmap/{name}", f"its rows are not 1 to {shape[0]} in their order")
        return held

    def names() -> npt.NDArray[np.str_]:
        held = _names(Frame(group["var"], uri).index())
        if sha256_of_names(held) != told.features_sha256:
            raise Damaged(uri, f"mod/{name}/var", "the names of the features are not those that ingest wrote")
        return held

    shared = once(rows)
    return Modality(
        matrix=CompressedRows(f"{uri}/mod/{name}/X", shape, group["X"], is_ours=True, cells=shared),
        feature_names=once(names),
        rows=shared,
        totals=once(lambda: np.asarray(group["obs"]["total_counts"][:]).astype(np.float64)),
    )


def _modality_of(part: Part) -> Modality:
    matrix: Matrix = part.matrix
    if part.columns is not None:
        matrix = SelectedColumns(matrix, part.columns.astype(np.int32), len(part.var))
    rows = part.rows
    if rows is not None:
        present = rows >= 0
        order = rows[present]
        if not np.array_equal(order, np.arange(matrix.num_rows)):
            _log.info(
                "%s: its cells stand in another order than those of the whole; reading is slower until ingested",
                matrix.where,
            )
            matrix = ReorderedRows(matrix, order)
        rows = None if present.all() else np.where(present, np.cumsum(present) - 1, -1)

    def totals() -> npt.NDArray[np.float64]:
        _log.info("%s: summing the counts of %d cells, as the sums are not stored", matrix.where, matrix.num_rows)
        return matrix.sums()

    names = _names(part.var.index)
    return Modality(matrix, lambda: names, lambda: rows, once(totals))


def _names(names: Any) -> npt.NDArray[np.str_]:
    return np.asarray(names.astype(object), dtype=str)


def _schema_of(name: str, held: Modality, kind: Kind) -> ModalitySchema:
    matrix = held.matrix
    return ModalitySchema(
        name=name,
        num_cells=matrix.num_rows,
        num_features=matrix.num_features,
        num_nonzeros=matrix.num_nonzeros(),
        value_dtype=matrix.value_dtype.name,
        features_sha256=sha256_of_names(held.feature_names()),
        **vars(kind),
    )
