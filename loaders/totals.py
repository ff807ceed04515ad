"""Sum of the counts of every cell, as the model's library-size priors need them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from loaders.csr import centred_log_ratio, row_sums
from loaders.stores.base import Store

CELLS_PER_READ = 4_096


def cell_totals(store: Store, modality: str, transform: str | None = None) -> npt.NDArray[np.float64]:
    """(rows of the modality,) sum of the values of each cell that has the modality.

    Parameters
    ----------
    transform
        None or "none": the stored totals. "clr": sums after the centred log-ratio of each cell, computed in one pass
        over the matrix, 4,096 cells at a time.
    """
    if modality not in store.schema.modalities:
        raise ValueError(f"modality: got {modality!r}; {store.uri} holds {', '.join(store.schema.modalities)}")
    if transform in (None, "none"):
        return store.totals(modality)
    if transform != "clr":
        raise ValueError(f"transform: got {transform!r} for {modality}; choose clr or none")
    count = store.schema.modalities[modality].num_cells
    totals = np.zeros(count, np.float64)
    for start in range(0, count, CELLS_PER_READ):
        stop = min(count, start + CELLS_PER_READ)
        rows = store.read_rows(modality, start, stop)
        values = rows.values.astype(np.float32)
        centred_log_ratio(rows.indptr, values, rows.num_features)
        totals[start:stop] = row_sums(rows.indptr, values)
    return totals
