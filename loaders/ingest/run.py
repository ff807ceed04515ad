"""Ingest, in order: open, join, look, shuffle each modality through the disk, write what is known of the cells."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from loaders.formats.compressed import CompressedRows
from loaders.formats.features import Join, Joined, join_features
from loaders.formats.root import addresses
from loaders.formats.source import Part, Say, Source
from loaders.ingest.cells import gather_cells, modality_columns, obs_columns
from loaders.ingest.checks import check_and_map
from loaders.ingest.choice import chosen_cells, chosen_features, without_unused
from loaders.ingest.matrices import Atlas, cut, key_of, write_matrices
from loaders.ingest.naming import renamed
from loaders.ingest.peaks import NAMES, check_genomes, check_peaks, join_peaks
from loaders.ingest.runs import destinations
from loaders.ingest.sources import Named, open_source, parse_source
from loaders.ingest.staging import Staging, check_out, explain_disk_errors
from loaders.ingest.tasks import Job, keeping, place_of
from loaders.ingest.workers import Workers, WorkersLost, open_workers
from loaders.ingest.writer import StoreWriter
from loaders.intervals import are_peaks
from loaders.modalities import PRESETS, Declared, agreed, check_found, declared, ordered
from loaders.schema import Schema
from loaders.sizing import describe_memory, parse_memory

_LEAST_MEMORY = 2**25
"""32 MiB: below it chunks are so small that the passes crawl."""


def ingest(
    sources: Sequence[str | Path] | str | Path,
    *,
    out: str | Path,
    sample_key: str | None = None,
    sample_from_file: bool = False,
    join: Join = "inner",
    peaks: str = NAMES,
    ignore_genome: bool = False,
    feature_key: str | None = None,
    modality: Declared = (),
    layer: str | None = None,
    where: str | None = None,
    features: Sequence[str] | None = None,
    memory: str | int = "1GiB",
    seed: int = 0,
    overwrite: bool = False,
    dask: str | None = None,
    client: Any = None,
    resume: Literal["auto", "never"] = "auto",
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
    peaks
        How peaks (ATAC, and other NM modalities whose features are all named after intervals) of several sources are
        matched: "names"; or by overlap of the intervals, each to the one with which it shares most bases: "union",
        overlapping peaks of all sources are one; "reference", those of the first source; or the path of a store or a
        BED file with the peaks. Counts that come together are added up.
    ignore_genome
        Take peaks together though their sources name different genomes (`var["genome"]`), which else are refused.
    feature_key
        Column of var by which genes and proteins are called, such as "gene_ids", where sources name them differently.
        Versions of Ensembl identifiers (ENSG00000141510.17) are left out; a source without the column keeps its names.
    modality
        What modalities of other names are: "h3k27ac=NM" (negative multinomial, as peaks), "hto=NB" (negative binomial,
        as RNA), several such texts, or {"h3k27ac": "NM"}. A colon adds the transform of what encoders read, `none`,
        `log1p` or `clr`: "hto=NB:clr"; default: log1p of NB, none of NM. The store keeps it; stores know their own.
    layer
        Layer that holds the counts ("raw" also means `.raw`); default X.
    where
        Keep the cells for which this is true, an expression over obs columns as `pandas.DataFrame.query` takes it:
        "tissue == 'blood' and n_counts > 500".
    features
        Names of the features to keep; a modality of which none is named keeps all.
    memory
        Bytes or a text such as "512MiB" for chunks and shuffling, in each process that works. Beside it a process
        needs its base (0.3 GB), a table of the features, and about 150 bytes a cell for ids and one obs column at a
        time.
    seed
        Seed of the shuffle.
    overwrite
        Replace a store that exists.
    dask
        Address of a Dask scheduler whose workers do the work (`tcp://host:8786`), or `local:N` for N processes of this
        machine; default: threads of this process. The store is the same, byte by byte.
    client
        The same as an open `distributed.Client`, which stays open.
    resume
        "auto" goes on with what a killed ingest of the same counts left beside `out`; "never" starts anew.
    progress
        Show progress and remarks on stderr.

    Raises
    ------
    ValueError
        A source, an option or a count is not what it must be; nothing is left behind.
    RuntimeError
        The disk is full; no scheduler answers; the cluster was lost, after which the same call goes on.
    """
    texts = addresses(sources, "sources")
    if not texts:
        raise ValueError("sources: got none; name at least one file, for example a.h5mu")
    if join not in ("inner", "outer"):
        raise ValueError(f"join: got {join!r}; choose inner or outer")
    budget = max(_LEAST_MEMORY, parse_memory(memory))
    check_peaks(peaks)
    if resume not in ("auto", "never"):
        raise ValueError(f"resume: got {resume!r}; choose auto or never")
    out = Path(out)
    check_out(out, overwrite=overwrite)
    say = Remarks(is_shown=progress)
    kinds = declared(modality)
    named = [parse_source(text, {**PRESETS, **kinds}) for text in texts]
    with ExitStack() as files, explain_disk_errors(out):
        workers = files.enter_context(open_workers(dask, client, memory=budget))
        opened = open_all(named, layer=layer, feature_key=feature_key, files=files, say=say)
        check_found(kinds, [name for source in opened for name in source.parts], "none of the sources")
        if where is not None:
            opened = chosen_cells(opened, where, say)
        cells = gather_cells(opened, sample_key, say, sample_from_file=sample_from_file)
        joined = join_all(opened, join, say, peaks, ignore_genome=ignore_genome)
        if features is not None:
            joined = chosen_features(joined, features, say)
        _look(opened, say)
        if where is not None:
            have = {name for source in opened for name, part in source.parts.items() if _has_cells(part)}
            joined = {name: one for name, one in joined.items() if name in have}
        atlas = Atlas(opened, cells, joined, np.argsort(destinations(cells.num_cells, seed)))
        share = budget // workers.slots
        plan = {"key": key_of(atlas, named, layer), "memory": share}
        plan["parts"] = cut(atlas, memory=share, slots=workers.slots * max(1, workers.processes))
        staging = Staging(out, overwrite=overwrite, plan=plan, resume=resume == "auto")
        files.push(_letting_go(staging))
        workers.check(staging.spill)
        job = Job(staging.spill, tuple(one.absolute() for one in named), layer, staging.plan["memory"], workers.slots)
        say.tell(_described(workers, budget, staging))
        provenance = {"sources": texts, "seed": seed, "join": join, "layer": layer or "X"}
        provenance |= {"where": where or ""} if where else {}
        provenance |= {"peaks": peaks} if peaks != NAMES else {}
        provenance |= {"feature_key": feature_key} if feature_key else {}
        provenance |= {"ignore_genome": True} if ignore_genome else {}
        with StoreWriter(out, modalities={}, staging=staging) as writer:
            with keeping(job, opened):
                written = write_matrices(atlas, job, staging.plan["parts"], workers, say, is_shown=progress)
            for name, (layout, rows) in written.items():
                writer.take(name, layout, rows)
            return finish(atlas, writer, provenance, say, is_shuffled=True)


def open_all(
    named: Sequence[Named], *, layer: str | None, feature_key: str | None, files: ExitStack, say: Say
) -> list[Source]:
    """The sources, their features as they are to be called."""
    opened = [open_source(one, layer=layer, files=files, say=say) for one in named]
    for source in opened:
        if not source.parts:
            raise ValueError(f"{source.label}: got no counts, neither X nor layers; give a file that has them")
    return opened if feature_key is None else renamed(opened, feature_key, say)


def _described(workers: Workers, memory: int, staging: Staging) -> str:
    """What a user may want to know of where the work is done."""
    lines = []
    if workers.processes:
        lines.append(
            f"{workers.processes} Dask workers, {workers.slots} tasks at a time in each, which take at most "
            f"{describe_memory(memory)} of its memory together, beside about 0.3 GB of the process itself"
        )
    if staging.done:
        lines.append(f"goes on where a killed ingest of the same counts stood: {staging.done} tasks are done")
    return "; ".join(lines)


def _letting_go(staging: Staging) -> Callable[..., None]:
    """What becomes of the folder at the end: it stays where the same command can go on with it."""

    def let_go(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, WorkersLost):
            staging.leave()
        else:
            staging.discard()

    return let_go


@dataclass(frozen=True)
class Remarks:
    """Tells what an ingest assumes and finds, and keeps it for the store's provenance."""

    is_shown: bool
    remarks: list[str] = field(default_factory=list)

    def __call__(self, remark: str) -> None:
        self.remarks.append(remark)
        if self.is_shown:
            tqdm.write(f"note: {remark}", file=sys.stderr)

    def tell(self, text: str) -> None:
        """Show what is not of the store, but of this run alone."""
        if self.is_shown and text:
            tqdm.write(f"note: {text}", file=sys.stderr)


def join_all(
    sources: Sequence[Source], join: Join, say: Say, peaks: str = NAMES, *, ignore_genome: bool = False
) -> dict[str, Joined]:
    joined, kinds = {}, agreed((source.label, source.kinds) for source in sources)
    by_overlap: dict[str, bool] = {}
    for modality in ordered(kinds):
        having = [source for source in sources if modality in source.parts]
        parts = [source.parts[modality] for source in having]
        named = [(source.label, part.var) for source, part in zip(having, parts, strict=True)]
        if kinds[modality].likelihood == "NM" and not ignore_genome:
            check_genomes(named)
        matched = None
        if peaks != NAMES and are_peaks(modality, kinds[modality], *(var.index for _, var in named)):
            matched = join_peaks(modality, named, peaks, say, ignore_genome=ignore_genome)
            by_overlap[modality] = matched is not None
        result = matched or join_features(modality, named, join)
        columns = tuple(
            own if part.columns is None else np.where(part.columns >= 0, own[part.columns], -1)
            for own, part in zip(result.columns, parts, strict=True)
        )
        joined[modality] = Joined(result.var, columns)
        if matched:
            continue
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
    if lacking := ", ".join(name for name, is_matched in by_overlap.items() if not is_matched):
        if not any(by_overlap.values()):
            raise ValueError(f"peaks: {peaks} has no {lacking}; give a store that has, or a BED file")
        say(f"{lacking}: {peaks} has none, so that its features are matched by name")
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
                check_and_map(raw, columns, len(part.var), place_of(source, part))


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


def finish(atlas: Atlas, writer: StoreWriter, provenance: dict[str, object], say: Remarks, **order: Any) -> Schema:
    masks = {modality: atlas.present(modality) for modality in atlas.joined}
    nowhere = int((~np.any(list(masks.values()), axis=0)).sum())
    if nowhere:
        say(f"{nowhere} cells have none of the modalities {', '.join(masks)}; they stay, empty")
    columns = obs_columns(atlas.sources, atlas.cells, atlas.order, say)
    return writer.finish(
        cell_ids=atlas.cells.ids[atlas.order],
        obs=without_unused(columns) if "where" in provenance else columns,
        present={name: mask for name, mask in masks.items() if not mask.all()},
        modality_obs={name: modality_columns(atlas.sources, name, atlas.order[mask]) for name, mask in masks.items()},
        provenance={**provenance, "remarks": say.remarks},
        **order,
    )
