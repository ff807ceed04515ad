"""Sparse rows in NumPy: the form in which counts travel from a store to a minibatch.

Shapes: B rows (cells), F features, N non-zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse


@dataclass(frozen=True)
class SparseRows:
    """B rows of a sparse matrix with F columns, compressed by row; columns within a row ascend.

    Attributes
    ----------
    indptr
        (B + 1,) int64; row i holds the entries indptr[i]:indptr[i + 1].
    indices
        (N,) column of each entry, an unsigned type or int32.
    values
        (N,) uint8, uint16, uint32 or float32.
    num_features
        F.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.integer]
    values: npt.NDArray[np.generic]
    num_features: int

    @property
    def num_rows(self) -> int:
        return len(self.indptr) - 1

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """The same rows as a SciPy CSR matrix, values as float32."""
        return scipy.sparse.csr_matrix(
            (self.values.astype(np.float32), self.indices.astype(np.int32), self.indptr),
            shape=(self.num_rows, self.num_features),
        )

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.spmatrix) -> SparseRows:
        rows = scipy.sparse.csr_matrix(matrix)
        rows.sort_indices()
        return cls(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data, rows.shape[1])
