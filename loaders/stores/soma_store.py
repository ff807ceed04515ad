"""A TileDB-SOMA experiment as the loader's `Store`: one or several measurements, each with a sparse X.

X is read by whole rows of tiles: a tile is decoded as a whole, so a read of 64 cells costs as much as one of the tile's
2,048. A measurement does not say which cells it has: among several measurements, a cell has those where it has a count.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.csr import SparseRows, offsets_of
from loaders.durable import writing
from loaders.schema import MODALITIES, ModalitySchema, Schema, sha256_of_names
from loaders.stores import soma_embeddings
from loaders.stores.base import ObsColumn, check_embedding, describe_store
from loaders.stores.columns import encode
from loaders.stores.matrices import once
from loaders.stores.modalities import check_modality, modality_of
from loaders.stores.soma_matrix import SomaMatrix

_log = logging.getLogger(__name__)

BUFFER_BYTES = 8 << 20
"""Bytes of one column buffer of TileDB-SOMA, three per read; its default is 1 GiB. 4 to 128 MB read equally fast."""

LAYERS = ("counts", "raw", "data")
"""X layers in the order of preference where none is named and there are several."""

CELL_ID_COLUMNS = ("obs_id", "_index", "index", "cell_id", "barcode")
FEATURE_ID_COLUMNS = ("var_id", "_index", "index", "feature_id", "gene_id", "feature_name")
"""Columns that hold the names of cells and features, the first that exists; without one the joinids serve as names."""


@dataclass(frozen=True)
class _Part:
    """One measurement: its matrix over all cells, and the cells that have it (None: all)."""

    measurement: str
    matrix: SomaMatrix
    cells: npt.NDArray[np.int64] | None


class SomaStore:
    """Cells of a TileDB-SOMA experiment.

    Parameters
    ----------
    uri
        Path or address of the experiment.
    layer
        X layer that holds the counts; without it the only one, or the first of counts, raw and data.
    obs_filter
        Condition on obs that chooses cells, in TileDB-SOMA's words: "tissue == 'blood' and is_primary_data == True".
    measurements
        Measurement of each modality, for example {"rna": "raw"}; others are left out. Default: those whose names tell.
    tiledb_config
        Options of TileDB, such as {"vfs.s3.region": "us-west-2"}.

    Raises
    ------
    ValueError
        tiledbsoma is not installed; no experiment, no known measurement, no such layer; a filter that TileDB-SOMA
        refuses or that leaves no cell.
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        layer: str | None = None,
        obs_filter: str | None = None,
        measurements: Mapping[str, str] | None = None,
        tiledb_config: Mapping[str, str | float] | None = None,
    ) -> None:
        self.uri = str(uri)
        self._soma = _import_tiledbsoma(self.uri)
        self._filter = obs_filter
        # One context for the whole store: its thread pools and buffers are shared by all reads.
        self._context = self._soma.SOMATileDBContext(
            tiledb_config={"soma.init_buffer_bytes": BUFFER_BYTES, **(tiledb_config or {})}
        )
        self._experiment = self._open_experiment()
        self._obs_names = list(self._experiment.obs.keys())
        self._id_column = _first_known(self._obs_names, CELL_ID_COLUMNS)
        self._joinids = self._read_obs([])["soma_joinid"].to_numpy(np.int64)
        try:
            self._parts = self._open_parts(measurements, layer)
        except self._soma.SOMAError as error:
            raise RuntimeError(
                f"store {self.uri}: its measurements cannot be opened: {error}; check or copy the experiment"
            ) from error
        self._ids = once(self._read_ids)
        self.schema = Schema(
            num_cells=len(self._joinids),
            modalities={name: self._modality_schema(name, part) for name, part in self._parts.items()},
            obs_columns=tuple(c for c in self._obs_names if c not in ("soma_joinid", self._id_column)),
            is_shuffled=False,
            cells_sha256=sha256_of_names(self._ids()),
        )
        _log.info(
            "%s is a TileDB-SOMA experiment: cells are taken in the order on disk, %d at a time; an ingested store is"
            " shuffled and many times faster to read (`liam-scale ingest` takes the experiment as source)",
            self.uri,
            self.row_alignment,
        )

    @property
    def row_alignment(self) -> int:
        """Cells that are decoded together: blocks should begin and end at multiples of it."""
        return max(part.matrix.rows_per_read for part in self._parts.values())

    __repr__ = describe_store

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        return self._ids()[start:stop]

    def obs_column(self, name: str) -> ObsColumn:
        if name not in self.schema.obs_columns:
            known = ", ".join(self.schema.obs_columns) or "none"
            raise ValueError(f"obs column: got {name!r}, which {self.uri} does not have; columns are: {known}")
        try:
            return encode(self._read_obs([name])[name])
        except ValueError as error:
            raise ValueError(f"obs[{name!r}] of {self.uri}: {error}") from None

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        return self._part(modality).matrix.feature_names

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        cells = self._part(modality).cells
        if cells is None:
            return None
        rows = np.full(len(self._joinids), -1, np.int64)
        rows[cells] = np.arange(len(cells))
        return rows

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        part = self._part(modality)
        totals = part.matrix.totals()
        return totals if part.cells is None else totals[part.cells]

    def row_nonzeros(self, modality: str) -> npt.NDArray[np.int64]:
        part = self._part(modality)
        counts = part.matrix.counts()
        return offsets_of(counts if part.cells is None else counts[part.cells])

    def read_rows(self, modality: str, start: int, stop: int) -> SparseRows:
        part = self._part(modality)
        num_rows = self.schema.modalities[modality].num_cells
        if not 0 <= start <= stop <= num_rows:
            raise ValueError(f"{self.uri} {modality}: got rows {start}:{stop}; give rows within 0:{num_rows}")
        if part.cells is None or start == stop:
            return part.matrix.read(start, stop)
        # Cells between that lack the modality have no entries: only their offsets are dropped.
        cells = part.cells[start:stop]
        rows = part.matrix.read(int(cells[0]), int(cells[-1]) + 1)
        lengths = np.diff(rows.indptr)[cells - cells[0]]
        return SparseRows(offsets_of(lengths), rows.indices, rows.values, rows.num_features)

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        """Put values into obsm[name] of the first measurement, at the joinids of the cells."""
        check_embedding(self, name, values)
        try:
            with writing(f"{self.uri}/obsm/{name}"):
                soma_embeddings.write(
                    self._soma, self._context, self._home, name, self._joinids, values, attributes or {}
                )
        except self._soma.SOMAError as error:
            raise RuntimeError(
                f"store {self.uri}: cannot be written ({error}); make it writable, or write the embedding to a file"
            ) from error

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return soma_embeddings.read(self._soma, self._context, self._home, name, self._joinids[start:stop])

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        return soma_embeddings.attributes(self._soma, self._context, self._home, name)

    def obs_frame(self) -> pd.DataFrame:
        columns = list(self.schema.obs_columns)
        return self._read_obs(columns)[columns].set_index(pd.Index(self._ids()))

    def close(self) -> None:
        """Close the experiment."""
        self._experiment.close()

    def _part(self, modality: str) -> _Part:
        if modality not in self._parts:
            raise ValueError(f"modality: got {modality!r}; {self.uri} holds {', '.join(self._parts)}")
        return self._parts[modality]

    def _open_experiment(self) -> Any:
        try:
            opened = self._soma.open(self.uri, context=self._context)
        except self._soma.SOMAError as error:
            raise ValueError(f"store {self.uri}: got no TileDB-SOMA experiment ({error}); check the address") from None
        if not isinstance(opened, self._soma.Experiment):
            kind = opened.soma_type
            opened.close()
            raise ValueError(f"store {self.uri}: got a TileDB-SOMA object of type {kind}; give the whole experiment")
        return opened

    def _read_obs(self, columns: list[str]) -> pd.DataFrame:
        """Columns of the chosen cells, ordered by joinid, with the column soma_joinid."""
        names = list(dict.fromkeys(["soma_joinid", *columns]))
        try:
            table = self._experiment.obs.read(column_names=names, value_filter=self._filter).concat()
        except self._soma.SOMAError as error:
            if self._filter is None:
                raise RuntimeError(f"obs of {self.uri} cannot be read: {error}; check or copy it") from error
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"obs filter: got {self._filter!r}, which TileDB-SOMA refuses ({reason}); columns of {self.uri} are:"
                f" {', '.join(self._obs_names)}"
            ) from None
        if not len(table):
            raise ValueError(f"obs filter: got {self._filter!r}, which no cell of {self.uri} meets; loosen it")
        frame = table.to_pandas(integer_object_nulls=True)
        return frame.sort_values("soma_joinid", kind="stable", ignore_index=True)

    def _read_ids(self) -> npt.NDArray[np.str_]:
        if self._id_column is None:
            return self._joinids.astype(str)
        return self._read_obs([self._id_column])[self._id_column].to_numpy().astype(str)

    def _open_parts(self, measurements: Mapping[str, str] | None, layer: str | None) -> dict[str, _Part]:
        chosen = _choose_measurements(list(self._experiment.ms.keys()), self.uri, measurements)
        if layer is not None and not any(layer in self._experiment.ms[name].X for name in chosen.values()):
            raise ValueError(
                f"layer: got {layer!r}, which no measurement of {self.uri} has; leave it out, or name another"
            )
        parts = {}
        for modality in (name for name in MODALITIES if name in chosen):
            matrix = self._open_matrix(chosen[modality], layer)
            cells = None
            if len(chosen) > 1:
                _log.info("%s: looking for the cells that have %s", self.uri, chosen[modality])
                present = np.flatnonzero(matrix.counts())
                cells = present if len(present) < len(self._joinids) else None
            parts[modality] = _Part(chosen[modality], matrix, cells)
        return parts

    def _open_matrix(self, name: str, layer: str | None) -> SomaMatrix:
        measurement = self._experiment.ms[name]
        label = f"{self.uri}/ms/{name}/X"
        layers = list(measurement.X.keys()) if "X" in measurement else []
        preferred = [candidate for candidate in (layer, *LAYERS) if candidate in layers]
        if not preferred and len(layers) != 1:
            raise ValueError(
                f"{label}: got layers {', '.join(layers) or 'none'}; name the one with the counts (layer=)"
            )
        used = preferred[0] if preferred else layers[0]
        if layer is not None and used != layer:
            _log.info("%s has no layer %r: %r is read", label, layer, used)
        array = measurement.X[used]
        if not isinstance(array, self._soma.SparseNDArray):
            raise ValueError(
                f"{label}/{used}: got a dense array; only sparse ones are streamed: run `liam-scale ingest`"
            )
        id_column = _first_known(measurement.var.keys(), FEATURE_ID_COLUMNS)
        names = ["soma_joinid"] if id_column is None else ["soma_joinid", id_column]
        var = measurement.var.read(column_names=names).concat().to_pandas().sort_values("soma_joinid")
        return SomaMatrix(
            array,
            joinids=self._joinids,
            feature_joinids=var["soma_joinid"].to_numpy(np.int64),
            feature_names=var[names[-1]].to_numpy().astype(str),
            label=f"{label}/{used}",
        )

    def _modality_schema(self, name: str, part: _Part) -> ModalitySchema:
        matrix = part.matrix
        return ModalitySchema(
            name=name,
            num_cells=len(self._joinids) if part.cells is None else len(part.cells),
            num_features=matrix.num_features,
            # SparseNDArray.nnz reads the whole array in one piece where fragments overlap: 1.2 GB for 60,000 cells.
            num_nonzeros=int(matrix.counts().sum()),
            value_dtype=matrix.value_dtype.name,
            features_sha256=sha256_of_names(matrix.feature_names),
        )

    @property
    def _home(self) -> str:
        """Address of the measurement that holds the embeddings: the first of the modalities."""
        return str(self._experiment.ms[next(iter(self._parts.values())).measurement].uri)


def _import_tiledbsoma(uri: str) -> Any:
    try:
        import tiledbsoma
    except ImportError as error:
        raise ValueError(
            f"store {uri}: got a TileDB-SOMA experiment, and tiledbsoma cannot be imported ({error});"
            f' run `pip install "liam-scale[soma]"`'
        ) from None
    return tiledbsoma


def _first_known(columns: Any, candidates: tuple[str, ...]) -> str | None:
    present = set(columns)
    return next((candidate for candidate in candidates if candidate in present), None)


def _choose_measurements(names: list[str], uri: str, wanted: Mapping[str, str] | None) -> dict[str, str]:
    """Measurement of each modality."""
    if wanted is not None:
        for modality, name in wanted.items():
            if name not in names:
                raise ValueError(f"measurements[{modality!r}]: got {name!r}; {uri} has {', '.join(names)}")
        return {check_modality(modality): name for modality, name in wanted.items()}
    chosen: dict[str, str] = {}
    for name in names:
        known = modality_of(name)
        if known is None:
            _log.info("%s: measurement %r is left out, as it is none of %s", uri, name, ", ".join(MODALITIES))
        elif known in chosen:
            raise ValueError(
                f"store {uri}: got two measurements that mean {known!r}, {chosen[known]!r} and {name!r};"
                f" choose one (measurements={{{known!r}: {name!r}}})"
            )
        else:
            chosen[known] = name
    if not chosen:
        raise ValueError(
            f"store {uri}: got measurements {', '.join(names) or 'none'}, of which no name tells the modality;"
            f" name one, for example measurements={{'rna': {names[0] if names else 'RNA'!r}}}"
        )
    return chosen
