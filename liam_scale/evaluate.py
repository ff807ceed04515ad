"""Evaluate: `liam-scale evaluate atlas.zarr --batch-key donor --label-key cell_type` scores and draws an embedding."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import anndata
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
import tyro

from liam_scale.command import Answer, Command
from liam_scale.evaluation import plots, report
from liam_scale.evaluation.cells import (
    NUM_COMPONENTS,
    TARGET_SUM,
    draw_cells,
    modalities_of_cells,
    modality_places,
    normalised,
    principal_components,
    read_column,
    read_counts,
    read_embedding,
)
from liam_scale.evaluation.conservation import CellCycle, Trajectory, phase_genes
from liam_scale.evaluation.found import Evaluation, describe, document, imputation_titles, titles
from liam_scale.evaluation.imputation import TITLES, impute
from liam_scale.evaluation.measures import MEASURES, require_extra, score
from liam_scale.evaluation.scored import NUM_NEIGHBORS, Scored
from liam_scale.finding import kinds_of
from liam_scale.kernels.cpu.threads import threads_kept
from liam_scale.run import RunDirectory, check_maker
from liam_scale.tables import to_toml
from loaders.durable import write_text
from loaders.modalities import PRESETS
from loaders.options import Range, check_options
from loaders.stores import ObsColumn, Store, open_known, open_store
from loaders.stores.chosen import with_embedding

BASELINE = "PCA"
"""Name of the baseline's column in the table."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score an embedding against the samples and labels of its cells, beside PCA, and draw it."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store with the embedding and the counts; .h5ad and .h5mu files are such too."""
    embedding: str = "X_liam"
    """Name of the embedding in obsm."""
    embedding_file: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """AnnData Zarr or .h5ad with the embedding of the same cells, as `embed --out` writes it. Default: the store."""
    batch_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns whose mixing is scored: the sample of each cell first, then site, donor, ..."""
    label_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns with labels, such as cell types: first the one within which mixing is scored, then others."""
    pairs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns in which exactly two cells have the same value: the halves of a cell whose modalities were split."""
    cell_cycle: bool = False
    """Also how much of the cell cycle is kept within samples (scib); RNA must have gene symbols, of human or mouse."""
    pseudotime: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns with a trajectory's pseudotime, NaN in cells off it: also how much of its order is kept (scib)."""
    truth: Annotated[str | None, tyro.conf.arg(metavar="STORE")] = None
    """Store in which the modalities that cells lack here were measured, by cell id: how well --run imputes them."""
    out: Path | None = None
    """Folder for report.html, metrics.csv, umap.png and loss.png. Default: print the table, write nothing."""
    run: Path | None = None
    """Folder of the run that made the embedding; its history.csv becomes loss.png."""
    max_cells: Annotated[int, Range(least=3)] = 20_000
    """Score at most so many cells at once, drawn in proportion to samples and labels; memory does not grow with the
    store."""
    draws: Annotated[int, Range(least=1)] = 3
    """Draws of `max_cells` where there are more: the table holds their mean and its 95 % confidence interval."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the drawn cells, of k-means and of UMAP."""
    neighbors: Annotated[int, Range(least=1)] = NUM_NEIGHBORS
    """Neighbours of a cell in the measures."""
    baseline: bool = True
    """Score principal components of the normalised counts as well, as "before"."""
    components: Annotated[int, Range(least=1)] = NUM_COMPONENTS
    """Principal components of the baseline."""
    target_sum: Annotated[float, Range(above=0)] = TARGET_SUM
    """Counts that the baseline scales every cell to (RNA, ATAC) before the logarithm."""
    scib: Literal["none", "quick", "all"] = "all"
    """Measures of scib-metrics; none: scikit-learn's alone, quick: those that take seconds, all: also BRAS and kBET."""
    published: bool = False
    """Also what the paper of liam reports, as scib 1.0.1 took it; its silhouettes do not tell good from bad mixing."""
    plots: bool = True
    """Draw pictures into `out`."""

    def __post_init__(self) -> None:
        for name in ("batch_key", "label_key", "pairs", "pseudotime"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        check_options(self, "--")
        if not (self.batch_key or self.label_key):
            raise ValueError("--batch-key, --label-key: got neither; name at least one obs column to score against")
        if self.run is not None and self.out is None and self.truth is None:
            raise ValueError("--run: got a run but no --out; name the folder for its loss.png")
        if self.truth is not None and self.run is None:
            raise ValueError("--truth: got a store but no --run; name the run that imputes")
        if self.pseudotime and not self.label_key:
            raise ValueError("--pseudotime: got a column but no --label-key; a trajectory starts at a label")
        if self.cell_cycle and not self.batch_key:
            raise ValueError("--cell-cycle: got no --batch-key; it is compared within samples")


@threads_kept()
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
    require_extra()
    given: Any = config.store if data is None else data
    of_run = _of_run(config.run)
    store = open_known(given, **of_run) if isinstance(given, str | anndata.AnnData | mudata.MuData) else given
    store = with_embedding(store, config.embedding) if config.embedding_file is None else store
    holder = store if config.embedding_file is None else _embedding_file(config.embedding_file, store)
    if config.run is not None and data is None:
        _check_maker(config, config.run, holder)
    asked = {"--batch-key": config.batch_key, "--label-key": config.label_key}
    whole = {key: read_column(store, key, option=option) for option, keys in asked.items() for key in keys}
    pairs = {key: _pairs(store, key) for key in config.pairs}
    genes = phase_genes(_rna_names(store), store.uri) if config.cell_cycle else None
    times = {key: _pseudotime(store, key) for key in config.pseudotime}
    truth = None if config.truth is None else open_known(config.truth, **of_run)
    limits = {"max_cells": config.max_cells, "num_draws": config.draws, "seed": config.seed}
    draws = draw_cells(store, whole, **limits)
    tables, kept = [], None
    for rows in draws:
        columns = {key: ObsColumn(np.asarray(c.codes)[rows], c.categories) for key, c in whole.items()}
        partners = {key: np.asarray(column.codes)[rows] for key, column in pairs.items()}
        embeddings, kinds = _embeddings(store, holder, config, rows)
        codes = {**{key: column.codes for key, column in columns.items()}, **partners}
        known: dict[str, Any] = {key: Trajectory(t[rows], _first(config, codes)) for key, t in times.items()}
        if genes is not None:
            rna = read_counts(store, "rna", modality_places(store, "rna", rows))
            known["cell_cycle"] = CellCycle(normalised(PRESETS["rna"], rna, target_sum=config.target_sum), genes)
        options: dict[str, Any] = {"k": config.neighbors, "seed": config.seed, "known": known}
        scored = {n: Scored(p, codes, **options) for n, p in embeddings.items()}
        tables.append(_score(scored, config))
        kept = kept or (_by_modalities(scored, config, kinds), embeddings, {**columns, "modalities": kinds})
    table, interval = _mean_and_interval(tables)
    assert kept is not None
    imputed = None
    if truth is not None and config.run is not None:
        directory = RunDirectory(config.run)
        imputed = impute(directory, store, truth, draws[0], holder=holder, embedding=config.embedding)
    found = Evaluation(table, interval, *kept, draws[0], store.schema.num_cells, imputed)
    return found if config.out is None else _write(found, config, config.out)


def _of_run(run: Path | None) -> dict[str, Any]:
    """What modalities are and where counts stand, as the run has it; a folder that is no run is told of later."""
    if run is None or not RunDirectory(run).is_run:
        return {"kinds": PRESETS}
    directory = RunDirectory(run)
    return {"kinds": kinds_of(directory), "foreign_layer": directory.record().layer}


def _pairs(store: Store, key: str) -> ObsColumn:
    column = read_column(store, key, option="--pairs")
    if not (np.bincount(column.codes[column.codes >= 0]) == 2).any():
        raise ValueError(
            f"--pairs: got {key!r}, of which no value stands in exactly two cells; name the column in which both halves"
            " of a cell have the same value"
        )
    return column


def _rna_names(store: Store) -> list[str]:
    if "rna" not in store.schema.modalities:
        raise ValueError(f"--cell-cycle: {store.uri} has no RNA; leave the option out")
    return store.feature_names("rna").tolist()


def _pseudotime(store: Store, key: str) -> npt.NDArray[np.float64]:
    if key not in store.schema.obs_columns:
        read_column(store, key, option="--pseudotime")  # says which columns there are
    values = pd.to_numeric(store.obs_frame()[key], errors="coerce").to_numpy(np.float64)
    if np.isfinite(values).sum() < 3:
        raise ValueError(f"--pseudotime: got {key!r}, a number in fewer than 3 cells; name a column of numbers")
    return values


def _first(config: EvaluateConfig, codes: dict[str, npt.NDArray[np.integer]]) -> npt.NDArray[np.integer] | None:
    return codes[config.batch_key[0]] if config.batch_key else None


def _evaluate(config: EvaluateConfig) -> Answer:
    found = evaluate(config)
    text = "\n".join([describe(found), *(f"wrote {path}" for path in found.written)])
    return Answer(text, {"store": config.store, "embedding": config.embedding, **document(found)})


def _embeddings(
    store: Store, holder: Store, config: EvaluateConfig, rows: npt.NDArray[np.int64]
) -> tuple[dict[str, npt.NDArray[np.float32]], ObsColumn]:
    """The embedding, before it the baseline, and which modalities the cells have."""
    wanted = {config.embedding: read_embedding(holder, config.embedding, rows)}
    held = {name: modality.num_features for name, modality in store.schema.modalities.items()}
    places = {name: modality_places(store, name, rows) for name, num_features in held.items() if num_features}
    kinds = modalities_of_cells(places, len(rows))
    if not (config.baseline and places):
        return wanted, kinds
    blocks = [
        normalised(store.schema.kinds[name], read_counts(store, name, within), target_sum=config.target_sum)
        for name, within in places.items()
    ]
    return {BASELINE: principal_components(blocks, num_components=config.components), **wanted}, kinds


def _embedding_file(name: str, store: Store) -> Store:
    holder = open_store(name)
    if holder.schema.num_cells != store.schema.num_cells:
        raise ValueError(
            f"--embedding-file: got {holder.schema.num_cells:,} cells in {name}, but {store.uri} has"
            f" {store.schema.num_cells:,}; name the file that was embedded from this store"
        )
    return holder


def _check_maker(config: EvaluateConfig, run: Path, holder: Store) -> None:
    """Refuse losses of one run beside the embedding of another."""
    directory = RunDirectory(run)
    check_maker(
        holder.embedding_attributes(config.embedding),
        directory.record().id if directory.is_run else None,
        what=f"--run: obsm[{config.embedding!r}] of {holder.uri}",
        cure="name the run that made it, or embed the cells with this one",
    )


def _score(scored: dict[str, Scored], config: EvaluateConfig) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            name: score(
                one,
                covariates=config.batch_key,
                labels=config.label_key,
                pairs=config.pairs,
                pseudotimes=config.pseudotime,
                most_cost=("none", "quick", "all").index(config.scib),
                with_published=config.published,
            )
            for name, one in scored.items()
        }
    )
    return table.rename_axis(["measure", "of"])


def _mean_and_interval(tables: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Over draws: the mean, and half of its 95 % confidence interval."""
    values = np.stack([table.to_numpy() for table in tables])
    half = np.full(values.shape[1:], np.nan)
    if len(tables) > 1:
        spread = values.std(axis=0, ddof=1) / np.sqrt(len(tables))
        half = spread * scipy.stats.t.ppf(0.975, len(tables) - 1)
    mean, interval = (
        pd.DataFrame(found, index=tables[0].index, columns=tables[0].columns).reset_index("of")
        for found in (values.mean(axis=0), half)
    )
    return mean, interval


def _by_modalities(scored: dict[str, Scored], config: EvaluateConfig, kinds: ObsColumn) -> pd.DataFrame:
    """Accuracy of the first label predicted across samples and number of cells, by modalities."""
    if not (config.batch_key and config.label_key):
        return pd.DataFrame()
    covariate, label = config.batch_key[0], config.label_key[0]
    one = next(iter(scored.values()))
    if len(np.unique(one.codes[covariate])) < 2:
        return pd.DataFrame()
    right = {name: one.predicted(covariate, label) == one.codes[label] for name, one in scored.items()}
    grouped = pd.DataFrame(right).groupby(np.asarray(kinds.categories, object)[kinds.codes])
    return grouped.mean().rename_axis("modalities").assign(cells=grouped.size())


def _write(found: Evaluation, config: EvaluateConfig, out: Path) -> Evaluation:
    written = [out / "metrics.csv"]
    names = list(found.embeddings)
    intervals = found.interval[names].rename(columns=lambda name: f"{name} ±").dropna(axis=1, how="all")
    write_text(written[0], pd.concat([found.table, intervals], axis=1).to_csv())
    if found.imputation is not None:
        written.append(out / "imputation.csv")
        write_text(written[-1], found.imputation.to_csv())
    if config.plots:
        written.append(_draw_umaps(found, config, out / "umap.png"))
        if config.run is not None:
            written += _draw_losses(config.run, out)
    return replace(found, written=(*written, _report(found, config, written, out / "report.html")))


def _report(found: Evaluation, config: EvaluateConfig, written: list[Path], path: Path) -> Path:
    """A page with the table, its best values marked, the pictures, and the options of the run and the evaluation."""
    names = list(found.embeddings)
    better = [MEASURES[str(key)].better for key in found.table.index]
    shown = found.table[names].set_axis(titles(found)).rename(columns={config.embedding: _shown(config.embedding)})
    best = report.best_in_rows(shown, better)
    sections = {
        "": [report.text(f"{len(found.rows):,} of {found.num_cells:,} cells of {config.store}")],
        "Measures": [report.table(shown.assign(better=better).rename_axis("measure"), best=best)],
        "Imputation": _imputation_section(found),
        "Pictures": [report.picture(file, file.stem) for file in written if file.suffix == ".png"],
        "By the modalities of a cell": [report.table(found.by_modalities)] if len(found.by_modalities) > 1 else [],
        "Options of the evaluation": [report.code(to_toml(config))],
        "Options of the run": [report.code((config.run / "config.toml").read_text(encoding="utf-8"))]
        if config.run is not None and (config.run / "config.toml").exists()
        else [],
    }
    title = f"{config.run.name if config.run is not None else Path(config.store).stem}: {_shown(config.embedding)}"
    return report.write_report(path, title=title, sections=sections)


def _imputation_section(found: Evaluation) -> list[str]:
    if found.imputation is None:
        return []
    better = [TITLES[str(key)][1] for key in found.imputation.index]
    shown = found.imputation.drop(columns=["of", "cells"]).set_axis(imputation_titles(found)).rename_axis("measure")
    return [report.table(shown, best=report.best_in_rows(shown, better))]


def _draw_umaps(found: Evaluation, config: EvaluateConfig, path: Path) -> Path:
    titles = {BASELINE: "Before: PCA of the normalised counts", config.embedding: f"After: {_shown(config.embedding)}"}
    panels = [
        plots.Panel(titles[name], plots.umap_coordinates(points, seed=config.seed), _note(found.table[name]))
        for name, points in found.embeddings.items()
    ]
    columns = [
        (key if key == kind else f"{kind}: {key}", found.columns[key])
        for kind, keys in (("sample", config.batch_key), ("label", config.label_key))
        for key in keys
    ]
    columns.append(("modalities", found.columns["modalities"]))
    title = f"{Path(config.store).stem}: {len(found.rows):,} cells"
    plots.draw_umaps(path, panels=panels, columns=columns, title=title)
    return path


def _shown(embedding: str) -> str:
    return "liam" if embedding == "X_liam" else embedding


def _note(scores: pd.Series) -> str:
    notes = {
        "label_accuracy": "label predicted from other samples: {:.1%}",
        "same_sample_ratio": "same-sample neighbours: {:.2f} × expected",
        "leiden_nmi": "Leiden against labels (NMI): {:.2f}",
    }
    first = scores[~scores.index.duplicated()]
    return "     ".join(text.format(first[key]) for key, text in notes.items() if key in first)


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


main = Command(
    EvaluateConfig,
    _evaluate,
    prog="liam-scale evaluate",
    description="Score an embedding and draw it.",
    answers=True,
)

if __name__ == "__main__":
    sys.exit(main())
