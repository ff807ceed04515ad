"""Evaluate: `liam-scale evaluate atlas.zarr --batch-key donor --label-key cell_type` scores and draws an embedding."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import anndata
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse
import tyro

from liam_scale.command import parse, run
from liam_scale.evaluation import metrics, plots, scib_scores
from liam_scale.evaluation.baseline import NUM_COMPONENTS, TARGET_SUM, normalised, principal_components
from liam_scale.evaluation.selection import Source, draw_rows, modalities_of_cells, read_in_memory
from liam_scale.provenance import attributes_in_file, check_maker
from liam_scale.run_directory import RunDirectory
from loaders.stores import open_store
from loaders.stores.base import ObsColumn, Store

_log = logging.getLogger(__name__)

BASELINE = "PCA"
"""Name of the baseline's column in the table."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score an embedding against the samples and labels of its cells, beside PCA, and draw it."""

    store: Annotated[str, tyro.conf.Positional]
    """Store with the embedding and the counts; or an .h5ad or .h5mu file that fits in memory."""
    embedding: str = "X_liam"
    """Name of the embedding in obsm."""
    embedding_file: str | None = None
    """AnnData Zarr or .h5ad with the embedding of the same cells, as `embed --out` writes it. Default: the store."""
    batch_key: str | None = None
    """Obs column with the sample of each cell."""
    label_key: str | None = None
    """Obs column with a label of each cell, such as its cell type; cells without one are left out."""
    out: Path | None = None
    """Folder for metrics.csv, umap.png and loss.png. Default: print the table, write nothing."""
    run: Path | None = None
    """Folder of the run whose history.csv becomes loss.png."""
    max_cells: int = 20_000
    """Score at most so many cells, drawn with `seed`; memory and time do not depend on the size of the store."""
    seed: int = 0
    """Seed of the drawn cells, of k-means and of UMAP."""
    neighbors: int = metrics.NUM_NEIGHBORS
    """Neighbours of a cell in the measures."""
    baseline: bool = True
    """Score principal components of the normalised counts as well, as "before"."""
    components: int = NUM_COMPONENTS
    """Principal components of the baseline."""
    target_sum: float = TARGET_SUM
    """Counts that the baseline scales every cell to (RNA, ATAC) before the logarithm."""
    scib: Literal["none", "quick", "all"] = "quick"
    """scIB measures where scib-metrics is installed; quick: those that take seconds, all: also kBET and silhouettes."""
    plots: bool = True
    """Draw pictures into `out`, where matplotlib and umap-learn are installed."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if self.max_cells < 3:
            raise ValueError(f"--max-cells: got {self.max_cells}; give at least 3")
        if self.neighbors < 1:
            raise ValueError(f"--neighbors: got {self.neighbors}; give at least 1")
        if self.components < 1:
            raise ValueError(f"--components: got {self.components}; give at least 1")
        if not self.target_sum > 0:
            raise ValueError(f"--target-sum: got {self.target_sum}; give a number above 0")
        if self.batch_key is None and self.label_key is None:
            raise ValueError("--batch-key, --label-key: got neither; name at least one obs column to score against")
        if self.run is not None and self.out is None:
            raise ValueError("--run: got a run but no --out; name the folder for its loss.png")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    table
        A row for each measure (its key), a column for each embedding (`PCA` for the baseline).
    by_modalities
        Accuracy of labels predicted from other samples and number of cells, by the modalities that cells have.
    embeddings
        Per column of the table (n, d).
    columns
        Obs columns of the n scored cells, by their names, and which modalities each cell has ("modalities").
    rows
        (n,) rows of the scored cells in the store.
    num_cells
        Cells of the store.
    """

    table: pd.DataFrame
    by_modalities: pd.DataFrame
    embeddings: dict[str, npt.NDArray[np.float32]]
    columns: dict[str, ObsColumn]
    rows: npt.NDArray[np.int64]
    num_cells: int
    written: tuple[Path, ...] = field(default=())


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        EvaluateConfig,
        argv,
        prog="liam-scale evaluate",
        description="Score an embedding and draw it.",
        positional="store",
    )
    return run(lambda: _evaluate_and_tell(config), debug=config.debug)


def evaluate(config: EvaluateConfig, *, data: Store | anndata.AnnData | mudata.MuData | None = None) -> Evaluation:
    """Score an embedding; write the table and pictures into `config.out` where it is given.

    Parameters
    ----------
    data
        An open store or data in memory instead of what `config.store` names.

    Raises
    ------
    ValueError
        An option names what is not there.
    """
    source = _source_of(config.store, data)
    if config.run is not None and data is None:
        _check_maker(config, config.run, source)
    rows, columns = _choose_cells(source, config)
    embeddings, presence = _embeddings(source, config, rows)
    columns["modalities"] = modalities_of_cells(presence)
    samples = columns[config.batch_key].codes if config.batch_key else None
    labels = columns[config.label_key].codes if config.label_key else None
    table = pd.DataFrame({name: _scores(points, samples, labels, config) for name, points in embeddings.items()})
    known = [m.key for m in (*metrics.MEASURES, *scib_scores.QUICK, *scib_scores.SLOW)]
    table = table.reindex([key for key in known if key in table.index]).rename_axis("measure")
    by_modalities = _by_modalities(embeddings, samples, labels, columns["modalities"], config.neighbors)
    found = Evaluation(table, by_modalities, embeddings, columns, rows, source.num_cells)
    return found if config.out is None else _write(found, config, config.out)


def describe(found: Evaluation) -> str:
    """The tables as text."""
    measures = {m.key: m for m in (*metrics.MEASURES, *scib_scores.QUICK, *scib_scores.SLOW)}
    names = list(found.table.columns)
    scored = f"{len(found.rows):,} cells" + (f" of {found.num_cells:,}" if len(found.rows) < found.num_cells else "")
    width = max(len(m.title) for m in measures.values() if m.key in found.table.index)
    value_width = max(9, *(len(n) for n in names))
    lines = [f"{scored:<{width}}  " + "  ".join(f"{n:>{value_width}}" for n in names) + "  better"]
    for key, values in found.table.iterrows():
        measure = measures[str(key)]
        shown = "  ".join(f"{value:>{value_width}.3f}" for value in values)
        lines.append(f"{measure.title:<{width}}  {shown}  {measure.better}")
    if len(found.by_modalities) > 1:
        lines += ["", "label predicted from other samples, by the modalities of the cell"]
        for kind, values in found.by_modalities.iterrows():
            shown = "  ".join(f"{values[n]:>{value_width}.3f}" for n in names)
            lines.append(f"{f'  {kind} ({int(values.cells):,} cells)':<{width}}  {shown}")
    return "\n".join(lines)


def _evaluate_and_tell(config: EvaluateConfig) -> None:
    found = evaluate(config)
    print(describe(found))
    for path in found.written:
        print(f"wrote {path}")


def _source_of(name: str, data: Store | anndata.AnnData | mudata.MuData | None) -> Source:
    if isinstance(data, anndata.AnnData | mudata.MuData):
        return Source.of_memory(data)
    if data is not None:
        return Source.of_store(data)
    if Path(name).suffix in (".h5ad", ".h5mu"):
        return Source.of_memory(read_in_memory(Path(name)), name=name)
    return Source.of_store(open_store(name))


def _choose_cells(source: Source, config: EvaluateConfig) -> tuple[npt.NDArray[np.int64], dict[str, ObsColumn]]:
    """Rows to score, all of which have a sample and a label, and their columns."""
    whole = {
        key: source.obs_column(key, option)
        for key, option in ((config.batch_key, "--batch-key"), (config.label_key, "--label-key"))
        if key is not None
    }
    known = np.ones(source.num_cells, bool)
    for column in whole.values():
        known &= np.asarray(column.codes) >= 0
    if known.sum() < 3:
        raise ValueError(
            f"{' and '.join(whole)}: got values in {int(known.sum())} of {source.num_cells} cells of {source.name};"
            " at least 3 are needed to score an embedding"
        )
    if not known.all():
        _log.info(
            "%s of %s cells have no %s and are left out", f"{(~known).sum():,}", f"{len(known):,}", " or ".join(whole)
        )
    rows = draw_rows(known, max_cells=config.max_cells, seed=config.seed, by_blocks=source.is_shuffled)
    return rows, {key: ObsColumn(np.asarray(c.codes)[rows], c.categories) for key, c in whole.items()}


def _embeddings(
    source: Source, config: EvaluateConfig, rows: npt.NDArray[np.int64]
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, npt.NDArray[np.bool_]]]:
    """The embedding, before it the baseline, and which cells have which modality."""
    holder = source if config.embedding_file is None else _embedding_file(config.embedding_file, source)
    wanted = {config.embedding: holder.embedding(config.embedding, rows)}
    blocks: list[scipy.sparse.csr_matrix] = []
    presence: dict[str, npt.NDArray[np.bool_]] = {}
    for modality in source.modalities:
        if config.baseline:
            counts, presence[modality] = source.counts(modality, rows)
            blocks.append(normalised(modality, counts, target_sum=config.target_sum))
        else:
            presence[modality] = source.presence(modality, rows)
    if not blocks:
        return wanted, presence
    return {BASELINE: principal_components(blocks, num_components=config.components), **wanted}, presence


def _embedding_file(name: str, source: Source) -> Source:
    data = read_in_memory(Path(name)) if Path(name).suffix in (".h5ad", ".h5mu") else anndata.read_zarr(name)
    if data.n_obs != source.num_cells:
        raise ValueError(
            f"--embedding-file: got {data.n_obs:,} cells in {name}, but {source.name} has {source.num_cells:,};"
            " name the file that was embedded from this store"
        )
    return Source.of_memory(data, name=name)


def _check_maker(config: EvaluateConfig, run: Path, source: Source) -> None:
    """Refuse losses of one run beside the embedding of another."""
    file = config.embedding_file or (None if source.store else config.store)
    held = attributes_in_file(Path(file), config.embedding) if file else []
    if source.store and file is None:
        held = source.store.embedding_attributes(config.embedding)
    directory = RunDirectory(run)
    check_maker(
        held,
        directory.record().id if directory.is_run else None,
        what=f"--run: obsm[{config.embedding!r}] of {file or source.name}",
        cure="name the run that made it, or embed the cells with this one",
    )


def _scores(
    points: npt.NDArray[np.float32],
    samples: npt.NDArray[np.int32] | None,
    labels: npt.NDArray[np.int32] | None,
    config: EvaluateConfig,
) -> dict[str, float]:
    scores = metrics.score(points, samples=samples, labels=labels, k=config.neighbors, seed=config.seed)
    if config.scib == "none" or samples is None or labels is None or len(np.unique(samples)) < 2:
        return scores
    if config.scib == "all" or scib_scores.is_installed():
        scores |= scib_scores.scib_scores(points, samples=samples, labels=labels, with_slow=config.scib == "all")
    return scores


def _by_modalities(
    embeddings: dict[str, npt.NDArray[np.float32]],
    samples: npt.NDArray[np.int32] | None,
    labels: npt.NDArray[np.int32] | None,
    kinds: ObsColumn,
    k: int,
) -> pd.DataFrame:
    if samples is None or labels is None or len(np.unique(samples)) < 2:
        return pd.DataFrame()
    right = {name: metrics.label_accuracy(points, labels, samples, k=k) for name, points in embeddings.items()}
    by_cell = pd.DataFrame(right).assign(modalities=np.asarray(kinds.categories, object)[kinds.codes])
    grouped = by_cell.groupby("modalities")
    return grouped.mean().assign(cells=grouped.size())


def _write(found: Evaluation, config: EvaluateConfig, out: Path) -> Evaluation:
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "metrics.csv"]
    found.table.to_csv(written[0])
    if config.plots:
        try:
            written.append(_draw_umaps(found, config, out / "umap.png"))
            if config.run is not None:
                written += _draw_losses(config.run, out)
        except plots.MissingLibraryError as error:
            _log.warning("%s", error)
    return Evaluation(**{**vars(found), "written": tuple(written)})


def _draw_umaps(found: Evaluation, config: EvaluateConfig, path: Path) -> Path:
    titles = {BASELINE: "Before: PCA of the normalised counts", config.embedding: f"After: {_shown(config.embedding)}"}
    panels = [
        plots.Panel(titles[name], plots.umap_coordinates(points, seed=config.seed), _note(found.table[name]))
        for name, points in found.embeddings.items()
    ]
    names = {config.batch_key: "sample", config.label_key: "label"}
    columns = [
        (key if key in (None, "sample", "label") else f"{names[key]}: {key}", found.columns[key])
        for key in names
        if key
    ]
    columns.append(("modalities", found.columns["modalities"]))
    title = f"{Path(config.store).stem}: {len(found.rows):,} cells"
    plots.draw_umaps(path, panels=panels, columns=[(str(n), c) for n, c in columns], title=title)
    return path


def _shown(embedding: str) -> str:
    return "liam" if embedding == "X_liam" else embedding


def _note(scores: pd.Series) -> str:
    notes = {
        "label_accuracy": "label predicted from other samples: {:.1%}",
        "same_sample_ratio": "same-sample neighbours: {:.2f} × expected",
        "label_asw": "label silhouette: {:.2f}",
    }
    return "     ".join(text.format(scores[key]) for key, text in notes.items() if key in scores)


def _draw_losses(run_folder: Path, out: Path) -> list[Path]:
    """loss.png of a run, or one picture for each model of a late integration."""
    files = sorted(run_folder.glob("history.csv")) or sorted(run_folder.glob("*/history.csv"))
    if not files:
        raise ValueError(f"--run: {run_folder} holds no history.csv; name the --out of a training")
    written = []
    for file in files:
        path = out / ("loss.png" if len(files) == 1 else f"loss-{file.parent.name}.png")
        plots.draw_losses(path, pd.read_csv(file), title=f"Training of {file.parent.name}")
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(main())
