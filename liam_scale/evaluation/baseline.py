"""What liam is compared with: principal components of the normalised counts of all modalities side by side.

Shapes: n cells, F features of all modalities together, d components.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.linalg

NUM_COMPONENTS = 20
"""As many as liam's latent dimensions by default."""

TARGET_SUM = 1_000.0
"""Counts that every cell is scaled to in a modality before the logarithm."""


def log_normalised(counts: scipy.sparse.csr_matrix, *, target_sum: float = TARGET_SUM) -> scipy.sparse.csr_matrix:
    """log(1 + target_sum * y / n) with n the sum of a cell's counts; an empty cell stays zero. float32."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(target_sum, totals, out=np.zeros(len(totals), np.float64), where=totals > 0)
    return _with_values(counts, np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr))))


def centred_log_ratio(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """log1p(y / exp(sum_{y > 0} log1p(y) / F)) per cell, the transform the model's ADT input has. float32."""
    logs = scipy.sparse.csr_matrix((np.log1p(counts.data), counts.indices, counts.indptr), shape=counts.shape)
    means = np.asarray(logs.sum(axis=1)).ravel() / counts.shape[1]
    return _with_values(counts, np.log1p(counts.data / np.repeat(np.exp(means), np.diff(counts.indptr))))


def principal_components(
    matrix: scipy.sparse.csr_matrix, *, num_components: int = NUM_COMPONENTS
) -> npt.NDArray[np.float32]:
    """(n, d) scores of the centred matrix, largest variance first; the matrix itself is never made dense or centred.

    Exact to rounding (Lanczos with a fixed start). Signs are fixed: the largest score of a component is positive.
    """
    width = min(num_components, min(matrix.shape) - 1)
    if width < 1:
        raise ValueError(f"baseline: got {matrix.shape[0]} cells x {matrix.shape[1]} features; give at least 2 of each")
    rows = matrix.astype(np.float64)
    means = np.asarray(rows.mean(axis=0)).ravel()
    centred = scipy.sparse.linalg.LinearOperator(
        rows.shape,
        matvec=lambda x: rows @ x.ravel() - means @ x.ravel(),
        rmatvec=lambda y: rows.T @ y.ravel() - means * y.sum(),
        dtype=np.float64,
    )
    start = np.random.default_rng(0x706361).normal(size=min(rows.shape))
    left, singular, _ = scipy.sparse.linalg.svds(centred, k=width, v0=start)
    order = np.argsort(-singular)
    scores = left[:, order] * singular[order]
    signs = np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(width)])
    return (scores * np.where(signs == 0, 1.0, signs)).astype(np.float32)


def baseline_embedding(
    counts: Mapping[str, scipy.sparse.csr_matrix],
    *,
    num_components: int = NUM_COMPONENTS,
    target_sum: float = TARGET_SUM,
) -> npt.NDArray[np.float32]:
    """(n, d) principal components of log-normalised RNA and ATAC and CLR of ADT, side by side; absent counts are zeros.

    Parameters
    ----------
    counts
        Per modality (n, F_m) counts of the same cells.
    """
    blocks = [
        centred_log_ratio(matrix) if modality == "adt" else log_normalised(matrix, target_sum=target_sum)
        for modality, matrix in counts.items()
    ]
    return principal_components(scipy.sparse.hstack(blocks, format="csr"), num_components=num_components)


def _with_values(counts: scipy.sparse.csr_matrix, values: npt.NDArray[np.floating]) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix((values.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)
