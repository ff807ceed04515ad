"""One modality of a store: its matrix and what stands beside it, read when first asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loaders.csr import row_sums
from loaders.stores.matrices import Matrix, read_all

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModalityPart:
    """A modality; the callables compute once and may be called from several threads."""

    matrix: Matrix
    feature_names: Callable[[], npt.NDArray[np.str_]]
    rows: Callable[[], npt.NDArray[np.int64] | None]
    """(n,) row of each cell, -1 where the cell lacks the modality; None if row i is cell i."""
    totals: Callable[[], npt.NDArray[np.float64]]


def totals_by_reading(matrix: Matrix, label: str) -> npt.NDArray[np.float64]:
    """(rows,) sum of each row, by one pass over the matrix that holds a bounded number of rows."""
    _log.info("%s: summing the counts of %d cells, as the store does not hold the sums", label, matrix.num_rows)
    sums = [row_sums(rows.indptr, rows.values) for rows in read_all(matrix)]
    return np.concatenate([np.zeros(0), *sums])
