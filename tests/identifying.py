"""Toy counts in which every value names its cell and its feature, so that a wrong row or column cannot pass a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse

from loaders.csr import SparseRows
from loaders.ingest.writer import ModalityLayout, StoreWriter
from loaders.modalities import MODALITIES
from loaders.plan import GOLDEN, splitmix64
from loaders.schema import Schema


def identifying_value(
    cells: npt.ArrayLike, features: npt.ArrayLike, *, modality: str = "rna", maximum: int = 60_000
) -> npt.NDArray[np.int64]:
    """The values, 1 to `maximum`, that cells show in features: a hash of both and of the modality (splitmix64)."""
    cells, features = np.broadcast_arrays(np.atleast_1d(cells), features)
    number = cells.astype(np.uint64) * np.uint64(GOLDEN)
    number = number ^ (features.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F))
    number = number + np.uint64((0x165667B19E3779F9 * (MODALITIES.index(modality) + 1) - GOLDEN) % 2**64)
    return (splitmix64(number) % np.uint64(maximum)).astype(np.int64) + 1


def identifying_counts(
    num_cells: int,
    num_features: int,
    *,
    modality: str = "rna",
    maximum: int = 60_000,
    first_cell: int = 0,
) -> scipy.sparse.csr_matrix:
    """(num_cells, num_features) uint32 counts with `identifying_value` at about a quarter of the places of each row.

    Which places are filled is a hash of cell and feature too. Row i is the cell
    `first_cell + i`. Every 97th cell is empty, as real data has empty cells.
    """
    features = np.arange(num_features)
    rows = []
    for cell in range(first_cell, first_cell + num_cells):
        is_filled = identifying_value(cell + 2**40, features, modality=modality, maximum=2**24) <= 2**22
        columns = features[is_filled] if cell % 97 != 96 else features[:0]
        rows.append((columns, identifying_value(cell, columns, modality=modality, maximum=maximum)))
    indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    indices = np.concatenate([np.zeros(0, np.int64), *(columns for columns, _ in rows)])
    values = np.concatenate([np.zeros(0, np.int64), *(row for _, row in rows)])
    return scipy.sparse.csr_matrix(
        (values.astype(np.uint32), indices.astype(np.int32), indptr), shape=(num_cells, num_features)
    )


def identifying_store(
    out: str | Path,
    *,
    num_cells: int,
    num_features: Mapping[str, int],
    absent: Mapping[str, Sequence[int]] | None = None,
) -> Schema:
    """Write a store of `identifying_counts`, cells in the order of their numbers; memory holds all of it.

    Parameters
    ----------
    num_features
        Per modality, for example `{"rna": 50, "atac": 200}`.
    absent
        Per modality the *samples* (0 to 2) whose cells lack it: a mosaic.

    Notes
    -----
    Cell c has the id `cell{c}`, stands in row c and belongs to the sample `s{c % 3}`; feature f of the
    modality m is called `{m}{f}`. Further obs columns: `cell_type` (categorical, missing in every eighth cell),
    `number` (c, int64).
    """
    cells = np.arange(num_cells)
    sample = cells % 3
    absent = absent or {}
    present = {name: ~np.isin(sample, list(absent.get(name, ()))) for name in num_features}
    layouts, matrices = {}, {}
    for name, features in num_features.items():
        rows = identifying_counts(num_cells, features, modality=name)[present[name]]
        matrices[name] = SparseRows(rows.indptr.astype(np.int64), rows.indices, rows.data.astype(np.uint16), features)
        names = pd.DataFrame(index=[f"{name}{feature}" for feature in range(features)])
        layouts[name] = ModalityLayout(names, np.uint16, rows.nnz / max(1, rows.shape[0]))
    obs: list[tuple[str, Any]] = [
        ("sample", pd.Categorical([f"s{code}" for code in sample])),
        (
            "cell_type",
            pd.Categorical.from_codes(np.where(cells % 8 == 7, -1, cells % 4).astype(np.int64), pd.Index(list("abcd"))),
        ),
        ("number", cells),
    ]
    with StoreWriter(out, modalities=layouts) as writer:
        for name, matrix in matrices.items():
            writer.append(name, matrix)
        partly = {name: mask for name, mask in present.items() if not mask.all()}
        ids = np.array([f"cell{cell}" for cell in cells], dtype=object)
        return writer.finish(cell_ids=ids, obs=obs, present=partly, is_shuffled=False)
