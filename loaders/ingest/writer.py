"""Writes a store from streams of rows that already stand in their final order.

A store is a MuData in Zarr v3 (docs/data-format.md): the matrices are streamed row by row, everything that has one
entry per cell (ids, obs columns, totals) is written column by column at the end, and the schema last of all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from anndata.io import write_elem

from loaders.csr import SparseRows, index_dtype, offsets_of, row_sums
from loaders.ecosystem import quiet_anndata
from loaders.formats.sealed import CODECS, hash_all_metadata
from loaders.ingest.shards import ShardWriter, create_sharded
from loaders.ingest.staging import Staging, explain_disk_errors
from loaders.modalities import PRESETS, Kind, is_name, ordered
from loaders.schema import SCHEMA_KEY, ModalitySchema, Schema, sha256_of_names
from loaders.sizing import default_threads

CELLS_PER_CHUNK = 256
"""Inner chunks hold about this many cells: small for random windows, still reads of 256 KB and more."""

_MIN_CHUNK_LENGTH = 1024
_OBS_CHUNK = 65_536
"""Cells of one chunk of an obs column."""


@dataclass(frozen=True)
class ModalityLayout:
    """What must be known of a modality before its first row is written."""

    var: pd.DataFrame
    """One row per feature, indexed by unique names."""
    value_dtype: npt.DTypeLike
    """uint8, uint16, uint32 or float32: must hold every value."""
    nonzeros_per_cell: float
    """Mean over cells, exact or estimated; decides the length of the inner chunks."""
    kind: Kind | None = None
    """What it is; None: what its name stands for."""

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Types of the two arrays that are sharded."""
        return {"data": np.dtype(self.value_dtype), "indices": index_dtype(len(self.var))}

    @property
    def chunk_length(self) -> int:
        return max(_MIN_CHUNK_LENGTH, round(CELLS_PER_CHUNK * self.nonzeros_per_cell))


@dataclass(frozen=True)
class WrittenRows:
    """What is known of a matrix whose shards are written.

    Attributes
    ----------
    lengths, totals
        (R,) int64 entries and (R,) float64 sum of each row.
    checksums
        crc32c of all values and of all columns.
    shards
        Folders whose folders `data` and `indices` hold shards that do not stand in the store yet.
    """

    lengths: npt.NDArray[np.int64]
    totals: npt.NDArray[np.float64]
    checksums: tuple[int, int]
    shards: tuple[Path, ...] = ()


class StoreWriter:
    """Builds a store under a temporary name; `finish` gives it its own.

    Used as a context manager: leaving it without `finish`, by whatever exception, removes what was written.

    Parameters
    ----------
    out
        Path of the store.
    modalities
        The layout of each modality, by name.
    overwrite
        Replace a store that exists.
    threads
        Threads that compress; default: the CPUs of this process, at most 4.
    staging
        An existing temporary folder to build in (ingest spills beside the store); its owner discards it.

    Raises
    ------
    ValueError
        `out` exists and `overwrite` is not set; an unknown modality.
    RuntimeError
        The disk is full.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        modalities: Mapping[str, ModalityLayout],
        overwrite: bool = False,
        threads: int | None = None,
        staging: Staging | None = None,
    ) -> None:
        self.out = Path(out)
        for name, layout in modalities.items():
            _check_modality(name, layout)
        self._layouts: dict[str, ModalityLayout] = {}
        self._streams: dict[str, _MatrixWriter] = {}
        self._written: dict[str, WrittenRows] = {}
        self._owns_staging = staging is None
        self._staging = staging or Staging(self.out, overwrite=overwrite)
        self._pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="encode")
        with explain_disk_errors(self.out):
            self._root = zarr.open_group(str(self._staging.path), mode="w", zarr_format=3)
        for name, layout in modalities.items():
            self._layouts[name] = layout
            self._streams[name] = _MatrixWriter(self._staging.path / f"mod/{name}/X", layout, self._pool)

    def take(self, name: str, layout: ModalityLayout, rows: WrittenRows) -> None:
        """Add a modality whose shards others have written."""
        _check_modality(name, layout)
        self._layouts[name], self._written[name] = layout, rows

    def append(self, modality: str, rows: SparseRows) -> None:
        """Add rows at the end of a modality: columns ascending within each, values within the layout's dtype."""
        with explain_disk_errors(self.out):
            self._streams[modality].append(rows)

    def finish(
        self,
        *,
        cell_ids: npt.NDArray[Any],
        obs: Iterable[tuple[str, Any]] | pd.DataFrame = (),
        present: Mapping[str, npt.NDArray[np.bool_]] | None = None,
        modality_obs: Mapping[str, Iterable[tuple[str, Any]]] | None = None,
        is_shuffled: bool = False,
        parts: Sequence[int] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> Schema:
        """Write ids, obs and the schema, and give the store its name.

        Parameters
        ----------
        cell_ids
            (n,) unique ids of all cells in their order.
        obs
            Columns of n entries each (arrays, categoricals or pandas Series), one at a time, or a DataFrame.
        present
            Per modality (n,) bool: the cell has a row in it. A modality left out has a row for every cell.
        modality_obs
            Further columns of a modality's own obs, of as many entries as it has rows.
        is_shuffled
            The cells stand in a random order.
        parts
            Cells of each part of the store, where each stands in a random order of its own.
        provenance
            JSON-like mapping kept in `uns["liam_scale"]`.
        """
        present = present or {}
        columns = ((str(name), obs[name]) for name in obs) if isinstance(obs, pd.DataFrame) else obs
        self._layouts = {name: self._layouts[name] for name in ordered(self._layouts)}
        masks = {name: present.get(name) for name in self._layouts}
        with explain_disk_errors(self.out), quiet_anndata(), zarr.config.set({"array.write_empty_chunks": True}):
            self._written |= {name: stream.close() for name, stream in self._streams.items()}
            matrices = {name: self._write_matrix(name) for name in self._layouts}
            for name, mask in masks.items():
                rows = len(cell_ids) if mask is None else int(mask.sum())
                assert matrices[name].num_cells == rows, (name, matrices[name].num_cells, rows)
            for name, mask in masks.items():
                own = () if modality_obs is None else modality_obs.get(name, ())
                self._write_modality(name, cell_ids if mask is None else cell_ids[mask], own)
            names = self._write_root(cell_ids, columns, masks, provenance)
            schema = Schema(
                num_cells=len(cell_ids),
                modalities=matrices,
                obs_columns=tuple(names),
                is_shuffled=is_shuffled,
                cells_sha256=sha256_of_names(str(cell) for cell in cell_ids),
                metadata=hash_all_metadata(self._staging.path),
                parts=tuple(parts),
            )
            self._root.attrs[SCHEMA_KEY] = schema.to_json()
            self._pool.shutdown()
            for name, written in self._written.items():
                for folder in written.shards:
                    _place(folder, self._staging.path / f"mod/{name}/X")
            self._staging.publish()
        return schema

    def abort(self) -> None:
        """Stop and remove what was written."""
        for stream in self._streams.values():
            stream.abort()
        self._pool.shutdown(cancel_futures=True)
        if self._owns_staging:
            self._staging.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def _write_matrix(self, name: str) -> ModalitySchema:
        """All of a CSR group but its shards."""
        group, layout, rows = self._root.require_group(f"mod/{name}/X"), self._layouts[name], self._written[name]
        indptr = offsets_of(rows.lengths)
        for part, dtype in layout.dtypes.items():
            create_sharded(group, part, length=int(indptr[-1]), dtype=dtype, chunk_length=layout.chunk_length)
        # One chunk per 65,536 cells: a reader that wants all of it makes few requests.
        array = group.create_array("indptr", shape=indptr.shape, chunks=(_OBS_CHUNK,), dtype=np.int64, **CODECS)
        array[:] = indptr
        checksums = (*rows.checksums, google_crc32c.value(indptr))
        num_features = len(layout.var)
        group.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [len(rows.lengths), num_features]}
        )
        return ModalitySchema(
            name=name,
            num_cells=len(rows.lengths),
            num_features=num_features,
            num_nonzeros=int(indptr[-1]),
            value_dtype=layout.dtypes["data"].name,
            features_sha256=sha256_of_names(str(name) for name in layout.var.index),
            counts_crc32c="".join(f"{crc:08x}" for crc in checksums),
            **({} if layout.kind is None else vars(layout.kind)),
        )

    def _write_modality(self, name: str, cell_ids: npt.NDArray[Any], own: Iterable[tuple[str, Any]]) -> None:
        group = self._root[f"mod/{name}"]
        group.attrs.update(_encoding("anndata", "0.1.0"))
        _write_frame(group, "obs", cell_ids, [("total_counts", self._written[name].totals), *own])
        write_elem(group, "var", self._layouts[name].var, dataset_kwargs=CODECS)
        for empty in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            write_elem(group, empty, {})

    def _write_root(
        self,
        cell_ids: npt.NDArray[Any],
        columns: Iterable[tuple[str, Any]],
        masks: Mapping[str, npt.NDArray[np.bool_] | None],
        provenance: Mapping[str, Any] | None,
    ) -> list[str]:
        root = self._root
        root.attrs.update({"axis": 0, **_encoding("MuData", "0.1.0")})
        root["mod"].attrs["mod-order"] = list(self._layouts)
        names = _write_frame(root, "obs", cell_ids, columns)
        features = [layout.var.index for layout in self._layouts.values()]
        write_elem(root, "var", pd.DataFrame(index=features[0].append(features[1:])), dataset_kwargs=CODECS)
        write_elem(root, "uns", {"liam_scale": dict(provenance or {})}, dataset_kwargs=CODECS)
        for empty in ("obsp", "varp"):
            write_elem(root, empty, {})
        for folder in ("obsm", "obsmap", "varm", "varmap"):
            write_elem(root, folder, {})
        start, total = 0, sum(len(index) for index in features)
        for (name, layout), mask in zip(self._layouts.items(), masks.values(), strict=True):
            has = np.ones(len(cell_ids), bool) if mask is None else mask
            of_modality = np.zeros(total, bool)
            of_modality[start : start + len(layout.var)] = True
            start += len(layout.var)
            for axis, belongs in (("obs", has), ("var", of_modality)):
                write_elem(root[f"{axis}m"], name, belongs[:, None], dataset_kwargs=CODECS)
                row = np.where(belongs, np.cumsum(belongs), 0).astype(np.uint32)
                write_elem(root[f"{axis}map"], name, row, dataset_kwargs=CODECS)
        return names


def _check_modality(name: str, layout: ModalityLayout) -> None:
    if not is_name(name) or (layout.kind is None and name not in PRESETS):
        raise ValueError(
            f"modality: got {name!r}, this package knows {', '.join(PRESETS)}; rename it, or give its layout a kind"
        )


class _MatrixWriter:
    """The shards of one modality; row lengths and totals stay in memory (16 bytes a cell)."""

    def __init__(self, folder: Path, layout: ModalityLayout, pool: ThreadPoolExecutor) -> None:
        self._layout = layout
        self._shards = {
            part: ShardWriter(folder / part / "c", dtype=dtype, chunk_length=layout.chunk_length, pool=pool)
            for part, dtype in layout.dtypes.items()
        }
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._totals: list[npt.NDArray[np.float64]] = []
        self._checksums = dict.fromkeys(self._shards, 0)

    def append(self, rows: SparseRows) -> None:
        value_dtype = self._layout.dtypes["data"]
        assert rows.num_features == len(self._layout.var), (rows.num_features, len(self._layout.var))
        assert np.can_cast(rows.values.dtype, value_dtype), (rows.values.dtype, value_dtype)
        self._lengths.append(np.diff(rows.indptr))
        for part, values in (("data", rows.values), ("indices", rows.indices)):
            held = values.astype(self._layout.dtypes[part], copy=False)
            self._shards[part].append(held)
            self._checksums[part] = google_crc32c.extend(self._checksums[part], np.ascontiguousarray(held))
        self._totals.append(row_sums(rows.indptr, rows.values))

    def close(self) -> WrittenRows:
        for shards in self._shards.values():
            shards.close()
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        totals = np.concatenate([np.zeros(0), *self._totals])
        return WrittenRows(lengths, totals, (self._checksums["data"], self._checksums["indices"]))

    def abort(self) -> None:
        for shards in self._shards.values():
            shards.abort()


def _place(shards: Path, matrix: Path) -> None:
    """Put shards into their arrays; where the file system has links, an ingest that is killed now finds them again."""
    for file in shards.glob("*/*"):
        target = matrix / file.parent.name / "c" / file.name
        target.parent.mkdir(exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            os.replace(file, target)


def _encoding(kind: str, version: str) -> dict[str, str]:
    writer = {"encoder": "mudata", "encoder-version": mudata.__version__}
    return {"encoding-type": kind, "encoding-version": version, **writer}


def _write_frame(
    parent: zarr.Group, name: str, index: npt.NDArray[Any], columns: Iterable[tuple[str, Any]]
) -> list[str]:
    """Write an anndata dataframe one column at a time, so that only one column need be in memory."""
    group = parent.require_group(name)
    names = []
    _write_column(group, "_index", index)
    for column, values in columns:
        _write_column(group, column, values)
        names.append(column)
    group.attrs.update(
        {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index", "column-order": names}
    )
    return names


def _write_column(group: zarr.Group, name: str, values: Any) -> None:
    plain = values.array if isinstance(values, pd.Series) else values
    if isinstance(plain, pd.arrays.NumpyExtensionArray):
        plain = plain.to_numpy()
    if isinstance(plain, np.ndarray) and plain.dtype.kind in "UT":
        _write_strings(group, name, plain)
        return
    chunked = isinstance(plain, np.ndarray) and len(plain) > 0
    chunks = {"chunks": (min(_OBS_CHUNK, len(plain)),)} if chunked else {}
    write_elem(group, name, plain, dataset_kwargs={**chunks, **CODECS})


def _write_strings(group: zarr.Group, name: str, values: npt.NDArray[Any]) -> None:
    """Write strings chunk by chunk: as Python objects all at once they would need 100 bytes each."""
    array = group.create_array(name, shape=values.shape, chunks=(_OBS_CHUNK,), dtype="string", **CODECS)
    for start in range(0, len(values), _OBS_CHUNK):
        array[start : start + _OBS_CHUNK] = values[start : start + _OBS_CHUNK].astype(np.dtypes.StringDType())
    array.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
