"""Imputation: what a model decodes for modalities that cells lack, against what was measured in them.

Measured and decoded values are shares of a cell's total; of ADT, shares of the sum of its centred log-ratios where the
model was trained on those. Beside the model stands the mean profile of the cells that have the modality, the same for
every cell: what an imputation knows that does not look at the cell.

Shapes: n cells, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from liam_scale.continuous import standardised
from liam_scale.evaluation.cells import TARGET_SUM, modality_places, read_counts, read_embedding
from liam_scale.model import Liam
from liam_scale.posterior import shares, single
from liam_scale.run import RunDirectory
from liam_scale.samples import sample_codes
from loaders.csr import centred_log_ratio
from loaders.modalities import Kind
from loaders.stores import Store

Values = npt.NDArray[np.float64]

MEAN_PROFILE = "mean profile"
"""Name of the baseline's column."""

_BYTES = 64 * 2**20
"""Memory of one array of cells x features at a time."""

TITLES = {
    "cell_r": ("cells: measured against decoded (Pearson's r)", "higher"),
    "feature_r": ("features: measured against decoded (Pearson's r)", "higher"),
    "auroc": ("peaks of a cell: open against decoded (AUROC)", "higher"),
    "deviance": ("held-out deviance (nats a count)", "lower"),
}
"""Title of each measure, and which direction is better."""


@dataclass(frozen=True)
class _Missing:
    """Cells that lack a modality here, in the order in which `truth` holds it."""

    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    """Of the model's features in the truth."""


def impute(
    directory: RunDirectory, store: Store, truth: Store, rows: npt.NDArray[np.int64], *, holder: Store, embedding: str
) -> pd.DataFrame:
    """Scores of what the run decodes for the modalities that cells lack in `store` and have in `truth`.

    Parameters
    ----------
    rows
        (n,) rows of the store whose cells are looked at.
    holder, embedding
        Store of the same cells, and the name in its obsm of the embedding that the run made.

    Returns
    -------
    A row for each measure and modality (index `measure`, column `of`), columns `mean profile`, the embedding and
    `cells`.

    Raises
    ------
    ValueError
        The run is a late integration, no cell is to be imputed, or the truth lacks features of the model.
    """
    record = single(directory, "impute with")
    model, codes = directory.load_model(), sample_codes(store, record.batch_key, record.data.samples)
    numbers = standardised(store, record.data.continuous)
    transforms = directory.loader_config().transforms(record.data.kinds)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name in model.modalities:
        missing = _missing(store, truth, rows, name, directory.features()[name])
        if missing is None:
            continue
        kind, is_clr = record.data.kinds[name], transforms.get(name) == "clr"
        profile = _mean_profile(store, name, rows, is_clr=is_clr)
        scored = {column: _Scores(kind, is_clr=is_clr) for column in (MEAN_PROFILE, embedding)}
        for cells, places in _chunks(missing, len(missing.columns)):
            counts = _values(truth, name, places, is_clr=is_clr)[:, missing.columns]
            decoded = _decoded(model, name, holder, embedding, cells, codes, numbers)
            scored[MEAN_PROFILE].add(counts, np.broadcast_to(profile, counts.shape))
            scored[embedding].add(counts, decoded)
        for column, one in scored.items():
            for key, value in one.results().items():
                found.setdefault((key, name), {})[column] = value
                found[key, name]["cells"] = len(missing.rows)
    if not found:
        raise ValueError(
            f"--truth: no cell of {store.uri} lacks a modality that {truth.uri} has for the same cell id; name the"
            " store with the measurements that were left out before training"
        )
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(["measure", "of"]).reset_index("of")


def _missing(
    store: Store, truth: Store, rows: npt.NDArray[np.int64], name: str, features: list[str]
) -> _Missing | None:
    """Cells to impute; None where there are none."""
    if name not in truth.schema.modalities:
        return None
    lacking = rows[modality_places(store, name, rows) < 0]
    here = pd.Index(store.cell_ids(0, store.schema.num_cells).astype(object))[lacking]
    there = pd.Index(truth.cell_ids(0, truth.schema.num_cells).astype(object)).get_indexer(here)
    places = np.where(there < 0, -1, modality_places(truth, name, np.maximum(there, 0)))
    order = np.argsort(places, kind="stable")
    order = order[places[order] >= 0]
    if not len(order):
        return None
    columns = pd.Index(truth.feature_names(name).astype(object)).get_indexer(features)
    if (columns < 0).any():
        lost = features[int(np.flatnonzero(columns < 0)[0])]
        raise ValueError(
            f"--truth: {truth.uri} lacks {(columns < 0).sum():,} of the {len(features):,} {name} features of the model,"
            f" such as {lost}; name a store with the features that the model was trained on"
        )
    return _Missing(lacking[order], places[order], columns)


def _chunks(missing: _Missing, width: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    step = max(1, _BYTES // (8 * width))
    for start in range(0, len(missing.rows), step):
        yield missing.rows[start : start + step], missing.places[start : start + step]


def _values(store: Store, name: str, places: npt.NDArray[np.int64], *, is_clr: bool) -> Values:
    """(n, F) counts, or their centred log-ratios; dense."""
    counts = read_counts(store, name, places)
    if is_clr:
        centred_log_ratio(counts.indptr, counts.data, counts.shape[1])
    return counts.toarray().astype(np.float64)


def _mean_profile(store: Store, name: str, rows: npt.NDArray[np.int64], *, is_clr: bool) -> Values:
    """(F,) share of each feature in all that was measured of the modality; none is 0."""
    places = np.sort(modality_places(store, name, rows))
    places = places[places >= 0]
    sums = np.zeros(store.schema.modalities[name].num_features)
    for start in range(0, len(places), step := max(1, _BYTES // (8 * len(sums)))):
        sums += _values(store, name, places[start : start + step], is_clr=is_clr).sum(axis=0)
    return (sums + 1) / (sums + 1).sum()


def _decoded(
    model: Liam,
    name: str,
    holder: Store,
    embedding: str,
    cells: npt.NDArray[np.int64],
    codes: npt.NDArray[np.integer],
    numbers: Mapping[str, npt.NDArray[np.float32]],
) -> Values:
    """(n, F) decoded shares."""
    order = np.argsort(cells)
    values = np.empty((len(cells), model.num_latent), np.float32)
    values[order] = read_embedding(holder, embedding, cells[order])
    with torch.no_grad():
        sample = torch.from_numpy(np.asarray(codes)[cells]).long()
        own = {key: torch.from_numpy(column[cells]) for key, column in numbers.items()}
        return shares(model, name, torch.from_numpy(values), sample, own).numpy().astype(np.float64)


class _Scores:
    """Measures of a modality, gathered chunk by chunk."""

    def __init__(self, kind: Kind, *, is_clr: bool) -> None:
        self.kind, self.is_clr = kind, is_clr
        self.sums: Values = np.zeros(6)[:, None]
        self.of_cells: dict[str, list[Values]] = {"cell_r": [], "auroc": [], "deviance": []}

    def add(self, counts: Values, decoded: Values) -> None:
        totals = counts.sum(axis=1)
        counts, decoded, totals = counts[totals > 0], decoded[totals > 0], totals[totals > 0]
        measured = counts / totals[:, None]
        # As in the baseline of the embedding; centred log-ratios are logarithms already.
        one, other = (s if self.is_clr else np.log1p(TARGET_SUM * s) for s in (measured, decoded))
        self.of_cells["cell_r"].append(_correlation(one.T, other.T))
        self.sums = self.sums + np.stack([np.ones(one.shape), one, other, one**2, other**2, one * other]).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(measured > 0, measured * (np.log(measured) - np.log(decoded)), 0)
        self.of_cells["deviance"].append(2 * terms.sum(axis=1))
        if self.kind.likelihood == "NM":
            self.of_cells["auroc"].append(_auroc(counts > 0, decoded))

    def results(self) -> dict[str, float]:
        """Means over cells and over the features that vary."""
        found = {key: float(np.nanmean(np.concatenate(values))) for key, values in self.of_cells.items() if values}
        number, one, other, squares, other_squares, products = self.sums
        covariance = products - one * other / number
        variances = squares - one**2 / number, other_squares - other**2 / number
        # What is left of a constant by rounding is no variance.
        varies = (variances[0] > 1e-9 * squares) & (variances[1] > 1e-9 * other_squares)
        r = covariance[varies] / np.sqrt((variances[0] * variances[1])[varies])
        found["feature_r"] = float(r.mean()) if len(r) else np.nan
        return {key: found[key] for key in TITLES if key in found}


def _correlation(one: Values, other: Values) -> Values:
    """Pearson's r of every column; NaN of a column that does not vary."""
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (one * other).sum(axis=0) / np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))


def _auroc(is_open: npt.NDArray[np.bool_], decoded: Values) -> Values:
    """Of every row: the probability that an open peak has the higher value than a closed one (Mann and Whitney)."""
    from scipy.stats import rankdata

    num_open = is_open.sum(axis=1)
    num_closed = is_open.shape[1] - num_open
    ranks = (rankdata(decoded, axis=1) * is_open).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (ranks - num_open * (num_open + 1) / 2) / (num_open * num_closed)
