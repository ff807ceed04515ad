"""Stores that grow: new cells become new shards after those of a store, and several stores become one.

What stands in whole shards is linked, not copied; the rest is written behind it, in a hidden folder that takes the
store's place in one step. The cells keep their order, part by part, and the plan mixes the parts (`Schema.parts`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from anndata.io import read_elem

from loaders.csr import row_sums, select_columns, widest_dtype
from loaders.durable import holding
from loaders.formats.compressed import CompressedRows
from loaders.formats.features import Join
from loaders.formats.root import addresses, local_path, open_root
from loaders.formats.scverse import open_group
from loaders.formats.sealed import open_sealed
from loaders.formats.source import Source, unsaid
from loaders.ingest.cells import SAMPLE, gather_cells
from loaders.ingest.matrices import Atlas
from loaders.ingest.peaks import NAMES, REFERENCE, check_genomes, join_peaks
from loaders.ingest.run import Remarks, finish, ingest, join_all, open_all
from loaders.ingest.shards import CHUNKS_PER_SHARD, ShardWriter
from loaders.ingest.sources import parse_source
from loaders.ingest.staging import Staging, check_out, explain_disk_errors
from loaders.ingest.writer import CELLS_PER_CHUNK, ModalityLayout, StoreWriter, WrittenRows
from loaders.intervals import are_peaks
from loaders.modalities import PRESETS, Declared, agreed, check_found, declared
from loaders.progress import Progress
from loaders.schema import SCHEMA_KEY, Schema
from loaders.sizing import default_threads
from loaders.stores.store import own_schema

PASS_BYTES = 128 << 20
"""Memory of the rows that are on their way."""


def append(
    store: str | Path,
    sources: Sequence[str | Path] | str | Path,
    *,
    sample_key: str | None = None,
    join: Join = "inner",
    peaks: Literal["names", "reference"] = "names",
    ignore_genome: bool = False,
    feature_key: str | None = None,
    modality: Declared = (),
    layer: str | None = None,
    memory: str | int = "1GiB",
    seed: int = 0,
    reshuffle: bool = False,
    progress: bool = True,
) -> Schema:
    """Add the cells of further sources to a store that ingest made; features are matched by name.

    The store is the old one until all is written, then the new one. Its embeddings, which are not of the new cells,
    are left out. Killed, the same call goes on with what was read.

    Parameters
    ----------
    store
        A store that ingest made, on a local disk.
    sources, sample_key, feature_key, modality, layer, memory
        The new cells, as for `ingest`; modalities of the store need not be explained again.
    join
        "inner": the store keeps its features; sources must have all of them, and others of theirs are left out.
        "outer": features that only one side has are kept, and are zero in the cells of the other.
    peaks
        "reference": counts of peaks go to that of the store with which theirs shares most bases.
    ignore_genome
        Take peaks though the new cells name another genome than the store.
    seed
        Of the order of the new cells.
    reshuffle
        Write the whole store anew, all cells in one random order, instead of mixing the parts at reading.

    Raises
    ------
    ValueError
        A source, an option or a count is not what it must be; cells whose ids the store has; features that the sources
        lack. The store is as it was.
    RuntimeError
        The disk is full, or another process is at the store.
    """
    path, texts, say = _folder(store), addresses(sources, "sources"), Remarks(is_shown=progress)
    if not texts:
        raise ValueError("sources: got none; name the files of the cells to add")
    if peaks not in (NAMES, REFERENCE):
        raise ValueError(f"peaks: got {peaks!r}; choose {NAMES} or {REFERENCE}, as the store keeps its own")
    hidden = path.with_name(f".{path.name}.append")
    made = hidden / f"{path.stem}-new.zarr"
    with explain_disk_errors(path), holding(path):
        try:
            with ExitStack() as files:
                old, asked = _opened(path), declared(modality)
                kinds = {**PRESETS, **agreed([("what was asked for", asked), (str(path), old.schema.kinds)])}
                named = [parse_source(text, kinds) for text in texts]
                new = open_all(named, layer=layer, feature_key=feature_key, files=files, say=unsaid)
                found = {name: str(kind) for source in new for name, kind in source.kinds.items()}
                check_found(asked, found, "none of the sources")
                _check_fit(old, new, sample_key, join, peaks, ignore_genome=ignore_genome)
            forced: dict[str, Any] = {"ignore_genome": ignore_genome}
            options: dict[str, Any] = {"memory": memory, "join": join, "seed": seed, "progress": progress, **forced}
            has_peaks = any(are_peaks(name, part.kind, part.var.index) for name, part in old.source.parts.items())
            reference = str(path) if peaks == REFERENCE and has_peaks else NAMES
            own: dict[str, Any] = {"sample_key": sample_key, "feature_key": feature_key, "layer": layer}
            own |= {"peaks": reference, "modality": found}
            ingest(texts, out=made, overwrite=True, **own, **options)
            if reshuffle:
                return ingest([path, made], out=path, sample_key=SAMPLE, overwrite=True, **options)
            return _chained([path, made], path, join, say, texts=texts, overwrite=True, **forced)
        finally:
            # A kill comes past here, so that what it left is gone on with.
            shutil.rmtree(hidden, ignore_errors=True)


def merge(
    stores: Sequence[str | Path],
    *,
    out: str | Path,
    join: Join = "inner",
    ignore_genome: bool = False,
    memory: str | int = "1GiB",
    seed: int = 0,
    reshuffle: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Schema:
    """Make one store of several that ingest made, which stay as they are; their shards are linked where they fit.

    Parameters
    ----------
    stores
        At least two, on a local disk. Ids that stand in more than one are prefixed by the store's name.
    out
        Store to make.
    join, ignore_genome, memory, seed, overwrite
        As for `ingest`; memory and seed of a `reshuffle`.
    reshuffle
        Write all cells in one random order, instead of mixing the parts at reading.

    Raises
    ------
    ValueError
        Fewer than two stores, or what is none; features in common are lacking; `out` exists.
    RuntimeError
        The disk is full.
    """
    paths, out = [_folder(store) for store in stores], Path(out)
    if len(paths) < 2:
        raise ValueError(f"stores: got {len(paths)}; name at least two")
    check_out(out, overwrite=overwrite)
    if reshuffle:
        options: dict[str, Any] = {"overwrite": overwrite, "memory": memory, "seed": seed, "progress": progress}
        return ingest(paths, out=out, join=join, ignore_genome=ignore_genome, sample_key=SAMPLE, **options)
    with explain_disk_errors(out):
        forced: Any = {"ignore_genome": ignore_genome, "overwrite": overwrite}
        return _chained(paths, out, join, Remarks(is_shown=progress), **forced)


@dataclass(frozen=True)
class _Held:
    """A store that is to be part of another."""

    path: Path
    root: zarr.Group
    schema: Schema
    source: Source


def _folder(store: str | Path) -> Path:
    path = local_path(store)
    root = None if path is None else open_root(path)
    if path is None or not isinstance(root, zarr.Group) or SCHEMA_KEY not in root.attrs:
        raise ValueError(f"store: got {store}; give a store on a local disk that an ingest made")
    return path


def _opened(path: Path) -> _Held:
    root = open_root(path)
    assert isinstance(root, zarr.Group), root
    schema = own_schema(root, str(path))
    root = root if schema.metadata is None else open_sealed(root, str(path), schema.metadata)
    source = open_group(root, str(path), path, modality=None, layer=None, say=unsaid)
    return _Held(path, root, schema, source)


def _check_fit(
    old: _Held, new: Sequence[Source], sample_key: str | None, join: Join, peaks: str, *, ignore_genome: bool
) -> None:
    """Refuse cells that the store has, or that lack its features, before hours of reading."""
    held = pd.Index(old.source.cell_ids.astype(object))
    ids = pd.Index(gather_cells(new, sample_key, unsaid).ids.astype(object))
    if len(twice := ids[ids.isin(held)]):
        raise ValueError(
            f"sources: got {len(twice):,} cells that stand in {old.source.label} already, such as {twice[0]!r}; leave"
            f" them out, or rename them in the source if they are others"
        )
    for source in new:
        for name, part in source.parts.items():
            before = old.source.parts.get(name, part).var
            both = [(old.source.label, before), (source.label, part.var)]
            if part.kind.likelihood == "NM" and not ignore_genome:
                check_genomes(both)
            is_shared = peaks == REFERENCE and name in old.source.parts
            if is_shared and are_peaks(name, part.kind, before.index, part.var.index):
                join_peaks(name, both, peaks, unsaid, ignore_genome=ignore_genome)
                continue
            lacking = before.index[~before.index.isin(part.var.index)]
            if len(lacking) and (join == "inner" or len(lacking) == len(before)):
                raise ValueError(
                    f"sources: {name} of {source.label} lacks {len(lacking):,} of the {len(before):,} features of"
                    f" {old.source.label} (such as {str(lacking[0])!r}; it has {str(part.var.index[0])!r}); bring the"
                    f" names to one kind, or count what it lacks as zero with join='outer'"
                )


def _chained(
    paths: Sequence[Path],
    out: Path,
    join: Join,
    say: Remarks,
    *,
    ignore_genome: bool,
    overwrite: bool,
    texts: Sequence[str] = (),
) -> Schema:
    """One store of the cells of several, in their order.

    Parameters
    ----------
    texts
        What a user calls the sources of all but the first.
    """
    with ExitStack() as stack:
        held = [_opened(path) for path in paths]
        labels = [str(paths[0]), ", ".join(texts)] if texts else [str(path) for path in paths]
        sources = [replace(one.source, label=label) for one, label in zip(held, labels, strict=True)]
        cells = gather_cells(sources, SAMPLE, say)
        joined = join_all(sources, join, say, ignore_genome=ignore_genome)
        atlas = Atlas(sources, cells, joined, np.arange(cells.num_cells))
        for one in held:
            if lost := sorted(set(one.root.get("obsm", {})) - set(one.source.parts)):
                say(f"{one.source.label}: left out, as not of all cells: {', '.join(lost)}; embed again")
        staging = Staging(out, overwrite=overwrite)
        stack.callback(staging.discard)
        writer = stack.enter_context(StoreWriter(out, modalities={}, staging=staging))
        for name in atlas.joined:
            writer.take(name, *_matrix(atlas, name, held, staging.spill, is_shown=say.is_shown))
        made = [_made(one, str(path)) for one, path in zip(held, paths, strict=True)]
        given = [*made[0]["sources"], *texts] if texts else [text for one in made for text in one["sources"]]
        say.remarks[:] = [*(remark for one in made for remark in one.get("remarks", [])), *say.remarks]
        return finish(
            atlas,
            writer,
            {**made[0], "sources": given},
            say,
            is_shuffled=all(one.schema.is_shuffled for one in held),
            parts=[cells for one in held for cells in one.schema.parts or (one.schema.num_cells,)],
        )


def _made(held: _Held, path: str) -> dict[str, Any]:
    """What is known of where a store comes from; its own path where nothing is."""
    kept = read_elem(held.root["uns"]["liam_scale"]) if "liam_scale" in held.root.get("uns", {}) else {}
    known = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in kept.items()}
    return {key: value for key, value in {"sources": [path], **known}.items() if key != "where"}


def _matrix(
    atlas: Atlas, modality: str, held: Sequence[_Held], spill: Path, *, is_shown: bool
) -> tuple[ModalityLayout, WrittenRows]:
    """The rows of all stores that have a modality: whole shards of the first are linked, all else is written."""
    joined, having = atlas.joined[modality], list(atlas.having(modality))
    matrices = [part.matrix for *_, part in having]
    assert all(isinstance(matrix, CompressedRows) for matrix in matrices), matrices
    first = held[having[0][0]]
    chunk = int(first.root[f"mod/{modality}/X/data"].chunks[0])
    dtype = widest_dtype(matrix.stored_dtype for matrix in matrices)
    layout = ModalityLayout(joined.var, dtype, chunk / CELLS_PER_CHUNK, atlas.kind(modality))
    folder = spill / f"{modality}.chained"
    with ThreadPoolExecutor(default_threads(), thread_name_prefix="encode") as pool, ExitStack() as stack:
        is_same = np.array_equal(joined.columns[0], np.arange(matrices[0].num_features))
        linked = _linked(first, modality, layout, folder) if is_same else {}
        totals = np.asarray(first.root[f"mod/{modality}/obs/total_counts"][:])
        rows = _Rows(layout, folder, linked, totals, pool)
        stack.callback(rows.abort)
        total = sum(matrix.num_rows for matrix in matrices)
        with Progress(f"{modality}: write", total, unit="cells", is_shown=is_shown, unit_scale=True) as bar:
            for number, (matrix, columns) in enumerate(zip(matrices, joined.columns, strict=True)):
                assert isinstance(matrix, CompressedRows), matrix
                rows.add(matrix, columns, is_linked=number == 0, progress=bar)
        return layout, rows.close()


@dataclass(frozen=True)
class _Linked:
    """What is taken over of an array: entries in whole shards, and the checksum of all of it."""

    shards: int
    checksum: int


def _linked(held: _Held, modality: str, layout: ModalityLayout, folder: Path) -> dict[str, _Linked]:
    """Link the whole shards of a store's arrays where they can stay as they are."""
    group, checksums = held.root[f"mod/{modality}/X"], held.schema.modalities[modality].counts_crc32c
    linked = {}
    for place, (name, dtype) in enumerate(layout.dtypes.items()):
        array, length = group[name], layout.chunk_length * CHUNKS_PER_SHARD
        if checksums is None or array.dtype != dtype or array.chunks != (layout.chunk_length,):
            continue
        if array.shards != (length,):
            continue
        linked[name] = _Linked(array.shape[0] // length, int(checksums[8 * place : 8 * place + 8], 16))
        (folder / name).mkdir(parents=True)
        for number in range(linked[name].shards):
            shard = held.path / array.path / "c" / str(number)
            try:
                os.link(shard, folder / name / str(number))
            except OSError:  # a file system without links
                shutil.copyfile(shard, folder / name / str(number))
    return linked


class _Rows:
    """Writes rows behind those that are linked."""

    def __init__(
        self,
        layout: ModalityLayout,
        folder: Path,
        linked: dict[str, _Linked],
        totals: npt.NDArray[np.float64],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._layout, self._folder, self._linked, self._known_totals = layout, folder, linked, totals
        length = layout.chunk_length
        first = {name: linked[name].shards if name in linked else 0 for name in layout.dtypes}
        self._begin = {name: shards * length * CHUNKS_PER_SHARD for name, shards in first.items()}
        self._writers = {
            name: ShardWriter(folder / name, dtype=dtype, chunk_length=length, pool=pool, first=first[name])
            for name, dtype in layout.dtypes.items()
        }
        self._checksums = {name: linked[name].checksum if name in linked else 0 for name in layout.dtypes}
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._totals: list[npt.NDArray[np.float64]] = []

    def add(
        self, matrix: CompressedRows, columns: npt.NDArray[np.int64], *, is_linked: bool, progress: Progress
    ) -> None:
        """Write a matrix through other columns, of the first one (`is_linked`) what is not linked."""
        is_same = np.array_equal(columns, np.arange(len(self._layout.var)))
        done = min(self._begin.values()) if is_linked else 0
        for start, stop in matrix.ranges(PASS_BYTES):
            edges = matrix.offsets().between(start, stop)
            entry = int(edges[0])
            progress.advance(stop - start)
            if edges[-1] <= done:
                self._lengths.append(np.diff(edges))
                self._totals.append(self._known_totals[start:stop])
                continue
            rows = matrix.read(start, stop)
            if not is_same:
                rows = select_columns(rows, columns.astype(np.int32), len(self._layout.var))
            for name, values in (("data", rows.values), ("indices", rows.indices)):
                stored = values.astype(self._layout.dtypes[name], copy=False)
                known = is_linked and name in self._linked
                self._writers[name].append(stored[max(0, self._begin[name] - entry) :] if known else stored)
                if not known:
                    crc = google_crc32c.extend(self._checksums[name], np.ascontiguousarray(stored))
                    self._checksums[name] = int(crc)
            self._lengths.append(np.diff(rows.indptr))
            self._totals.append(row_sums(rows.indptr, rows.values))

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()

    def close(self) -> WrittenRows:
        for writer in self._writers.values():
            writer.close()
        lengths, totals = np.concatenate(self._lengths), np.concatenate(self._totals)
        return WrittenRows(lengths, totals, (self._checksums["data"], self._checksums["indices"]), (self._folder,))
