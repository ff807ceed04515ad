"""Ingest, in order: open, join, look, shuffle each modality through the disk, write what is known of the cells."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from loaders.csr import narrowest_dtype
from loaders.formats.compressed import CompressedRows
from loaders.formats.features import Join, Joined, join_features
from loaders.formats.root import addresses
from loaders.formats.source import Part, Say, Source
from loaders.ingest.cells import Cells, gather_cells, modality_columns, obs_columns
from loaders.ingest.checks import Counted, Place, check_and_map
from loaders.ingest.choice import chosen_cells, chosen_features, without_unused
from loaders.ingest.shuffle import Shuffle, destinations
from loaders.ingest.sources import open_source
from loaders.ingest.writer import ModalityLayout, Staging, StoreWriter, check_out, explain_disk_errors
from loaders.progress import Progress
from loaders.schema import MODALITIES, Schema
from loaders.sizing import default_threads, parse_memory

_LEAST_MEMORY = 2**25
"""32 MiB: below it chunks are so small that the passes crawl."""


def ingest(
    sources: Sequence[str | Path] | str | Path,
    *,
    out: str | Path,
    sample_key: str | None = None,
    sample_from_file: bool = False,
    join: Join = "inner",
    layer: str | None = None,
    where: str | None = None,
    features: Sequence[str] | None = None,
    memory: str | int = "1GiB",
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Schema:
    """Read source files, check their counts, shuffle the cells globally, write one store.

    Parameters
    ----------
    sources
        Paths of .h5ad, .h5mu, 10x .h5 files and AnnData or MuData Zarr folders, with different cells each. Before a
        path, `rna=`, `atac=` or `adt=` says which modality it is; several of these joined by commas
        (`rna=a.h5ad,atac=b.h5ad`) are one source whose cells are paired by their ids. `NAME=` before all of it
        names the sample of the source's cells.
    out
        Path of the store.
    sample_key
        Obs column that becomes `sample`; default the column `sample` where there is one, else each file's name.
    sample_from_file
        Each file's name is the sample, even where there is a column `sample`.
    join
        Features kept where sources differ: "inner" those of all, "outer" those of any (zero where a source lacks one).
    layer
        Layer that holds the counts ("raw" also means `.raw`); default X.
    where
        Keep the cells for which this is true, an expression over obs columns as `pandas.DataFrame.query` takes it:
        "tissue == 'blood' and n_counts > 500".
    features
        Names of the features to keep; a modality of which none is named keeps all.
    memory
        Bytes or a text such as "512MiB" for chunks and shuffling. Beside it the process needs its base (0.3 GB), a
        table of the features and about 150 bytes a cell for ids and one obs column at a time.
    seed
        Seed of the shuffle.
    overwrite
        Replace a store that exists.
    progress
        Show progress and remarks on stderr.

    Raises
    ------
    ValueError
        A source, an option or a count is not what it must be; nothing is left behind.
    RuntimeError
        The disk is full.
    """
    texts = addresses(sources, "sources")
    if not texts:
        raise ValueError("sources: got none; name at least one file, for example a.h5mu")
    if join not in ("inner", "outer"):
        raise ValueError(f"join: got {join!r}; choose inner or outer")
    budget = max(_LEAST_MEMORY, parse_memory(memory))
    out = Path(out)
    check_out(out, overwrite=overwrite)
    say = _Remarks(is_shown=progress)
    with ExitStack() as files, explain_disk_errors(out):
        opened = [open_source(text, layer=layer, files=files, say=say) for text in texts]
        for source in opened:
            if not source.parts:
                raise ValueError(f"{source.label}: got no counts, neither X nor layers; give a file that has them")
        if where is not None:
            opened = chosen_cells(opened, where, say)
        cells = gather_cells(opened, sample_key, say, sample_from_file=sample_from_file)
        joined = _join_all(opened, join, say)
        if features is not None:
            joined = chosen_features(joined, features, say)
        _look(opened, say)
        staging = Staging(out, overwrite=overwrite)
        files.callback(staging.discard)
        if where is not None:
            have = {name for source in opened for name, part in source.parts.items() if _has_cells(part)}
            joined = {name: one for name, one in joined.items() if name in have}
        order = np.argsort(destinations(cells.num_cells, seed))
        provenance = {"sources": texts, "seed": seed, "join": join, "layer": layer or "X"}
        provenance |= {"where": where or ""} if where else {}
        with StoreWriter(out, modalities={}, staging=staging) as writer:
            job = _Job(opened, cells, joined, order, budget, staging, say)
            for modality in job.joined:
                _shuffle_modality(job, modality, writer)
            return _finish(job, writer, provenance)


@dataclass(frozen=True)
class _Remarks:
    """Tells what an ingest assumes and finds, and keeps it for the store's provenance."""

    is_shown: bool
    remarks: list[str] = field(default_factory=list)

    def __call__(self, remark: str) -> None:
        self.remarks.append(remark)
        if self.is_shown:
            tqdm.write(f"note: {remark}", file=sys.stderr)


@dataclass(frozen=True)
class _Job:
    sources: Sequence[Source]
    cells: Cells
    joined: Mapping[str, Joined]
    order: npt.NDArray[np.int64]
    """(n,) cell at each place of the store."""
    memory: int
    staging: Staging
    say: _Remarks

    def with_modality(self, modality: str) -> list[tuple[int, Source, Part]]:
        """First cell, source and part of the sources that have a modality."""
        pairs = zip(self.cells.starts[:-1].tolist(), self.sources, strict=True)
        return [(start, source, source.parts[modality]) for start, source in pairs if modality in source.parts]

    def present(self, modality: str) -> npt.NDArray[np.bool_]:
        """(n,) whether the cell at each place of the store has the modality."""
        has = np.zeros(self.cells.num_cells, bool)
        for start, source, part in self.with_modality(modality):
            has[start : start + len(source.cell_ids)] = True if part.rows is None else part.rows >= 0
        return has[self.order]

    def progress(self, name: str, num_cells: int) -> Progress:
        return Progress(name, num_cells, unit="cells", is_shown=self.say.is_shown, unit_scale=True)


def _join_all(sources: Sequence[Source], join: Join, say: Say) -> dict[str, Joined]:
    joined = {}
    for modality in MODALITIES:
        having = [source for source in sources if modality in source.parts]
        if not having:
            continue
        parts = [source.parts[modality] for source in having]
        result = join_features(modality, [(s.label, p.var) for s, p in zip(having, parts, strict=True)], join)
        columns = tuple(
            own if part.columns is None else np.where(part.columns >= 0, own[part.columns], -1)
            for own, part in zip(result.columns, parts, strict=True)
        )
        joined[modality] = Joined(result.var, columns)
        for source, part in zip(having, parts, strict=True):
            absent = result.var.index[~result.var.index.isin(part.var.index)]
            if len(absent):
                say(
                    f"{modality}: {source.label} lacks {len(absent)} of {len(result.var)} features "
                    f"({_listed(absent)}), which count as zero in its cells"
                )
        largest = max(len(part.var) for part in parts)
        if join == "inner" and len(result.var) < largest:
            say(f"{modality}: {len(result.var)} of up to {largest} features are in all sources and are kept")
    return joined


def _has_cells(part: Part) -> bool:
    return part.rows is None or bool((part.rows >= 0).any())


def _listed(names: pd.Index) -> str:
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")


def _look(sources: Sequence[Source], say: Say) -> None:
    """Look at the first rows of every source, so that a wrong last file is known at once and not after hours."""
    for source in sources:
        for part in source.parts.values():
            _remark_on_barcodes(source, part, say)
            raw = part.matrix.peek()
            if raw is not None:
                columns = np.arange(part.matrix.num_features) if part.columns is None else part.columns
                check_and_map(raw, columns, len(part.var), _place(source, part))


def _remark_on_barcodes(source: Source, part: Part, say: Say) -> None:
    """A raw matrix of 10x has millions of barcodes, most of them of no cell."""
    if not isinstance(part.matrix, CompressedRows):
        return
    least = 1 + part.matrix.num_features // 1000
    thin = int((part.matrix.lengths() < least).sum())
    if 2 * thin > part.matrix.num_rows:
        few = "no feature" if least == 1 else f"fewer than {least} features"
        say(
            f"{source.label}: {thin:,} of {part.matrix.num_rows:,} cells have counts of {few} of {part.modality} and"
            f" would be trained on as others are; if these are all barcodes of a raw matrix, give the filtered one"
            f" (filtered_feature_bc_matrix.h5), or drop them first, for example with scanpy.pp.filter_cells"
        )


def _place(source: Source, part: Part) -> Place:
    def cell_name(row: int) -> str:
        cells = [row] if part.rows is None else np.flatnonzero(part.rows == row)
        return str(source.cell_ids[cells[0]]) if len(cells) else f"of row {row}, which is not kept"

    def feature_name(column: int) -> str:
        place = column if part.columns is None else int(part.columns[column])
        return str(part.var.index[place]) if place >= 0 else f"number {column}"

    return Place(part.matrix.where, cell_name, feature_name, part.layers)


def _shuffle_modality(job: _Job, modality: str, writer: StoreWriter) -> None:
    joined = job.joined[modality]
    num_rows = int(job.present(modality).sum())
    shuffle = Shuffle(
        job.staging.spill / modality,
        num_rows=num_rows,
        num_features=len(joined.var),
        num_nonzeros=sum(part.matrix.estimated_nonzeros() for _, _, part in job.with_modality(modality)),
        memory=job.memory // 2,
    )
    with closing(shuffle):
        with job.progress(f"{modality}: read and check", num_rows) as progress:
            seen = _scatter(job, modality, shuffle, progress)
        for remark in seen.remarks(modality):
            job.say(remark)
        dtype = narrowest_dtype(seen.maximum)
        writer.add_modality(modality, ModalityLayout(joined.var, dtype, seen.num_nonzeros / max(1, num_rows)))
        with job.progress(f"{modality}: shuffle and write", num_rows) as progress:
            for rows in shuffle.in_order(dtype):
                writer.append(modality, rows)
                progress.advance(rows.num_rows)


def _scatter(job: _Job, modality: str, shuffle: Shuffle, progress: Progress) -> _Seen:
    """Pass 1: every row of every source, checked, to its bucket."""
    joined, seen = job.joined[modality], _Seen()
    # Row in the store's matrix of each cell in the order of the sources; only read where the cell is present.
    row_of_cell = np.empty(job.cells.num_cells, np.int64)
    row_of_cell[job.order] = np.cumsum(job.present(modality)) - 1
    for (start, source, part), columns in zip(job.with_modality(modality), joined.columns, strict=True):
        cell_of_row = _cell_of_row(source, part)
        for first, counted in _checked(job, source, part, columns, len(joined.var)):
            of_rows = cell_of_row[first : first + counted.rows.num_rows]
            if (of_rows < 0).any():
                counted, of_rows = counted.only(of_rows >= 0), of_rows[of_rows >= 0]
            shuffle.add(row_of_cell[start + of_rows], counted.rows)
            seen.add(counted)
            progress.advance(counted.rows.num_rows)
    return seen


def _cell_of_row(source: Source, part: Part) -> npt.NDArray[np.int64]:
    """(rows of the matrix,) cell of the source each row belongs to, -1 where it is none that is kept."""
    if part.rows is None:
        return np.arange(len(source.cell_ids))
    cells = np.full(part.matrix.num_rows, -1, np.int64)
    has = np.flatnonzero(part.rows >= 0)
    cells[part.rows[has]] = has
    return cells


def _checked(
    job: _Job, source: Source, part: Part, columns: npt.NDArray[np.int64], num_features: int
) -> Iterator[tuple[int, Counted]]:
    """Checked chunks of a matrix in order; threads check while the next chunk is read."""
    place = _place(source, part)
    workers = default_threads()
    # Chunks in flight share an eighth of the memory: those being checked, one being read, one being added.
    chunk = job.memory // 8 // (workers + 2)
    waiting: deque[tuple[int, Future[Counted]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        for start, raw in part.matrix.chunks(memory=chunk, spill=job.staging.spill):
            waiting.append((start, pool.submit(check_and_map, raw, columns, num_features, place, start=start)))
            if len(waiting) > workers:
                first, done = waiting.popleft()
                yield first, done.result()
        while waiting:
            first, done = waiting.popleft()
            yield first, done.result()


@dataclass
class _Seen:
    """Sums over the chunks of a modality."""

    num_nonzeros: int = 0
    maximum: int = 0
    num_empty: int = 0
    num_duplicates: int = 0

    def add(self, counted: Counted) -> None:
        self.num_nonzeros += len(counted.rows.indices)
        self.maximum = max(self.maximum, counted.maximum)
        self.num_empty += counted.num_empty
        self.num_duplicates += counted.num_duplicates

    def remarks(self, modality: str) -> Iterator[str]:
        if self.num_empty:
            yield f"{modality}: {self.num_empty} cells have no counts in the features kept; they stay as empty rows"
        if self.num_duplicates:
            yield f"{modality}: {self.num_duplicates} entries stood twice in a row of the matrix and were added up"


def _finish(job: _Job, writer: StoreWriter, provenance: dict[str, object]) -> Schema:
    masks = {modality: job.present(modality) for modality in job.joined}
    nowhere = int((~np.any(list(masks.values()), axis=0)).sum())
    if nowhere:
        job.say(f"{nowhere} cells have none of the modalities {', '.join(masks)}; they stay, empty")
    columns = obs_columns(job.sources, job.cells, job.order, job.say)
    return writer.finish(
        cell_ids=job.cells.ids[job.order],
        obs=without_unused(columns) if "where" in provenance else columns,
        present={name: mask for name, mask in masks.items() if not mask.all()},
        modality_obs={name: modality_columns(job.sources, name, job.order[mask]) for name, mask in masks.items()},
        is_shuffled=True,
        provenance={**provenance, "remarks": job.say.remarks},
    )
