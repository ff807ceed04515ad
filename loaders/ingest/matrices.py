"""All matrices of a store: sources are scanned in parts, the rows sorted into runs, the runs merged into shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, as_completed, wait
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.csr import index_dtype, narrowest_dtype, offsets_of, remark_on_largest
from loaders.formats.features import Joined
from loaders.formats.matrix import ENTRY_BYTES
from loaders.formats.source import Part, Say, Source
from loaders.ingest.cells import Cells
from loaders.ingest.runs import row_table
from loaders.ingest.shards import CHUNKS_PER_SHARD
from loaders.ingest.sources import Named
from loaders.ingest.tasks import Job, Record, Shard, save_runs, scan, scanned, write_shard
from loaders.ingest.workers import Workers
from loaders.ingest.writer import ModalityLayout, WrittenRows
from loaders.modalities import Kind
from loaders.progress import Progress
from loaders.schema import sha256_of_json

_LEAST_ENTRIES = 1 << 20
"""Of a part of a source: below it a task costs more than its rows."""

_PARTS_PER_SLOT = 4
"""Parts for each task at a time, so that all end together."""


@dataclass(frozen=True)
class Atlas:
    """Cells and features of the store to be, and where they come from."""

    sources: Sequence[Source]
    cells: Cells
    joined: Mapping[str, Joined]
    order: npt.NDArray[np.int64]
    """(n,) cell at each place of the store."""

    def having(self, modality: str) -> Iterator[tuple[int, int, Source, Part]]:
        """Number, first cell, source and part of the sources that have a modality."""
        for number, (start, source) in enumerate(zip(self.cells.starts[:-1].tolist(), self.sources, strict=True)):
            if modality in source.parts:
                yield number, start, source, source.parts[modality]

    def kind(self, modality: str) -> Kind:
        """What a modality is, as all sources say that have it."""
        _, _, _, part = next(self.having(modality))
        return part.kind

    def present(self, modality: str) -> npt.NDArray[np.bool_]:
        """(n,) whether the cell at each place of the store has the modality."""
        has = np.zeros(self.cells.num_cells, bool)
        for _, start, source, part in self.having(modality):
            has[start : start + len(source.cell_ids)] = True if part.rows is None else part.rows >= 0
        return has[self.order]

    def maps(self, modality: str) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Per source: its number, the store's column of its features, and the place of its matrix's rows (-1: none)."""
        place_of_cell = np.empty(self.cells.num_cells, np.int64)
        place_of_cell[self.order] = np.cumsum(self.present(modality)) - 1
        for (number, start, source, part), columns in zip(
            self.having(modality), self.joined[modality].columns, strict=True
        ):
            cells = np.arange(len(source.cell_ids))
            rows = cells if part.rows is None else part.rows
            places = np.full(part.matrix.num_rows, -1, np.int64)
            places[rows[rows >= 0]] = place_of_cell[start + cells[rows >= 0]]
            yield number, columns, places


def key_of(atlas: Atlas, named: Sequence[Named], layer: str | None) -> str:
    """What decides the result of every task: which counts go where."""
    arrays = [
        [modality, number, *(hashlib.sha256(part.tobytes()).hexdigest() for part in maps)]
        for modality in atlas.joined
        for number, *maps in atlas.maps(modality)
    ]
    files = [[path, _stamp(path)] for source in named for path in source.absolute().files.values()]
    return sha256_of_json([1, files, layer, arrays])


def _stamp(path: str) -> Any:
    """What changes when a file or folder is written anew; of an address nothing tells, so no two are alike."""
    if "://" in path:
        return uuid4().hex
    folders = [folder for folder, *_ in os.walk(path)]
    return [[os.path.getmtime(name), os.path.getsize(name)] for name in (sorted(folders) or [path])]


def cut(atlas: Atlas, *, memory: int, slots: int) -> dict[str, list[tuple[int, int, int]]]:
    """Per modality the parts that are scanned, as source, first row and end.

    Parameters
    ----------
    memory
        Bytes of one task.
    slots
        Tasks at a time, over all processes.
    """
    parts = {}
    for modality, joined in atlas.joined.items():
        matrices = [(number, part.matrix) for number, _, _, part in atlas.having(modality)]
        share = sum(matrix.estimated_nonzeros() for _, matrix in matrices) // (_PARTS_PER_SLOT * slots)
        most = memory // 2 // (index_dtype(len(joined.var)).itemsize + 2)
        entries = min(most, max(_LEAST_ENTRIES, share))
        parts[modality] = [
            (number, start, stop) for number, matrix in matrices for start, stop in matrix.parts(entries * ENTRY_BYTES)
        ]
    return parts


def write_matrices(
    atlas: Atlas,
    job: Job,
    parts: Mapping[str, Sequence[tuple[int, int, int]]],
    workers: Workers,
    say: Say,
    *,
    is_shown: bool,
) -> dict[str, tuple[ModalityLayout, WrittenRows]]:
    """Run all tasks, and what is known of each modality then. After an error none of them is at work any more."""
    submitted: list[Future[Record]] = []

    def submit(task: Callable[..., Record], *arguments: Any) -> Future[Record]:
        submitted.append(workers.executor.submit(task, job, *arguments))
        return submitted[-1]

    try:
        return _write_matrices(atlas, job, parts, submit, say, is_shown=is_shown)
    except CancelledError:  # The scheduler is gone, and with it who could be asked.
        raise
    except BaseException:
        wait([future for future in submitted if not future.cancel()])
        workers.settle(job.spill)
        raise


def _write_matrices(
    atlas: Atlas,
    job: Job,
    parts: Mapping[str, Sequence[tuple[int, int, int]]],
    submit: Callable[..., Future[Record]],
    say: Say,
    *,
    is_shown: bool,
) -> dict[str, tuple[ModalityLayout, WrittenRows]]:
    def progress(name: str, num_cells: int) -> Progress:
        return Progress(name, num_cells, unit="cells", is_shown=is_shown, unit_scale=True)

    scans: dict[str, dict[Future[Record], int]] = {}
    for modality, joined in atlas.joined.items():
        for number, columns, places in atlas.maps(modality):
            job.save_array(f"{modality}.{number}.columns", columns)
            job.save_array(f"{modality}.{number}.places", places)
        scans[modality] = {
            submit(scan, modality, number, (start, stop), len(joined.var)): stop - start
            for number, start, stop in parts[modality]
        }
    waiting = {}
    for modality, joined in atlas.joined.items():
        with progress(f"{modality}: read and check", sum(scans[modality].values())) as bar:
            records = _results(scans[modality], bar)
        num_rows = int(atlas.present(modality).sum())
        for remark in _remarks(joined, modality, records):
            say(remark)
        names = [f"{modality}.scan.{number}.{start}-{stop}" for number, start, stop in parts[modality]]
        runs = [(job.spill / name, run) for name, record in zip(names, records, strict=True) for run in scanned(record)]
        save_runs(job, modality, runs)
        lengths, totals = row_table(runs, num_rows)
        dtype = narrowest_dtype(max((record["maximum"] for record in records), default=0))
        layout = ModalityLayout(joined.var, dtype, int(lengths.sum()) / max(1, num_rows), atlas.kind(modality))
        shards = list(_shards(modality, layout, offsets_of(lengths)))
        futures = {submit(write_shard, shard): shard.rows[1] - shard.rows[0] for shard in shards}
        waiting[modality] = layout, lengths, totals, shards, futures
    written = {}
    for modality, (layout, lengths, totals, shards, futures) in waiting.items():
        with progress(f"{modality}: shuffle and write", sum(futures.values())) as bar:
            records = _results(futures, bar)
        checksums = {"data": 0, "indices": 0}
        for shard, record in zip(shards, records, strict=True):
            for part, dtype in layout.dtypes.items():
                num_bytes = shard.num_entries * dtype.itemsize
                checksums[part] = joined_crc(checksums[part], record["checksums"][part], num_bytes)
        folders = tuple(job.spill / f"{modality}.shard.{shard.number}" for shard in shards)
        rows = WrittenRows(lengths, totals, (checksums["data"], checksums["indices"]), folders)
        written[modality] = layout, rows
    return written


def _results(futures: Mapping[Future[Record], int], progress: Progress) -> list[Record]:
    """The results in the order of the futures; the first failure ends it."""
    for future in as_completed(futures):
        future.result()
        progress.advance(futures[future])
    return [future.result() for future in futures]


def _shards(modality: str, layout: ModalityLayout, indptr: npt.NDArray[np.int64]) -> Iterator[Shard]:
    length = layout.chunk_length * CHUNKS_PER_SHARD
    dtypes = {part: dtype.name for part, dtype in layout.dtypes.items()}
    for number in range(-(-int(indptr[-1]) // length)):
        first, last = number * length, min((number + 1) * length, int(indptr[-1]))
        start = int(np.searchsorted(indptr, first, side="right")) - 1
        stop = int(np.searchsorted(indptr, last, side="left"))
        skipped = first - int(indptr[start])
        yield Shard(modality, number, (start, stop), skipped, last - first, layout.chunk_length, dtypes)


def _remarks(joined: Joined, modality: str, records: Sequence[Record]) -> Iterator[str]:
    if num_empty := sum(record["num_empty"] for record in records):
        yield f"{modality}: {num_empty} cells have no counts in the features kept; they stay as empty rows"
    if num_duplicates := sum(record["num_duplicates"] for record in records):
        is_one_to_one = all(pd.Index(own[own >= 0]).is_unique for own in joined.columns)
        what = "stood twice in a row of the matrix" if is_one_to_one else "came to the peak of another of their cell"
        yield f"{modality}: {num_duplicates} entries {what} and were added up"
    if large := remark_on_largest(max((record["maximum"] for record in records), default=0)):
        yield f"{modality}: {large}"


def joined_crc(first: int, second: int, num_bytes: int) -> int:
    """crc32c of two texts one after the other, of which the second has so many bytes.

    A checksum is a linear map of the bits: `num_bytes` zeros move the first one on, by squaring as zlib does it.
    """
    # What one zero bit does to each bit of the register.
    step = [0x82F63B78, *(1 << bit for bit in range(31))]
    count = 8 * num_bytes
    while count:
        if count & 1:
            first = _times(step, first)
        step = [_times(step, row) for row in step]
        count >>= 1
    return first ^ second


def _times(matrix: Sequence[int], vector: int) -> int:
    product, bit = 0, 0
    while vector:
        if vector & 1:
            product ^= matrix[bit]
        vector, bit = vector >> 1, bit + 1
    return product
