"""Looking at a whole store, at every checksum, offset, code, name and count: all that is wrong is told.

Of a store that ingest made, chunks are compared with their checksums and decoded where their numbers say something
that no checksum does. Memory is that of a few chunks, and 10 bytes a cell.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from loaders.csr import SORTED, inspect_columns, row_sums
from loaders.formats.compressed import CompressedRows, RowOffsets
from loaders.formats.damage import Damaged, DamagedChunk
from loaders.formats.frame import Frame
from loaders.formats.root import Address, describe_address, is_soma, open_root
from loaders.formats.sealed import open_sealed, verify_array
from loaders.prefetch import Prefetch, Task, Workers
from loaders.schema import SCHEMA_KEY, ModalitySchema, Schema, sha256_of_names
from loaders.sizing import default_threads
from loaders.stores import Store, open_store
from loaders.stores.chosen import WHERE_ATTRIBUTE
from loaders.stores.store import Modality, own_modality, own_schema

_ENTRIES_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 1 << 18
_AHEAD = 8


@dataclass(frozen=True)
class Finding:
    """Something wrong with a store, or something that cannot be checked."""

    array: str
    what: str

    def __str__(self) -> str:
        return f"{self.array}: {self.what}" if self.array else self.what


@dataclass(repr=False)
class Report:
    """What was found in a store."""

    store: str
    damages: list[Finding] = field(default_factory=list)
    unchecked: list[Finding] = field(default_factory=list)
    bytes: int = 0
    """Of the store's files on a local disk."""
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        return not self.damages

    def __repr__(self) -> str:
        what = "sound" if self.is_sound else "damaged"
        lines = [f"{self.store}: {what} ({self.bytes / 1e6:,.1f} MB in {self.seconds:,.1f} s)"]
        lines += [f"  {damage}" for damage in self.damages]
        return "\n".join([*lines, *(f"  not checked: {finding}" for finding in self.unchecked)])

    def add(self, array: str, what: str) -> None:
        finding = Finding(array, what)
        if finding not in self.damages:
            self.damages.append(finding)

    @contextmanager
    def noting(self, array: str) -> Iterator[None]:
        """Go on after what is wrong within the block."""
        try:
            yield
        except Damaged as error:
            self.add(error.array, error.what)
        except Exception as error:  # those of codecs and of anndata are of every kind
            self.add(array, f"it cannot be used ({type(error).__name__}: {error})")


def check_store(address: Address, *, threads: int | None = None) -> Report:
    """Look at all of a store.

    Parameters
    ----------
    address
        A store that ingest made, or whatever else `open_store` opens: of such a one everything is read, and the report
        says what cannot be known.
    threads
        Default: the CPUs of this process, at most 4.

    Returns
    -------
    Report
        `is_sound`, and `damages`: the array and what is wrong with it, of each that was found.

    Raises
    ------
    ValueError
        There is no store, or there are to be no threads.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}; give at least 1")
    start = time.perf_counter()
    report = Report(describe_address(address))
    report.bytes = bytes_of(Path(report.store))
    workers = Workers(threads or default_threads(), name="check")
    try:
        root = None if is_soma(address) else open_root(address)
        if root is None or SCHEMA_KEY not in root.attrs or not isinstance(root, zarr.Group):
            _check_foreign(open_store(address), report)
            return report
        schema = own_schema(root, report.store)
        _check_own(root, schema, report, workers)
    except Damaged as error:
        report.add(error.array, error.what)
    finally:
        workers.close()
        report.seconds = round(time.perf_counter() - start, 3)
    return report


def bytes_of(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _check_own(root: zarr.Group, schema: Schema, report: Report, workers: Workers) -> None:
    if schema.metadata is None:
        report.unchecked.append(Finding("", "ingested by an older version, with checksums on the counts alone"))
    if root.attrs.get("encoding-type") != "MuData":
        report.add("zarr.json", f"its encoding-type is {root.attrs.get('encoding-type')!r}, ingest wrote 'MuData'")
    sealed = open_sealed(root, report.store, schema.metadata or {})
    arrays = _arrays(root, sealed, schema.metadata or {}, report)
    counts = {f"mod/{name}/X/{part}" for name in schema.modalities for part in ("data", "indices")}
    checked = [array for path, array in arrays.items() if path not in counts]
    tasks = (workers.submit(partial(_verify, array), priority=0) for array in checked)
    for found in Prefetch(workers, tasks, ahead=_AHEAD):
        for error in found:
            report.add(error.array, error.what)
    _check_cells(sealed, schema, report)
    for path, array in arrays.items():
        if path.startswith("obsm/") and array.dtype.kind == "f" and array.ndim == 2:
            _check_embedding(path, array, schema.num_cells, report)
    for name, told in schema.modalities.items():
        with report.noting(f"mod/{name}"):
            held = own_modality(sealed, name, report.store, schema)
            _check_modality(held, told, report, workers, chunk=sealed[f"mod/{name}/X/data"].chunks[0])


def _arrays(root: zarr.Group, sealed: zarr.Group, metadata: dict[str, str], report: Report) -> dict[str, zarr.Array]:
    """Arrays by path: those that ingest wrote, and what others have added."""
    arrays = {}
    for path in sorted({*metadata, *_paths(root)}):
        with report.noting(path):
            node = sealed[path]
            if not isinstance(node, zarr.Array):
                continue
            arrays[path] = node
            codecs = [
                *node.metadata.codecs,
                *(c for outer in node.metadata.codecs for c in getattr(outer, "codecs", ())),
            ]
            if not any(isinstance(codec, Crc32cCodec) for codec in codecs):
                report.unchecked.append(Finding(path, "another program wrote it, without checksums"))
            elif path not in metadata and metadata and "liam_scale_sha256" not in node.attrs:
                report.unchecked.append(Finding(path, "added without a hash of its metadata; embed again"))
    return arrays


def _verify(array: zarr.Array) -> list[Damaged]:
    return list(verify_array(array))


def _paths(root: zarr.Group) -> Iterator[str]:
    """Arrays and groups below a root."""
    backend = root.store_path.store
    if isinstance(backend, LocalStore):
        folder = backend.root / root.path
        yield from (str(file.parent.relative_to(folder)) for file in folder.rglob("zarr.json") if file.parent != folder)


def _check_cells(sealed: zarr.Group, schema: Schema, report: Report) -> None:
    with report.noting("obs"):
        obs = Frame(sealed["obs"], report.store)
        with report.noting("obs/_index"):
            ids = obs.index()
            _check_unique("obs/_index", pd.Index(ids.astype(object)), report)
            if sha256_of_names(map(str, ids)) != schema.cells_sha256:
                report.add("obs/_index", "the ids of the cells are not those that ingest wrote")
        for name in schema.obs_columns:
            with report.noting(f"obs/{name}"):
                element = sealed["obs"][name]
                if isinstance(element, zarr.Group) and "codes" in element:
                    _check_codes(f"obs/{name}", element, report)
                elif len(obs.column(name)) != schema.num_cells:
                    report.add(f"obs/{name}", f"it is not of {schema.num_cells} cells")


def _check_codes(path: str, column: zarr.Group, report: Report) -> None:
    codes, number = np.asarray(column["codes"][:]), column["categories"].shape[0]
    wrong = np.flatnonzero((codes < -1) | (codes >= number))
    if len(wrong):
        what = f"{len(wrong)} codes name no category, the first that of cell {wrong[0]}: {codes[wrong[0]]} of {number}"
        report.add(f"{path}/codes", what)
    _check_unique(f"{path}/categories", pd.Index(column["categories"][:]), report)


def _check_unique(path: str, names: pd.Index, report: Report) -> None:
    if not names.is_unique:
        report.add(path, f"{names[names.duplicated()][0]!r} stands there more than once")


def _check_embedding(path: str, array: zarr.Array, num_cells: int, report: Report) -> None:
    if array.shape[0] != num_cells:
        report.add(path, f"it is of {array.shape[0]} cells, the store has {num_cells}")
    for start in range(0, array.shape[0], _ROWS_AT_ONCE):
        with report.noting(path):
            values = np.asarray(array[start : start + _ROWS_AT_ONCE])
            is_left_out = np.isnan(values).all(axis=1) & (WHERE_ATTRIBUTE in array.attrs)
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1) & ~is_left_out) + start
            if len(bad):
                report.add(path, f"values of {len(bad)} cells are not finite, the first those of cell {bad[0]}")


def _check_modality(held: Modality, told: ModalitySchema, report: Report, workers: Workers, *, chunk: int) -> None:
    where, matrix, offsets = f"mod/{told.name}", held.matrix, None
    assert isinstance(matrix, CompressedRows), matrix
    with report.noting(f"{where}/var"):
        _check_unique(f"{where}/var", pd.Index(held.feature_names().astype(object)), report)
    with report.noting(f"obsmap/{told.name}"):
        held.rows()
    with report.noting(f"{where}/X/indptr"):
        offsets = matrix.offsets()
        if offsets.num_entries != told.num_nonzeros:
            report.add(f"{where}/X", f"it has {offsets.num_entries} entries, ingest wrote {told.num_nonzeros}")
    sums = np.zeros(told.num_cells)
    checksums: dict[str, int | None] = {"data": 0, "indices": 0}
    tasks = _parts(matrix, offsets, workers, step=max(1, _ENTRIES_AT_ONCE // chunk) * chunk, chunk=chunk)
    for part in Prefetch(workers, tasks, ahead=_AHEAD):
        for name, what in part.wrong:
            report.add(f"{where}/X/{name}", what)
        if part.sums is not None:
            sums[part.start : part.start + len(part.sums)] += part.sums
        for name, held_crc in checksums.items():
            read = part.arrays.get(name)
            checksums[name] = None if held_crc is None or read is None else google_crc32c.extend(held_crc, read)
    _check_sums(where, held, told, report, sums if offsets is not None and None not in checksums.values() else None)
    expected = told.counts_crc32c or ""
    found = {**checksums, "indptr": None if offsets is None else _crc_of_offsets(offsets)}
    for place, (name, value) in enumerate(found.items()):
        if expected and value is not None and f"{value:08x}" != expected[8 * place : 8 * place + 8]:
            report.add(f"{where}/X/{name}", "its chunks are whole, but not those that ingest wrote in this order")


def _check_sums(
    where: str, held: Modality, told: ModalitySchema, report: Report, sums: npt.NDArray[np.float64] | None
) -> None:
    path = f"{where}/obs/total_counts"
    with report.noting(path):
        totals = held.totals()
        if totals.shape != (told.num_cells,):
            report.add(path, f"it is of {len(totals)} cells, the counts of {told.num_cells}")
        elif sums is not None and not np.allclose(totals, sums, rtol=1e-6):
            rows = np.flatnonzero(~np.isclose(totals, sums, rtol=1e-6))
            report.add(
                path, f"{len(rows)} are not the sum of the counts of their cell, the first that of row {rows[0]}"
            )


def _crc_of_offsets(offsets: RowOffsets) -> int:
    crc, step = google_crc32c.value(offsets.between(0, 0)), _ROWS_AT_ONCE
    for start in range(0, offsets.num_rows, step):
        crc = google_crc32c.extend(crc, offsets.between(start, min(offsets.num_rows, start + step))[1:])
    return int(crc)


@dataclass(frozen=True)
class _Part:
    """Entries of a matrix that were looked at.

    Attributes
    ----------
    wrong
        Array and what is wrong with it.
    arrays
        Those that could be read.
    sums
        Of the values of the rows from `start` on, as far as they lie within; None where the rows are not known.
    """

    wrong: list[tuple[str, str]]
    arrays: dict[str, npt.NDArray[Any]]
    start: int = 0
    sums: npt.NDArray[np.float64] | None = None


def _parts(
    matrix: CompressedRows, offsets: RowOffsets | None, workers: Workers, *, step: int, chunk: int
) -> Iterator[Task[_Part]]:
    total = max(entries.length for entries in matrix.entries.values())
    for first in range(0, total, step):
        last = min(total, first + step)
        yield workers.submit(partial(_look, matrix, offsets, first, last, chunk), priority=0)


def _look(matrix: CompressedRows, offsets: RowOffsets | None, first: int, last: int, chunk: int) -> _Part:
    """Look at the entries [first, last), which begin with a chunk."""
    wrong, arrays = [], {}
    for name, entries in matrix.entries.items():
        array: npt.NDArray[Any] = np.empty(min(last, entries.length) - first, entries.dtype)
        try:
            entries.read_into(first, array)
            arrays[name] = array
        except Exception:  # those of codecs and backends are of every kind
            wrong += _each_chunk(matrix, name, first, last, chunk)
    values = arrays.get("data")
    if values is not None and (place := _first_wrong(values)) is not None:
        wrong.append(("data", f"{values[place]} is no count (entry {first + place})"))
    if offsets is None or len(arrays) < 2:
        return _Part(wrong, arrays)
    start, stop = offsets.rows_of(first, last)
    edges = np.clip(offsets.between(start, stop), first, last) - first
    row, state = inspect_columns(edges, arrays["indices"], matrix.num_features)
    if state != SORTED:
        wrong.append(("indices", f"features of row {start + row} are not ascending within {matrix.num_features}"))
    return _Part(wrong, arrays, start, row_sums(edges, values))


def _first_wrong(values: npt.NDArray[Any]) -> int | None:
    """Place of the first value that is not finite or is negative; integers of a store are neither."""
    if values.dtype.kind != "f":
        return None
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    return int(wrong[0]) if len(wrong) else None


def _each_chunk(matrix: CompressedRows, name: str, first: int, last: int, chunk: int) -> list[tuple[str, str]]:
    entries, wrong = matrix.entries[name], []
    for start in range(first, min(last, entries.length), chunk):
        array: npt.NDArray[Any] = np.empty(min(chunk, entries.length - start), entries.dtype)
        try:
            entries.read_into(start, array)
        except Exception as error:  # as above
            wrong.append((name, _name_chunk(matrix, name, error, start // chunk)))
    return wrong


def _name_chunk(matrix: CompressedRows, name: str, error: Exception, chunk: int) -> str:
    if not isinstance(error, DamagedChunk):
        return f"chunk {chunk}: {type(error).__name__}: {error}"
    try:
        return matrix.damaged(name, error, 0, matrix.num_rows).what
    except (ValueError, RuntimeError):  # no offsets say which cells
        return f"chunk {chunk}: {error} ({error.file})"


def _check_foreign(store: Store, report: Report) -> None:
    """What another program wrote has no schema to be held against."""
    report.unchecked.append(
        Finding(
            "",
            "another program made it: without checksums a number that changed into another count is not found;"
            " an ingest makes a store that can be checked",
        )
    )
    with report.noting("obs"):
        _check_unique("obs", pd.Index(store.cell_ids(0, store.schema.num_cells).astype(object)), report)
        store.obs_frame()
    for name in store.schema.modalities:
        with report.noting(name):
            _check_unique(f"features of {name}", pd.Index(store.feature_names(name).astype(object)), report)
        matrix = store.matrix(name)
        for start, stop in matrix.ranges(64 << 20):
            with report.noting(name):
                if _first_wrong(matrix.read(start, stop).values) is not None:
                    report.add(name, f"values of the rows {start} to {stop - 1} are not all finite and at least 0")
    store.close()
