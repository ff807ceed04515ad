"""What the loader asks of a store, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.csr import SparseRows
from loaders.schema import Schema


@dataclass(frozen=True)
class ObsColumn:
    """One obs column as codes.

    Attributes
    ----------
    codes
        (n,) int32 position in `categories`, -1 where the value is missing.
    categories
        Distinct values as strings, in their order.
    """

    codes: npt.NDArray[np.int32]
    categories: tuple[str, ...]


def describe_store(store: Store) -> str:
    """The `repr` of every store: where it is and what it holds."""
    return f"{type(store).__name__} {store.uri}: {store.schema!r}"


class Store(Protocol):
    """n cells, their obs columns, and per modality a sparse matrix over the cells that have it.

    Rows of a modality stand in the order of the cells. All methods may be called from several threads at once.
    """

    uri: str
    schema: Schema

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

    def row_nonzeros(self, modality: str) -> npt.NDArray[np.int64]:
        """(rows of the modality + 1,) offsets of the rows: the matrix's indptr."""
        ...

    def read_rows(self, modality: str, start: int, stop: int) -> SparseRows:
        """Rows [start, stop) of the modality's matrix."""
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

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        """Attributes of obsm[name], such as who made it; one entry for each store underneath that holds it."""
        ...

    def obs_frame(self) -> pd.DataFrame:
        """All obs columns, indexed by cell id. Memory grows with the number of cells."""
        ...


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
