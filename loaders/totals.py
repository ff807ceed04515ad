"""Totals of cells, as the likelihoods see them: after the loader's transform."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from loaders.stores.base import Store

ROWS_PER_READ = 4_096


def cell_totals(store: Store, modality: str, transform: str | None = None) -> npt.NDArray[np.float64]:
    """(rows of the modality,) sum of the transformed values of each row.

    Untransformed totals stand in the store; those of the centred log-ratio take one pass over the modality.
    """
    if transform in (None, "none"):
        return store.totals(modality)
    if transform != "clr":
        raise ValueError(f"transform of {modality}: got {transform!r}; use clr or none")
    num_features = store.schema.modalities[modality].num_features
    num_rows = store.schema.modalities[modality].num_cells
    sums = [np.zeros(0)]
    for start in range(0, num_rows, ROWS_PER_READ):
        rows = store.read_rows(modality, start, min(num_rows, start + ROWS_PER_READ))
        values = rows.values.astype(np.float64)
        row = np.repeat(np.arange(rows.num_rows), np.diff(rows.indptr))
        scale = np.exp(np.bincount(row, np.log1p(values), minlength=rows.num_rows) / num_features)
        sums.append(np.bincount(row, np.log1p(values / scale[row]), minlength=rows.num_rows))
    return np.concatenate(sums)
