"""How features vary over the cells of a store, by streamed passes: the most variable ones, and those of few cells.

Shapes: S samples, F features, R rows of a matrix, N entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.csr import compiled
from loaders.progress import Progress
from loaders.selection import encode_column
from loaders.stores.base import Store

Flavor = Literal["seurat_v3", "seurat_v3_paper"]

SPAN = 0.3
"""Share of the features that each local fit of variance to mean takes in, as Seurat and scanpy have it."""


def variable_features(
    store: Store,
    num_features: int,
    *,
    modality: str = "rna",
    flavor: Flavor = "seurat_v3",
    batch_key: str | None = None,
    is_shown: bool = True,
) -> pd.DataFrame:
    """The most variable features, equal to scanpy's `highly_variable_genes` of these flavors (Stuart et al. 2019).

    Two passes over the counts: means and variances of each sample, then the sums of counts that are clipped at the
    standard deviation expected at that mean. Memory is 32 bytes a feature and sample.

    Parameters
    ----------
    num_features
        How many are chosen.
    flavor
        Whether features are taken by the median of their ranks in the samples, then by the number of samples in which
        they are variable, or (`seurat_v3_paper`) in the other order.
    batch_key
        Obs column: variances are compared within each of its values. None: all cells are one sample.

    Returns
    -------
    DataFrame indexed by feature, of the columns that scanpy has: `highly_variable_nbatches`, `highly_variable_rank`,
    `variances_norm`, `highly_variable`.

    Raises
    ------
    ValueError
        No such modality, column or number; a sample of one cell, or one whose variances cannot be fitted.
    """
    loess = _loess()
    names = store.feature_names(modality)
    if not 1 <= num_features <= len(names):
        raise ValueError(f"hvg: got {num_features}; {store.uri} has {len(names):,} features of {modality}")
    codes, samples = _samples_of_rows(store, modality, batch_key)
    sizes = np.bincount(codes[codes >= 0], minlength=len(samples))
    if (sizes == 1).any():
        raise ValueError(
            f"batch_key: {samples[int(np.argmax(sizes == 1))]!r} of {batch_key} has one cell, which varies in nothing;"
            f" leave it out, or name a column with more cells a value"
        )
    sums, squares = np.zeros((2, len(samples), len(names)))
    _pass(store, modality, "means and variances", is_shown, codes, _add_moments, sums, squares)
    has_cells = np.flatnonzero(sizes)
    deviations, limits = np.zeros_like(sums), np.zeros_like(sums)
    means = sums / np.maximum(sizes, 1)[:, None]
    for code in has_cells:
        size = int(sizes[code])
        variance = (squares[code] / size - means[code] ** 2) * (size / (size - 1))
        where = f"batch_key: the variances of {samples[code]!r} ({size:,} cells)" if batch_key else "hvg: the variances"
        deviations[code] = _expected(means[code], variance, loess, where)
        limits[code] = deviations[code] * np.sqrt(size) + means[code]
    sums[:], squares[:] = 0, 0
    _pass(store, modality, "clipped variances", is_shown, codes, _add_clipped, limits, sums, squares)
    n = sizes[has_cells][:, None]
    mean, deviation, total, square = (array[has_cells] for array in (means, deviations, sums, squares))
    normed = (1 / ((n - 1) * deviation**2)) * (n * mean**2 + square - 2 * total * mean)
    return _ranked(normed, names, num_features, flavor)


def _loess() -> Callable[..., Any]:
    try:
        from skmisc.loess import loess
    except ImportError:
        raise ValueError(
            'hvg: the fit needs scikit-misc, which is not installed; pip install "liam-scale[features]"'
        ) from None
    return loess


def _samples_of_rows(store: Store, modality: str, key: str | None) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """(R,) sample of each row of a modality's matrix, -1 where it is of no cell; and the names of the samples."""
    codes: npt.NDArray[np.int64] = np.zeros(store.schema.num_cells, np.int64)
    samples: tuple[str, ...] = ("all",)
    if key is not None:
        try:
            column = encode_column(store, key, allow_missing=False)
        except ValueError as error:
            raise ValueError(f"batch_key: {error}") from None
        codes, samples = column.codes.astype(np.int64), column.categories
    rows = store.modality_rows(modality)
    of_row = np.full(store.matrix(modality).num_rows, -1, np.int64)
    if rows is None:
        of_row[:] = codes
    else:
        of_row[rows[rows >= 0]] = codes[rows >= 0]
    return of_row, samples


def _pass(
    store: Store,
    modality: str,
    what: str,
    is_shown: bool,
    codes: npt.NDArray[np.int64],
    add: Callable[..., None],
    *into: npt.NDArray[Any],
) -> None:
    """Give all rows to a kernel, with the samples that they are of."""
    matrix = store.matrix(modality)
    with Progress(f"{modality}: {what}", matrix.num_rows, unit="cells", is_shown=is_shown, unit_scale=True) as bar:
        for start, rows in matrix.in_order():
            add(codes[start : start + rows.num_rows], rows.indptr, rows.indices, rows.values, *into)
            bar.advance(rows.num_rows)


def _expected(
    mean: npt.NDArray[np.float64], variance: npt.NDArray[np.float64], loess: Callable[..., Any], where: str
) -> npt.NDArray[np.float64]:
    """(F,) standard deviations by a local fit of the logarithms of variance to mean; 1 where nothing varies."""
    varies = variance > 0
    expected = np.zeros(len(mean))
    try:
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=SPAN, degree=2)
        model.fit()
        expected[varies] = model.outputs.fitted_values
    except ValueError as error:
        said = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(
            f"{where} cannot be fitted: {int(varies.sum()):,} features vary ({said}); leave these cells out, or name a"
            f" column with more cells a value"
        ) from None
    return np.sqrt(10**expected)


def _ranked(normed: npt.NDArray[np.float64], names: npt.NDArray[np.str_], number: int, flavor: Flavor) -> pd.DataFrame:
    """Features by their ranks in the samples, (S, F) normed variances."""
    ranks = np.argsort(np.argsort(-normed, axis=1), axis=1).astype(np.float32)
    chosen_in = (ranks < number).sum(axis=0)
    ranks[ranks >= number] = np.nan
    median = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
    table = pd.DataFrame(index=pd.Index(names, dtype=object))
    table["highly_variable_nbatches"], table["highly_variable_rank"] = chosen_in, median
    table["variances_norm"] = normed.mean(axis=0)
    order = ["highly_variable_rank", "highly_variable_nbatches"]
    ascending = [True, False]
    if flavor == "seurat_v3_paper":
        order, ascending = order[::-1], ascending[::-1]
    best = table[order].sort_values(order, ascending=ascending, na_position="last").index[:number]
    table["highly_variable"] = table.index.isin(best)
    return table


def share_of_cells(store: Store, modality: str, *, is_shown: bool = True) -> npt.NDArray[np.float64]:
    """(F,) share of the cells that have a modality in which each feature has a count; one pass."""
    codes, _ = _samples_of_rows(store, modality, None)
    counts = np.zeros(len(store.feature_names(modality)), np.int64)
    _pass(store, modality, "cells of each feature", is_shown, codes, _add_cells, counts)
    return counts / max(1, int((codes >= 0).sum()))


@compiled
def _add_moments(codes, indptr, indices, values, sums, squares):  # type: ignore[no-untyped-def]
    """Add the values of rows, and their squares, to the (S, F) sums of their samples."""
    for row in range(len(codes)):
        code = codes[row]
        if code >= 0:
            for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
                value = np.float64(values[k])
                sums[code, np.uint64(indices[k])] += value
                squares[code, np.uint64(indices[k])] += value * value


@compiled
def _add_clipped(codes, indptr, indices, values, limits, sums, squares):  # type: ignore[no-untyped-def]
    """The same with values that are at most the (S, F) limits."""
    for row in range(len(codes)):
        code = codes[row]
        if code >= 0:
            for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
                feature = np.uint64(indices[k])
                value = min(np.float64(values[k]), limits[code, feature])
                sums[code, feature] += value
                squares[code, feature] += value * value


@compiled
def _add_cells(codes, indptr, indices, values, counts):  # type: ignore[no-untyped-def]
    """Count the rows in which each feature has a value above zero."""
    for row in range(len(codes)):
        if codes[row] >= 0:
            for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
                if values[k] > 0:
                    counts[np.uint64(indices[k])] += 1
