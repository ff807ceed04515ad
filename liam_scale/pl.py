"""Pictures as scanpy's users expect them: `liam_scale.pl.loss(run)`, `liam_scale.pl.umap(run, color="cell_type")`.

Each function draws with matplotlib, shows the figure in a notebook or on a screen unless `show=False`, writes it to
`save`, and returns its axes where it is not shown. Needs the `[evaluate]` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from liam_scale.evaluation import plots
from liam_scale.evaluation.cells import draw_rows, read_embedding
from liam_scale.evaluation.measures import require_extra
from liam_scale.run import check_maker
from liam_scale.trained import Run
from loaders.selection import encode_column
from loaders.stores import ObsColumn, Store
from loaders.stores.chosen import with_embedding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CELLS = 50_000
"""Cells that are drawn from a larger store for a picture."""


def loss(run: Run, *, show: bool | None = None, save: str | Path | None = None) -> list[Axes] | None:
    """Training and validation curves of every loss term by epoch.

    Parameters
    ----------
    show
        Show the figure and return nothing; None: where nothing is saved.
    save
        File to write; its suffix chooses the format.

    Returns
    -------
    Axes, one for each term; None where the figure is shown.

    Raises
    ------
    ValueError
        The run has not been evaluated yet.
    """
    require_extra()
    figure = plots.loss_figure(run.history, title=str(run.path))
    return _finish([axes for axes in figure.axes if axes.get_title(loc="left")], show, save)


def umap(
    run: Run,
    color: str | pd.Series | Sequence[str] | None = None,
    *,
    store: str | Path | AnnData | MuData | None = None,
    key: str = "X_liam",
    seed: int = 0,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes] | None:
    """UMAP of the embedding that `embed` wrote, coloured by obs columns.

    Parameters
    ----------
    color
        Obs column, or several for a panel each; or labels indexed by cell id. Default: the sample.
    store
        Store with the embedding; default: that of the training.
    seed
        Of the UMAP, and of the 50,000 cells that are drawn from a larger store.
    show, save
        As for `loss`.

    Returns
    -------
    Axes, a list where several colours were asked for; None where the figure is shown.
    """
    require_extra()
    opened = with_embedding(run.open_store(store), key)
    held = opened.embedding_attributes(key)
    what = f"obsm[{key!r}] of {opened.uri}"
    if not held:
        raise ValueError(f"{what}: there is no such embedding; write it with run.embed(), or name another key")
    check_maker(held, run.record.id, what=what, cure="write this run's first with run.embed(overwrite=True)")
    strata = np.zeros(opened.schema.num_cells, np.int8)
    rows = draw_rows(strata, max_cells=MOST_CELLS, seed=seed, by_blocks=opened.schema.is_shuffled)
    points = plots.umap_coordinates(read_embedding(opened, key, rows), seed=seed)
    asked = run.record.batch_key if color is None else [color] if isinstance(color, str | pd.Series) else list(color)
    columns = [_colours(opened, one, rows) for one in asked]
    columns = columns or [("", ObsColumn(np.zeros(len(rows), np.int32), ("cells",)))]
    figure = plots.umap_figure([plots.Panel(str(run.path), points)], columns, title="")
    axes = figure.axes[: len(columns)]
    found = _finish(axes, show, save)
    return found if found is None or not (color is None or isinstance(color, str | pd.Series)) else found[0]


def _colours(store: Store, color: str | pd.Series, rows: np.ndarray) -> tuple[str, ObsColumn]:
    """Name and codes of the cells at these rows."""
    if isinstance(color, str):
        column = encode_column(store, color, allow_missing=True)
        return color, ObsColumn(column.codes[rows].astype(np.int32), column.categories)
    labels = color.reindex(store.cell_ids(0, store.schema.num_cells)[rows]).astype("category")
    return str(color.name), ObsColumn(np.array(labels.cat.codes, np.int32), tuple(map(str, labels.cat.categories)))


def _finish(axes: list[Any], show: bool | None, save: str | Path | None) -> list[Axes] | None:
    import matplotlib.pyplot as plt

    if save is not None:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        axes[0].figure.savefig(save, dpi=150, facecolor="white")
    if show or (show is None and save is None):
        plt.show()
        return None
    return axes
