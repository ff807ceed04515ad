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
        self,
        name: str,
        start: int,
        values: npt.NDArray[np.float32],
        num_cells: int,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        """Put (m, d) values into obsm[name] at the cells [start, start + m).

        The array is created, with `attributes`, when it is missing.
        """
        ...

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """(stop - start, d) rows of obsm[name]; ValueError where there is no such embedding."""
        ...

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        """Attributes of obsm[name], such as who made it; one entry for each store underneath that holds it."""
        ...

    def drop_embedding(self, name: str) -> None:
        """Remove obsm[name] where it is; for one process, before an embedding of another width is written."""
        ...

    def obs_frame(self) -> pd.DataFrame:
        """All obs columns, indexed by cell id. Memory grows with the number of cells."""
        ...
