"""What is asked of a store, whatever it stands in: by the loader, by an ingest, by evaluation and embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.csr import centred_log_ratio, row_sums
from loaders.formats.matrix import PEEK_ROWS, Matrix
from loaders.formats.measured import check_counts, extent
from loaders.schema import ObsColumn, Schema


def describe_store(store: Store) -> str:
    """The `repr` of every store: where it is and what it holds."""
    return f"{type(store).__name__} {store.uri}: {store.schema!r}"


class Store(Protocol):
    """n cells, their obs columns, and per modality a sparse matrix over the cells that have it.

    Rows of a modality stand in the order of the cells. All methods may be called from several threads at once.
    """

    uri: str
    schema: Schema
    row_alignment: int
    """Cells that are decoded together: blocks begin and end at multiples of it (1: anywhere)."""

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Ids of the cells [start, stop)."""
        ...

    def obs_column(self, name: str) -> ObsColumn:
        """A categorical, string, boolean or integer obs column as codes; ValueError if there is no such column."""
        ...

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        """(F,) names of the columns."""
        ...

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        """(n,) row of each cell in the modality's matrix, -1 where the cell lacks it; None if every cell has it."""
        ...

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        """(rows of the modality,) sum of the values of each row."""
        ...

    def matrix(self, modality: str) -> Matrix:
        """The counts of a modality, its rows those of `modality_rows`."""
        ...

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        """Put (n, d) values of all cells into obsm[name], with attributes, in the place of what stands there.

        RuntimeError where that cannot be: then the old values still stand.
        """
        ...

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """(stop - start, d) rows of obsm[name]; ValueError where there is no such embedding."""
        ...

    def embedding_names(self) -> list[str]:
        """Names in obsm that hold an embedding of all cells."""
        ...

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        """Attributes of obsm[name], such as who made it; one entry for each store underneath that holds it."""
        ...

    def obs_frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """All obs columns, or some, indexed by cell id. Memory grows with the number of cells."""
        ...

    def close(self) -> None:
        """Close the files; nothing is asked of the store after it."""
        ...


ROWS_PER_READ = 1 << 16
"""Rows of a store that are read at a time where some of them are wanted."""


def at_rows(read: Callable[[int, int], npt.NDArray[Any]], rows: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
    """What `read(start, stop)` gives at (m,) rows, m > 0, in their order; each part of the store is read once."""
    places, parts = [], []
    for part in np.unique(rows // ROWS_PER_READ):
        mine = np.flatnonzero(rows // ROWS_PER_READ == part)
        start, stop = int(rows[mine].min()), int(rows[mine].max()) + 1
        places.append(mine)
        parts.append(read(start, stop)[rows[mine] - start])
    return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


def ids_of(store: Store, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.str_]:
    """Ids of some cells, in their order."""
    return at_rows(store.cell_ids, rows) if len(rows) else np.zeros(0, np.str_)


def check_embedding(store: Store, name: str, values: npt.NDArray[np.float32]) -> None:
    """Refuse an embedding of other cells."""
    if values.ndim != 2 or len(values) != store.schema.num_cells:
        raise ValueError(
            f"obsm[{name!r}]: got values of shape {values.shape} for {store.uri} of {store.schema.num_cells} cells;"
            f" embed this store again"
        )


def check_finite(store: Store, values: npt.NDArray[np.float32], start: int, *, what: str, cure: str) -> None:
    """Refuse (m, d) values of the cells from `start` on of which some are NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1)) + start
    if len(bad):
        cells = ", ".join(str(store.cell_ids(int(row), int(row) + 1)[0]) for row in bad[:3])
        raise RuntimeError(f"{what}: got values that are not finite for {len(bad):,} cells ({cells}, ...); {cure}")


def glance_at_counts(store: Store, modalities: Iterable[str]) -> None:
    """Look at the first counts of what no ingest has looked at, where they are read once and no pass sums them before.

    Raises
    ------
    ValueError
        Some cannot be counts. What hardly is one is remarked upon.
    """
    for name in modalities:
        matrix = store.matrix(name)
        if matrix.value_dtype.kind == "f":
            check_counts(matrix.where, [extent(matrix.read(0, min(PEEK_ROWS, matrix.num_rows)).values)])


def cell_totals(store: Store, modality: str, transform: str | None = None) -> npt.NDArray[np.float64]:
    """(rows of the modality,) sum of the values of each cell that has the modality, for library-size priors.

    Parameters
    ----------
    transform
        None or "none": the stored totals. "clr": sums after the centred log-ratio of each cell, computed in one pass
        over the matrix.
    """
    if modality not in store.schema.modalities:
        raise ValueError(f"modality: got {modality!r}; {store.uri} holds {', '.join(store.schema.modalities)}")
    if transform in (None, "none"):
        return store.totals(modality)
    if transform != "clr":
        raise ValueError(f"transform: got {transform!r} for {modality}; choose clr or none")
    matrix = store.matrix(modality)
    totals, extents = np.zeros(matrix.num_rows), []
    for start, rows in matrix.in_order():
        extents.append(extent(rows.values))
        values = rows.values.astype(np.float32)
        centred_log_ratio(rows.indptr, values, rows.num_features)
        totals[start : start + rows.num_rows] = row_sums(rows.indptr, values)
    check_counts(matrix.where, extents)
    return totals
