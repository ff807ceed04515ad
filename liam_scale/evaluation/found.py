"""What an evaluation found, and its tables as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from liam_scale.evaluation.imputation import TITLES
from liam_scale.evaluation.measures import MEASURES
from loaders.stores import ObsColumn


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    table
        A row for each measure (its key) and obs column that it is of (column `of`), a column for each embedding (`PCA`
        for the baseline); the mean where several draws of cells were scored.
    interval
        Of the same form: half of the 95 % confidence interval of that mean (Student's t), NaN for a single draw.
    by_modalities
        Accuracy of labels predicted from other samples and number of cells, by the modalities that cells have.
    imputation
        A row for each measure of imputation and modality (column `of`): that of the mean profile, that of the run, and
        the number of cells; None without `--truth`.
    embeddings
        Per column of the table (n, d).
    columns
        Obs columns of the n scored cells of the first draw, by name, and which modalities each has ("modalities").
    rows
        (n,) rows of the scored cells in the store.
    num_cells
        Cells of the store.
    """

    table: pd.DataFrame
    interval: pd.DataFrame
    by_modalities: pd.DataFrame
    embeddings: dict[str, npt.NDArray[np.float32]]
    columns: dict[str, ObsColumn]
    rows: npt.NDArray[np.int64]
    num_cells: int
    imputation: pd.DataFrame | None = None
    written: tuple[Path, ...] = field(default=())

    def __repr__(self) -> str:
        return describe(self)


def titles(found: Evaluation) -> list[str]:
    """Of each row of the table."""
    return [f"{MEASURES[str(key)].title}: {of}" for key, of in zip(found.table.index, found.table["of"], strict=True)]


def imputation_titles(found: Evaluation) -> list[str]:
    """Of each row of the table of imputation."""
    table = found.imputation
    return (
        [] if table is None else [f"{TITLES[str(k)][0]}: {of}" for k, of in zip(table.index, table["of"], strict=True)]
    )


def describe(found: Evaluation) -> str:
    """The tables as text."""
    names = [name for name in found.table.columns if name != "of"]
    scored = f"{len(found.rows):,} cells" + (f" of {found.num_cells:,}" if len(found.rows) < found.num_cells else "")
    keys = [str(key) for key in found.table.index]
    shown_titles = titles(found)
    width = max(map(len, shown_titles))
    value_width = max(9, *(len(n) for n in names)) + (8 if found.interval[names].notna().any(axis=None) else 0)
    lines = [f"{scored:<{width}}  " + "  ".join(f"{n:>{value_width}}" for n in names) + "  better"]
    for i, (title, key) in enumerate(zip(shown_titles, keys, strict=True)):
        pairs = [(found.table[n].iloc[i], found.interval[n].iloc[i]) for n in names]
        values = [f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else "") for mean, half in pairs]
        shown = "  ".join(f"{value:>{value_width}}" for value in values)
        lines.append(f"{title:<{width}}  {shown}  {MEASURES[key].better}")
    if len(found.by_modalities) > 1:
        lines += ["", "label predicted from other samples, by the modalities of the cell"]
        for kind, row in found.by_modalities.iterrows():
            shown = "  ".join(f"{row[n]:>{value_width}.3f}" for n in names)
            lines.append(f"{f'  {kind} ({int(row.cells):,} cells)':<{width}}  {shown}")
    if found.imputation is not None:
        lines += ["", "\n".join(_imputation_lines(found, found.imputation))]
    return "\n".join(lines)


def document(found: Evaluation) -> dict[str, Any]:
    """The same for programs."""
    measures = found.table.assign(better=[MEASURES[str(key)].better for key in found.table.index])
    intervals = found.interval.drop(columns="of").rename(columns=lambda name: f"{name} ±")
    return {
        "cells": found.num_cells,
        "scored": len(found.rows),
        "measures": pd.concat([measures, intervals], axis=1).reset_index(),
        "by_modalities": found.by_modalities.reset_index(),
        "imputation": None if found.imputation is None else found.imputation.reset_index(names="measure"),
        "written": found.written,
    }


def _imputation_lines(found: Evaluation, table: pd.DataFrame) -> list[str]:
    shown_titles, names = imputation_titles(found), [name for name in table.columns if name not in ("of", "cells")]
    width = max(map(len, shown_titles))
    lines = [f"{'imputed, against --truth':<{width}}  " + "  ".join(f"{n:>12}" for n in names) + "  better      cells"]
    for title, (key, row) in zip(shown_titles, table.iterrows(), strict=True):
        values = "  ".join(f"{row[name]:>12.3f}" if row[name] == row[name] else f"{'':>12}" for name in names)
        lines.append(f"{title:<{width}}  {values}  {TITLES[str(key)][1]:<10}{int(row.cells):>7,}")
    return lines
