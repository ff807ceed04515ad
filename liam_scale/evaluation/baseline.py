"""What liam is compared with: principal components of the normalised counts of all modalities side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse

from loaders.csr import centred_log_ratio

NUM_COMPONENTS = 20
"""As many as liam's latent dimensions by default."""

TARGET_SUM = 1_000.0
"""Counts that every cell is scaled to in a modality before the logarithm."""


def normalised(
    modality: str, counts: scipy.sparse.csr_matrix, *, target_sum: float = TARGET_SUM
) -> scipy.sparse.csr_matrix:
    """The centred log-ratio of ADT, log(1 + target_sum * share) of RNA and ATAC; absent counts stay zeros. float32."""
    from sklearn.preprocessing import normalize

    if modality == "adt":
        ratios = scipy.sparse.csr_matrix(counts, dtype=np.float32, copy=True)
        centred_log_ratio(ratios.indptr, ratios.data, counts.shape[1])
        return ratios
    shares = normalize(scipy.sparse.csr_matrix(counts, dtype=np.float32), norm="l1")
    shares.data = np.log1p(target_sum * shares.data, dtype=np.float32)
    return shares


def principal_components(
    blocks: Sequence[scipy.sparse.csr_matrix], *, num_components: int = NUM_COMPONENTS
) -> npt.NDArray[np.float32]:
    """(n, d) scores of the centred matrix whose columns are those of all blocks, largest variance first.

    Raises
    ------
    ValueError
        Fewer than two cells or features.
    """
    from sklearn.decomposition import PCA

    together = scipy.sparse.hstack(blocks, format="csr")
    width = min(num_components, *(size - 1 for size in together.shape))
    if width < 1:
        raise ValueError(
            f"baseline: got {together.shape[0]} cells x {together.shape[1]} features; give at least 2 of each"
        )
    # ARPACK centres a sparse matrix without making it dense.
    return PCA(width, svd_solver="arpack", random_state=0).fit_transform(together).astype(np.float32)
