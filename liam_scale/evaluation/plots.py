"""The pictures: UMAPs before and after, and the curves of a training. Needs the `[evaluate]` extra."""

from __future__ import annotations

import colorsys
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.durable import replacing
from loaders.modalities import ordered
from loaders.stores import ObsColumn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart, without their yellow (too light on white).
_FEW = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#5B5B5B", "#8C6D31")
# Twenty that stay apart in a scatter plot: strong colours first, then their lighter and darker kin.
_SOME = (
    *("#1F77B4", "#FF7F0E", "#2CA02C", "#D62728", "#9467BD", "#8C564B", "#E377C2", "#17BECF", "#BCBD22", "#5B5B5B"),
    *("#8FBCE6", "#FFBB78", "#90D88A", "#FF9896", "#C5B0D5", "#C49C94", "#F7B6D2", "#0B6B73", "#6B6E00", "#AAAAAA"),
)
_MISSING_COLOUR = "#D9D9D9"
_MOST_LEGEND_ENTRIES = 45
_LEGEND_ROWS = 15
_TRAIN_COLOUR, _VALIDATION_COLOUR = "#7F8C99", "#0072B2"


@dataclass(frozen=True)
class Panel:
    """One row of the UMAP figure: where the cells lie, and what to write above."""

    title: str
    coordinates: npt.NDArray[np.float32]
    """(n, 2)."""
    note: str = ""
    """A line of figures under the title."""


def umap_coordinates(embedding: npt.NDArray[np.floating], *, seed: int = 0) -> npt.NDArray[np.float32]:
    """(n, 2) UMAP of (n, d) points with 15 neighbours, the same for the same seed on the same machine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        import umap
    reducer = umap.UMAP(n_neighbors=min(15, len(embedding) - 1), min_dist=0.3, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value", category=UserWarning)
        warnings.filterwarnings("ignore", message="Spectral initialisation failed", category=UserWarning)
        warnings.filterwarnings("ignore", message="Graph is not fully connected", category=UserWarning)
        return np.asarray(reducer.fit_transform(np.asarray(embedding, np.float32)), np.float32)


def colours(num: int) -> list[str]:
    """`num` colours as hex, as different as so many can be."""
    if num <= len(_FEW):
        return list(_FEW[:num])
    if num <= len(_SOME):
        return list(_SOME[:num])
    # Hues a golden angle apart, over three levels of lightness, so that neighbours in the legend differ most.
    levels = ((0.45, 0.75), (0.65, 0.60), (0.30, 0.70))
    picked = (colorsys.hls_to_rgb(i * 0.618034 % 1.0, *levels[i % 3]) for i in range(num))
    return ["#" + "".join(f"{round(255 * c):02X}" for c in rgb) for rgb in picked]


def draw_umaps(path: Path, *, panels: Sequence[Panel], columns: Sequence[tuple[str, ObsColumn]], title: str) -> None:
    """One PNG of `umap_figure`."""
    _pyplot()
    _save(umap_figure(panels, columns, title=title), path)


def umap_figure(panels: Sequence[Panel], columns: Sequence[tuple[str, ObsColumn]], *, title: str) -> Figure:
    """A row for each panel, a column for each way to colour the cells, one legend below each column.

    The axes of the panels come first, row by row.
    """
    import matplotlib.pyplot as plt

    entries = [min(len(column.categories), _MOST_LEGEND_ENTRIES) for _, column in columns]
    legend_columns = [-(-n // _LEGEND_ROWS) for n in entries]
    legend_rows = max(-(-n // c) for n, c in zip(entries, legend_columns, strict=True)) + 0.5
    side, gap, top = 4.3, 0.62, 0.65
    legend_height = 0.21 * legend_rows + 0.35
    width, height = side * len(columns) + 0.3, (side + gap) * len(panels) + legend_height + top
    figure = plt.figure(figsize=(width, height), layout=None)
    figure.text(0.15 / width, 1 - 0.28 / height, title, fontsize=15, fontweight="bold", va="center")
    order = np.random.default_rng(0).permutation(len(panels[0].coordinates))
    for r, panel in enumerate(panels):
        row_top = height - top - r * (side + gap)
        figure.text(0.15 / width, (row_top - 0.16) / height, panel.title, fontsize=12.5, fontweight="bold", va="center")
        if panel.note:
            figure.text(
                1 - 0.15 / width,
                (row_top - 0.16) / height,
                panel.note,
                fontsize=10.5,
                color="#444",
                ha="right",
                va="center",
            )
        for c, (name, column) in enumerate(columns):
            box = (
                (0.15 + c * side + 0.05) / width,
                (row_top - gap - side + 0.25) / height,
                (side - 0.1) / width,
                (side - 0.1) / height,
            )
            axes = figure.add_axes(box)
            _scatter(axes, panel.coordinates[order], column.codes[order], len(column.categories))
            axes.text(0.03, 0.97, name, transform=axes.transAxes, fontsize=11, va="top", color="#222")
    for c, (_, column) in enumerate(columns):
        box = ((0.15 + c * side + 0.05) / width, 0.0, (side - 0.1) / width, legend_height / height)
        _legend(figure.add_axes(box), column, legend_columns[c])
    return figure


def draw_losses(path: Path, history: pd.DataFrame, *, title: str) -> None:
    """One PNG of `loss_figure`."""
    _pyplot()
    _save(loss_figure(history, title=title), path)


def loss_figure(history: pd.DataFrame, *, title: str) -> Figure:
    """A panel for each loss term of a history.csv: training and validation by epoch.

    Raises
    ------
    ValueError
        The history holds no loss.
    """
    import matplotlib.pyplot as plt

    names = _terms(history)
    if not names:
        raise ValueError(
            f"history: got columns {', '.join(map(str, history.columns))}; expected the history.csv of a run"
        )
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure, grid = plt.subplots(
        num_rows, num_columns, figsize=(4.4 * num_columns, 3.0 * num_rows + 0.5), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left")
    best = _best_epoch(history)
    for axes, name in zip(grid.ravel(), names, strict=False):
        _curve(axes, history, name, best)
    for axes in grid.ravel()[len(names) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("nats per cell", fontsize=9.5)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=10)
    return figure


def draw_curves(path: Path, summary: pd.DataFrame, *, keep: str = "", chosen: float | None = None) -> None:
    """One PNG: what `recommendation.summarised` gives against alpha, a line for each model and covariate removed.

    Points are runs, lines their means; the chosen alpha is marked.
    """
    shown = {
        "mixing": "mixing of the covariate removed (iLISI)",
        "kept": f"mixing of {keep}, to be kept (iLISI)",
        "biology": "labels kept (NMI, ARI, accuracy)",
    }
    names = [name for name in shown if summary[name].notna().any()]
    plt = _pyplot()
    figure, grid = plt.subplots(1, max(1, len(names)), figsize=(5.0 * max(1, len(names)), 3.8), layout="constrained")
    alphas = sorted(summary["alpha"].unique())
    places = {alpha: place for place, alpha in enumerate(alphas)}  # even steps, which hold alpha 0 as well
    lines = list(summary.groupby(["model", "batch_key"]))
    for axes, name in zip(np.atleast_1d(grid), names, strict=False):
        for ((model, key), runs), colour in zip(lines, colours(len(lines)), strict=True):
            mean = runs.groupby("alpha")[name].mean()
            axes.plot([places[a] for a in mean.index], mean, color=colour, linewidth=1.8, label=f"{key} ({model})")
            axes.scatter([places[a] for a in runs["alpha"]], runs[name], color=colour, s=14, alpha=0.6)
        if chosen is not None:
            axes.axvline(places[chosen], color="#888888", linestyle=(0, (4, 3)), linewidth=1.0, label="recommended")
        axes.set_ylim(0, 1.08 * max(0.05, summary[name].max()))
        axes.set_title(shown[name], fontsize=11, loc="left")
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_xlabel("alpha")
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = np.atleast_1d(grid)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False, fontsize=9.5)
    _save(figure, path)


def draw_archetypes(path: Path, weights: pd.DataFrame, entropy: npt.NDArray[np.float32], *, title: str) -> None:
    """One PNG: a bar for each group of cells of its mean weights (groups x archetypes), and how mixed cells are."""
    plt = _pyplot()
    shown = weights.head(_MOST_LEGEND_ENTRIES)
    height = max(3.2, 0.27 * len(shown) + 1.6)
    figure, (bars, spread) = plt.subplots(1, 2, figsize=(11.5, height), layout="constrained", width_ratios=(2.4, 1.0))
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    left = np.zeros(len(shown))
    for name, colour in zip(shown.columns, colours(shown.shape[1]), strict=True):
        bars.barh(range(len(shown)), shown[name], left=left, color=colour, height=0.78, label=str(name))
        left += shown[name].to_numpy()
    names = [str(name) if len(str(name)) <= 28 else str(name)[:27] + "…" for name in shown.index]
    bars.set_yticks(range(len(shown)), names)
    bars.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), xlabel="mean weight of each archetype")
    bars.legend(
        title="archetype", ncols=10, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=8,
        title_fontsize=8.5, handlelength=1.0, columnspacing=0.9,
    )  # fmt: skip
    spread.hist(entropy, bins=np.linspace(0, 1, 41).tolist(), color=_VALIDATION_COLOUR)
    spread.set(xlabel="entropy of a cell (1: all archetypes alike)", ylabel="cells", xlim=(0, 1))
    for axes in (bars, spread):
        axes.tick_params(labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib
    import matplotlib.pyplot as plt

    # A notebook names its own, without which none of its later figures would be shown.
    if "MPLBACKEND" not in os.environ:
        matplotlib.use("agg")
    return plt


def _scatter(axes: Axes, coordinates: npt.NDArray[np.float32], codes: npt.NDArray[np.int32], num: int) -> None:
    palette = np.array([*colours(num), _MISSING_COLOUR])
    size = float(np.clip(14_000 / len(coordinates), 1.5, 24.0))
    axes.scatter(coordinates[:, 0], coordinates[:, 1], c=palette[codes].tolist(), s=size, linewidths=0, alpha=0.85)
    axes.set(xticks=[], yticks=[])
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    margin = 0.06 * (high - low)
    # Room at the top for the panel's name.
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + 2.2 * margin[1]))
    for spine in axes.spines.values():
        spine.set_color("#BBBBBB")


def _legend(axes: Axes, column: ObsColumn, num_columns: int) -> None:
    from matplotlib.lines import Line2D

    axes.axis("off")
    palette = colours(len(column.categories))
    shown = min(len(column.categories), _MOST_LEGEND_ENTRIES)
    if shown < len(column.categories):
        shown -= 1
    longest = 30 // num_columns + 4
    names = [c if len(c) <= longest else c[: longest - 1] + "…" for c in column.categories[:shown]]
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name, markersize=7)
        for colour, name in zip(palette, names, strict=False)
    ]
    if shown < len(column.categories):
        rest = f"and {len(column.categories) - shown} more"
        handles.append(Line2D([], [], marker="", linestyle="", label=rest))
    if (column.codes < 0).any():
        handles.append(Line2D([], [], marker="o", linestyle="", color=_MISSING_COLOUR, label="missing", markersize=7))
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.0,
        ncols=num_columns,
        fontsize=10 if num_columns == 1 else 8.5,
        frameon=False,
        handletextpad=0.2,
        columnspacing=0.8,
    )


_TITLES = {
    "loss": "loss",
    "elbo": "negative ELBO",
    "kl_local": "KL divergence",
    "adversarial_loss": "sample classifier (adversary)",
}


def _terms(history: pd.DataFrame) -> list[str]:
    """Loss terms to show, the total first; a total that repeats its only part is left out."""
    stems = [str(c).removesuffix("_train") for c in history.columns if str(c).endswith("_train")]
    before = "reconstruction_loss_"
    parts = [before + name for name in ordered(s.removeprefix(before) for s in stems if s.startswith(before))]
    names = ["loss"] if {"train_loss", "validation_loss"} & set(history.columns) else []
    names += ["elbo"] if "elbo" in stems else []
    names += parts or [s for s in stems if s == "reconstruction_loss"]
    names += [s for s in ("kl_local", *(t for t in stems if t.startswith("adversarial"))) if s in stems]
    return names


def _column_of(name: str, subset: str) -> str:
    return f"{subset}_loss" if name == "loss" else f"{name}_{subset}"


def _best_epoch(history: pd.DataFrame) -> float | None:
    if "validation_loss" not in history or history["validation_loss"].dropna().empty:
        return None
    return float(history["epoch"].to_numpy()[np.nanargmin(history["validation_loss"].to_numpy())])


def _curve(axes: Axes, history: pd.DataFrame, name: str, best: float | None) -> None:
    shown_values = []
    for subset, colour in (("train", _TRAIN_COLOUR), ("validation", _VALIDATION_COLOUR)):
        column = _column_of(name, subset)
        if column in history:
            points = history[["epoch", column]].dropna()
            axes.plot(points["epoch"], points[column], color=colour, linewidth=1.8, label=subset)
            # A loss falls tenfold in its first epochs: on their scale the rest would be a flat line.
            shown_values.append(points[column].to_numpy()[len(points) // 20 + (len(points) > 10) :])
    values = np.concatenate(shown_values)
    if len(values) and (spread := values.max() - values.min()) > 0:
        axes.set_ylim(values.min() - 0.05 * spread, values.max() + 0.05 * spread)
    if best is not None:
        axes.axvline(best, color="#D55E00", linewidth=1.0, linestyle=(0, (4, 3)), label=f"best (epoch {best:.0f})")
    modality = name.removeprefix("reconstruction_loss_")
    shown = f"reconstruction, {modality.upper()}" if modality != name else name.replace("_", " ")
    axes.set_title(_TITLES.get(name, shown), fontsize=11, loc="left")
    axes.set_xlabel("epoch", fontsize=9.5)
    axes.tick_params(labelsize=9, color="#888888")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.locator_params(axis="both", nbins=6)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as new:
        figure.savefig(new, dpi=150, facecolor="white")
    _pyplot().close(figure)
