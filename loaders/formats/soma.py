"""A TileDB-SOMA experiment as a source: one or several measurements, each with a sparse X.

X is read by whole rows of tiles: a tile is decoded as a whole, so a read of 64 cells costs as much as one of the tile's
2,048. A measurement does not say which cells it has: among several measurements, a cell has those where it has a count.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.formats.frame import Frame, ObsTable, Strings, View
from loaders.formats.matrix import once
from loaders.formats.soma_matrix import SomaMatrix
from loaders.formats.source import Part, Say, Source
from loaders.modalities import PRESETS, Kinds, check_modality, modality_of, ordered, saying
from loaders.schema import check_unique

BUFFER_BYTES = 8 << 20
"""Bytes of one column buffer of TileDB-SOMA, three per read; its default is 1 GiB. 4 to 128 MB read equally fast."""

LAYERS = ("counts", "raw", "data")
"""X layers in the order of preference where none is named and there are several."""

CELL_ID_COLUMNS = ("obs_id", "_index", "index", "cell_id", "barcode")
FEATURE_ID_COLUMNS = ("var_id", "_index", "index", "feature_id", "gene_id", "feature_name")
"""Columns that hold the names of cells and features, the first that exists; without one the joinids serve as names."""


class SomaExperiment:
    """Chosen cells of a TileDB-SOMA experiment.

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
    kinds
        What modalities of other names than the known ones are.
    say
        Takes remarks on what was assumed.

    Attributes
    ----------
    source
        Its cells and modalities.
    soma, context
        The module tiledbsoma, and the one context whose thread pools and buffers all reads share.
    joinids
        (n,) ids of the chosen cells, ascending.
    home
        Address of the measurement that holds the embeddings: the first of the modalities.

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
        kinds: Kinds = PRESETS,
        say: Say,
    ) -> None:
        self.uri = str(uri)
        self.soma = _import_tiledbsoma(self.uri)
        self._filter, self._say, self._kinds = obs_filter, say, {**PRESETS, **kinds}
        self.context = self.soma.SOMATileDBContext(
            tiledb_config={"soma.init_buffer_bytes": BUFFER_BYTES, **(tiledb_config or {})}
        )
        self._experiment = self._open_experiment()
        self.obs_names = list(self._experiment.obs.keys())
        self.id_column = _first_known(self.obs_names, CELL_ID_COLUMNS)
        self.joinids = self.read_obs([])["soma_joinid"].to_numpy(np.int64)
        try:
            chosen = _choose_measurements(list(self._experiment.ms.keys()), self.uri, measurements, self._kinds, say)
            parts = self._open_parts(chosen, layer)
        except self.soma.SOMAError as error:
            raise RuntimeError(
                f"store {self.uri}: its measurements cannot be opened: {error}; check or copy the experiment"
            ) from error
        self.home = str(self._experiment.ms[chosen[next(iter(parts))]].uri)
        frame = _SomaFrame(self)
        ids = frame.index()
        check_unique(f"{self.uri}: cell ids", pd.Index(ids.astype(object)), "make them unique in the experiment")
        self.source = Source(self.uri, (Path(self.uri),), ids, parts, ObsTable(View(frame, None), {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._experiment.close()

    def _open_experiment(self) -> Any:
        try:
            opened = self.soma.open(self.uri, context=self.context)
        except self.soma.SOMAError as error:
            raise ValueError(f"store {self.uri}: got no TileDB-SOMA experiment ({error}); check the address") from None
        if not isinstance(opened, self.soma.Experiment):
            kind = opened.soma_type
            opened.close()
            raise ValueError(f"store {self.uri}: got a TileDB-SOMA object of type {kind}; give the whole experiment")
        return opened

    def read_obs(self, columns: list[str]) -> pd.DataFrame:
        """Columns of the chosen cells, ordered by joinid, with the column soma_joinid."""
        names = list(dict.fromkeys(["soma_joinid", *columns]))
        try:
            table = self._experiment.obs.read(column_names=names, value_filter=self._filter).concat()
        except self.soma.SOMAError as error:
            if self._filter is None:
                raise RuntimeError(f"obs of {self.uri} cannot be read: {error}; check or copy it") from error
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"obs filter: got {self._filter!r}, which TileDB-SOMA refuses ({reason}); columns of {self.uri} are:"
                f" {', '.join(self.obs_names)}"
            ) from None
        if not len(table):
            raise ValueError(f"obs filter: got {self._filter!r}, which no cell of {self.uri} meets; loosen it")
        frame = table.to_pandas(integer_object_nulls=True)
        return frame.sort_values("soma_joinid", kind="stable", ignore_index=True)

    def _open_parts(self, chosen: Mapping[str, str], layer: str | None) -> dict[str, Part]:
        parts = {}
        for modality in ordered(chosen):
            matrix, names = self._open_matrix(chosen[modality], layer)
            rows = None
            if len(chosen) > 1:
                self._say(f"{self.uri}: looking for the cells that have {chosen[modality]}")
                present = matrix.lengths() > 0
                if not present.all():
                    matrix = matrix.of_cells(np.flatnonzero(present))
                    rows = np.where(present, np.cumsum(present) - 1, -1)
            var = pd.DataFrame(index=pd.Index(names, dtype=object))
            parts[modality] = Part(modality, self._kinds[modality], matrix, var, None, rows)
        return parts

    def _open_matrix(self, name: str, layer: str | None) -> tuple[SomaMatrix, npt.NDArray[np.object_]]:
        measurement = self._experiment.ms[name]
        label = f"{self.uri}/ms/{name}/X"
        layers = list(measurement.X.keys()) if "X" in measurement else []
        known = ", ".join(layers) or "none"
        if layer is not None and layer not in layers:
            raise ValueError(f"layer: {label} has no layer {layer!r}; it has {known}: name one of them")
        preferred = [candidate for candidate in (layer, *LAYERS) if candidate in layers]
        if not preferred and len(layers) != 1:
            raise ValueError(f"{label}: got layers {known}; name the one with the counts (layer=)")
        used = preferred[0] if preferred else layers[0]
        array = measurement.X[used]
        if not isinstance(array, self.soma.SparseNDArray):
            raise ValueError(f"{label}/{used}: got a dense array, expected a sparse one; write it as a SparseNDArray")
        id_column = _first_known(measurement.var.keys(), FEATURE_ID_COLUMNS)
        columns = ["soma_joinid"] if id_column is None else ["soma_joinid", id_column]
        var = measurement.var.read(column_names=columns).concat().to_pandas().sort_values("soma_joinid")
        ids = var["soma_joinid"].to_numpy(np.int64)
        matrix = SomaMatrix(array, joinids=self.joinids, feature_joinids=ids, where=f"{label}/{used}")
        return matrix, var[columns[-1]].to_numpy().astype(str).astype(object)


class _SomaFrame(Frame):
    """The obs of the chosen cells."""

    def __init__(self, experiment: SomaExperiment) -> None:
        self._experiment = experiment
        self._ids = once(self._read_ids)

    @property
    def columns(self) -> list[str]:
        held = self._experiment
        return [name for name in held.obs_names if name not in ("soma_joinid", held.id_column)]

    def index(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        return self._ids()[start:stop]

    def column(self, name: str) -> pd.Series:
        return self._experiment.read_obs([name])[name]

    def _read_ids(self) -> npt.NDArray[Any]:
        held = self._experiment
        ids = held.joinids if held.id_column is None else held.read_obs([held.id_column])[held.id_column].to_numpy()
        return ids.astype(str).astype(object).astype(Strings)


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


def _choose_measurements(
    names: list[str], uri: str, wanted: Mapping[str, str] | None, kinds: Kinds, say: Say
) -> dict[str, str]:
    """Measurement of each modality."""
    if wanted is not None:
        for modality, name in wanted.items():
            if name not in names:
                raise ValueError(f"measurements[{modality!r}]: got {name!r}; {uri} has {', '.join(names)}")
        return {check_modality(modality, kinds): name for modality, name in wanted.items()}
    chosen: dict[str, str] = {}
    for name in names:
        known = modality_of(name, kinds)
        if known is None:
            known_ones = ", ".join(ordered(kinds))
            say(f"{uri}: measurement {name!r} is left out; known are {known_ones}; to take it, {saying(name)}")
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
