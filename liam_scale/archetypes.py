"""Archetypes: `liam-scale archetypes runs/a --out archetypes` tells what the corners of the latent simplex stand for.

An embedding of liam is a point of a simplex: every cell is a mixture of archetypes, one for each latent dimension.

Shapes: B cells, L archetypes, F features, K nearest cells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro

from liam_scale.command import Command
from liam_scale.evaluation.measures import require_extra
from liam_scale.evaluation.plots import draw_archetypes
from liam_scale.finding import stores_of
from liam_scale.model import Liam
from liam_scale.posterior import embedded, group_codes, shares, single
from liam_scale.run import RunDirectory
from liam_scale.training.devices import Device, check_device, device_of
from loaders.durable import replacing
from loaders.options import Range, check_options
from loaders.stores import Store

CELLS_PER_CHUNK = 65_536


@dataclass(frozen=True)
class ArchetypesConfig:
    """Tell what the archetypes of a run stand for: the cells nearest to each, its decoded profile, and how mixed cells
    are."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run whose embedding stands in the store."""
    store: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[STORE ...]")] = ()
    """Store with the embedding; default: that of the training."""
    groupby: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column, such as cell types: what the nearest cells are, and a bar of the picture for each group."""
    nearest: Annotated[int, Range(least=1)] = 50
    """Cells nearest to each archetype."""
    top: Annotated[int, Range(least=1)] = 20
    """Features of each modality that stand out most in an archetype's profile."""
    out: Path | None = None
    """Folder for archetypes.csv, nearest.csv, features.csv, cells.csv.gz, archetypes.png. Default: print the table."""
    plots: bool = True
    """Draw the picture into `out`, which needs the extra `evaluate`."""
    key: str = "X_liam"
    """Name of the embedding in obsm."""
    device: Device = "auto"
    """auto: CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        check_options(self, "--")
        check_device(self.device)
        if self.out is not None and self.out.exists():
            raise ValueError(f"--out: {self.out} exists; name a new folder")


@dataclass(frozen=True)
class Archetypes:
    """What the archetypes of a run stand for.

    Attributes
    ----------
    table
        A row for each: `cells`, those of which it is the largest part; `mean_weight` over all cells; `largest_weight`
        of any cell, far below 1 where no cell is like it and its profile is an extrapolation; with groups `group`, that
        of most of its nearest cells, and `group_share`, their share.
    nearest
        `archetype`, `cell`, `weight` (and `group`), largest weights first.
    features
        `archetype`, `modality`, `feature`, `share` (in the total of a cell that is this archetype alone, averaged over
        samples), `lfc` (log2 of it over the mean of the other archetypes), those that stand out most first.
    weights
        Mean weights by group (of all cells where there are no groups), rows sum to 1.
    entropy
        (n,) of each cell's weights in units of that of an even mixture: 0 is one archetype, 1 all alike. float32.
    largest
        (n,) archetype of which each cell has most, from 1.
    """

    table: pd.DataFrame
    nearest: pd.DataFrame
    features: pd.DataFrame
    weights: pd.DataFrame
    entropy: np.ndarray
    largest: np.ndarray

    def __repr__(self) -> str:
        sizes, tables = self.table["cells"], "table, nearest, features, weights: DataFrames"
        held = f"{(sizes > 0).sum():,} of {len(sizes):,} are the largest part of some of {len(self.largest):,} cells"
        return f"Archetypes: {held}\n    {tables}; entropy, largest: a value for each cell"


def archetypes(config: ArchetypesConfig, store: Store | None = None) -> Archetypes:
    """Look at all cells once and decode every archetype; memory is 6 bytes a cell, and what `--groupby` adds.

    Raises
    ------
    ValueError
        There is no such embedding or column, or `out` exists.
    """
    directory = RunDirectory(config.run)
    single(directory, "name")
    if config.out is not None and config.plots:
        require_extra()
    store = store or stores_of(directory, config.store)
    codes, names = (
        (np.zeros(store.schema.num_cells, dtype=np.int8), ("all",))
        if config.groupby is None
        else group_codes(store, config.groupby)
    )
    model = directory.load_model().to(device_of(config.device))
    count = model.num_latent
    sums, numbers = np.zeros((len(names), count)), np.zeros(len(names))
    total, entropy, largest = np.zeros(count), np.empty(len(codes), np.float32), np.empty(len(codes), np.int16)
    best_rows: np.ndarray = np.zeros((0, count), np.int64)
    best_weights: np.ndarray = np.zeros((0, count), np.float32)
    for latents in embedded(directory, model, store, key=config.key, cells=CELLS_PER_CHUNK, stores=config.store):
        rows, weights = latents.rows.cpu().numpy(), latents.mean.cpu().numpy()
        total += weights.sum(axis=0, dtype=np.float64)
        entropy[rows] = -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=1) / np.log(max(2, count))
        largest[rows] = weights.argmax(axis=1) + 1
        for group in np.unique(codes[rows][codes[rows] >= 0]):
            own = codes[rows] == group
            sums[group], numbers[group] = sums[group] + weights[own].sum(axis=0), numbers[group] + own.sum()
        best_weights = np.concatenate([best_weights, weights])
        best_rows = np.concatenate([best_rows, np.repeat(rows[:, None], count, axis=1)])
        order = np.argsort(-best_weights, axis=0, kind="stable")[: config.nearest]
        best_weights, best_rows = (np.take_along_axis(part, order, axis=0) for part in (best_weights, best_rows))
    labels = None if config.groupby is None else np.array([*names, None], dtype=object)[codes[best_rows]]
    nearest = _nearest(store, best_rows, best_weights, labels)
    table = pd.DataFrame(
        {
            "cells": np.bincount(largest, minlength=count + 1)[1:],
            "mean_weight": total / len(codes),
            "largest_weight": best_weights[0],
        },
        index=pd.RangeIndex(1, count + 1, name="archetype"),
    )
    if labels is not None:
        most = [pd.Series(column).value_counts(normalize=True).head(1) for column in labels.T]
        table["group"] = [str(one.index[0]) if len(one) else None for one in most]
        table["group_share"] = [float(one.iloc[0]) if len(one) else np.nan for one in most]
    mean = pd.DataFrame(sums / np.maximum(numbers, 1)[:, None], index=pd.Index(names), columns=table.index)
    features = _profiles(model, directory.features(), config.top)
    found = Archetypes(table, nearest, features, mean[numbers > 0], entropy, largest)
    if config.out is not None:
        _write(config, store, found)
    return found


def _nearest(store: Store, rows: np.ndarray, weights: np.ndarray, labels: np.ndarray | None) -> pd.DataFrame:
    """Long form of (K, L) rows, weights and labels."""
    ids = {row: str(store.cell_ids(row, row + 1)[0]) for row in np.unique(rows).tolist()}
    columns = {
        "archetype": np.repeat(np.arange(1, rows.shape[1] + 1), len(rows)),
        "cell": [ids[row] for row in rows.T.ravel().tolist()],
        "weight": weights.T.ravel(),
    }
    return pd.DataFrame(columns if labels is None else {**columns, "group": labels.T.ravel()})


def _profiles(model: Liam, names: dict[str, list[str]], top: int) -> pd.DataFrame:
    """The features that stand out in each archetype's decoded profile."""
    device, count = next(model.parameters()).device, model.num_latent
    parts = []
    for modality in model.modalities:
        corners, samples = torch.eye(count, device=device), range(len(model.data.samples))
        profile = torch.zeros(count, model.data.num_features[modality], dtype=torch.float64, device=device)
        for sample in samples:
            profile += shares(model, modality, corners, torch.full((count,), sample, device=device)) / len(samples)
        others = (profile.sum(dim=0) - profile) / max(1, count - 1)
        # A hundredth of an even share, so that the rarest features do not come first.
        floor = 0.01 / profile.shape[1]
        lfc = torch.log2((profile + floor) / (others + floor))
        chosen = lfc.topk(min(top, profile.shape[1]), dim=1)
        places = chosen.indices.cpu().numpy()
        parts.append(
            pd.DataFrame(
                {
                    "archetype": np.repeat(np.arange(1, count + 1), places.shape[1]),
                    "modality": modality,
                    "feature": np.array(names[modality], dtype=object)[places].ravel(),
                    "share": profile.gather(1, chosen.indices).cpu().numpy().ravel(),
                    "lfc": chosen.values.cpu().numpy().ravel(),
                }
            )
        )
    return pd.concat(parts).sort_values("archetype", kind="stable", ignore_index=True)


def _write(config: ArchetypesConfig, store: Store, found: Archetypes) -> None:
    assert config.out is not None
    with replacing(config.out, alone=True) as folder:
        folder.mkdir()
        found.table.to_csv(folder / "archetypes.csv", float_format="%.4g")
        found.nearest.to_csv(folder / "nearest.csv", index=False, float_format="%.4g")
        found.features.to_csv(folder / "features.csv", index=False, float_format="%.4g")
        for number, chunk in enumerate(_cells(store, found)):
            options = {"mode": "a", "header": number == 0, "float_format": "%.4g"}
            chunk.to_csv(folder / "cells.csv.gz", **options)  # type: ignore[call-overload]
        if config.plots:
            title = f"{config.run} on {Path(store.uri).name}"
            draw_archetypes(folder / "archetypes.png", found.weights, found.entropy, title=title)


def _cells(store: Store, found: Archetypes) -> Iterator[pd.DataFrame]:
    """Entropy and largest archetype of each cell, chunk by chunk."""
    for start in range(0, len(found.entropy), CELLS_PER_CHUNK):
        own = slice(start, min(len(found.entropy), start + CELLS_PER_CHUNK))
        index = pd.Index(store.cell_ids(own.start, own.stop), name="cell")
        yield pd.DataFrame({"archetype": found.largest[own], "entropy": found.entropy[own]}, index=index)


def _tell(config: ArchetypesConfig) -> None:
    found = archetypes(config)
    first = found.features.groupby(["archetype", "modality"], sort=False)["feature"]
    shown = first.apply(lambda names: " ".join(names.head(4))).unstack()
    print(found.table.join(shown).to_string(float_format="%.2f"))
    print(f"entropy of cells: median {np.median(found.entropy):.2f} of an even mixture")
    if config.out is not None:
        print(f"wrote {config.out}")


main = Command(
    ArchetypesConfig,
    _tell,
    prog="liam-scale archetypes",
    description="Corners of the latent simplex -> cells, profiles, a picture.",
)

if __name__ == "__main__":
    sys.exit(main())
