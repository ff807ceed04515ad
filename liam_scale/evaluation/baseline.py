"""What liam is compared with: principal components of the normalised counts of all modalities side by side.

Shapes: n cells, F features, d components, b columns of a block of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse

NUM_COMPONENTS = 20
"""As many as liam's latent dimensions by default."""

TARGET_SUM = 1_000.0
"""Counts that every cell is scaled to in a modality before the logarithm."""

_ROWS_AT_ONCE = 1_024
"""Cells normalised at once: temporary memory does not grow with the number of cells."""

_EXTRA_COLUMNS, _KRYLOV_STEPS = 12, 5
"""Block Krylov iteration: 20 + 12 vectors and 5 steps give scores within 1e-4 of the largest on the demo's data."""


def log_normalised(counts: scipy.sparse.csr_matrix, *, target_sum: float = TARGET_SUM) -> scipy.sparse.csr_matrix:
    """log(1 + target_sum * y / n) with n the sum of a cell's counts; an empty cell stays zero. float32."""
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    return _log1p_scaled(counts, np.divide(target_sum, totals, out=np.zeros(len(totals)), where=totals > 0))


def centred_log_ratio(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """log1p(y / exp(sum_{y > 0} log1p(y) / F)) per cell, the transform the model's ADT input has. float32."""
    logs = scipy.sparse.csr_matrix((np.log1p(counts.data), counts.indices, counts.indptr), shape=counts.shape)
    return _log1p_scaled(counts, np.exp(-np.asarray(logs.sum(axis=1, dtype=np.float64)).ravel() / counts.shape[1]))


def normalised(
    modality: str, counts: scipy.sparse.csr_matrix, *, target_sum: float = TARGET_SUM
) -> scipy.sparse.csr_matrix:
    """The centred log-ratio of ADT, log-normalised counts of RNA and ATAC; absent counts stay zeros."""
    return centred_log_ratio(counts) if modality == "adt" else log_normalised(counts, target_sum=target_sum)


def principal_components(
    blocks: Sequence[scipy.sparse.csr_matrix], *, num_components: int = NUM_COMPONENTS
) -> npt.NDArray[np.float32]:
    """(n, d) scores of the centred matrix whose columns are those of all blocks, largest variance first.

    No copy of a block is made, dense or centred: a block Krylov space from a fixed start (Musco and Musco 2015), whose
    vectors are sparse products. Signs are fixed: the largest score of a component is positive.

    Raises
    ------
    ValueError
        Fewer than two cells or features.
    """
    num_cells, num_features = blocks[0].shape[0], sum(block.shape[1] for block in blocks)
    width = min(num_components, num_cells - 1, num_features - 1)
    if width < 1:
        raise ValueError(f"baseline: got {num_cells} cells x {num_features} features; give at least 2 of each")
    means = [np.asarray(block.mean(axis=0, dtype=np.float64)).ravel() for block in blocks]

    def onto_cells(vectors: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
        """Centred matrix times (F, b), given by block -> (n, b)."""
        products = (block @ v - mean @ v for block, mean, v in zip(blocks, means, vectors, strict=True))
        return sum(products, np.zeros((num_cells, vectors[0].shape[1])))

    def onto_features(vectors: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float32]]:
        """Transpose of the centred matrix times (n, b) -> (F, b), by block."""
        sums = vectors.sum(axis=0)
        single = vectors.astype(np.float32)
        return [(b.T @ single - np.outer(mean, sums)).astype(np.float32) for b, mean in zip(blocks, means, strict=True)]

    rng = np.random.default_rng(0x706361)
    columns = min(width + _EXTRA_COLUMNS, num_cells, num_features)
    span = np.linalg.qr(onto_cells([rng.normal(size=(b.shape[1], columns)).astype(np.float32) for b in blocks]))[0]
    basis, projected = span, onto_features(span)
    for _ in range(_KRYLOV_STEPS):
        room = min(num_cells, num_features) - basis.shape[1]
        if room == 0:
            break
        span = onto_cells([part[:, -span.shape[1] :] for part in projected])[:, :room]
        for _ in range(2):  # twice is enough to stay orthogonal to rounding
            span = np.linalg.qr(span - basis @ (basis.T @ span))[0]
        basis = np.concatenate([basis, span], axis=1)
        projected = [np.concatenate(pair, axis=1) for pair in zip(projected, onto_features(span), strict=True)]
    gram = sum((part.T.astype(np.float64) @ part for part in projected), np.zeros((basis.shape[1],) * 2))
    values, vectors = np.linalg.eigh(gram)
    chosen = np.argsort(-values)[:width]
    scores = basis @ vectors[:, chosen] * np.sqrt(np.maximum(values[chosen], 0.0))
    signs = np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(width)])
    return (scores * np.where(signs == 0, 1.0, signs)).astype(np.float32)


def _log1p_scaled(counts: scipy.sparse.csr_matrix, scale: npt.NDArray[np.float64]) -> scipy.sparse.csr_matrix:
    """log1p of every cell's counts times its scale. The pattern is shared with `counts`, its values are not changed."""
    values = np.empty(counts.nnz, np.float32)
    lengths = np.diff(counts.indptr)
    for start in range(0, counts.shape[0], _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, counts.shape[0])
        entries = slice(counts.indptr[start], counts.indptr[stop])
        values[entries] = np.log1p(counts.data[entries] * np.repeat(scale[start:stop], lengths[start:stop]))
    return scipy.sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)
