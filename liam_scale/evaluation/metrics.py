"""How well an embedding mixes samples and keeps labels apart: exact measures in NumPy and SciPy.

Shapes: n cells, d dimensions, k neighbours, L labels. Neighbours are exact and Euclidean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse

Codes = npt.NDArray[np.integer]

NUM_NEIGHBORS = 15
"""Neighbours of a cell in every measure that counts them."""

_BLOCK_BYTES = 64 * 2**20
"""Distances of one block of cells to all cells: memory stays the same for any number of cells."""


@dataclass(frozen=True)
class Measure:
    """One measure: its key in tables, what it says, and which direction is better."""

    key: str
    title: str
    better: str


MEASURES = (
    Measure("label_accuracy", "label predicted from other samples (accuracy)", "higher"),
    Measure("same_sample_ratio", "neighbours from the same sample (times expected)", "towards 1"),
    Measure("label_asw", "label silhouette (ASW, 0 to 1)", "higher"),
    Measure("label_purity", "neighbours with the same label (share)", "higher"),
    Measure("kmeans_nmi", "k-means against labels (NMI)", "higher"),
    Measure("kmeans_ari", "k-means against labels (ARI)", "higher"),
)


def nearest(
    embedding: npt.NDArray[np.floating], *, k: int, apart: Codes | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The k nearest other cells of every cell, nearest first.

    Parameters
    ----------
    embedding
        (n, d).
    apart
        (n,) codes: only cells of another code count as neighbours. None: every other cell.

    Returns
    -------
    (n, k) indices, -1 where a cell has fewer candidates, and (n, k) distances, inf there.
    """
    points = _centred(embedding)
    num_cells = len(points)
    width = min(k, num_cells - 1)
    indices = np.full((num_cells, k), -1, np.int64)
    distances = np.full((num_cells, k), np.inf)
    for start, squared in _blocks_of_squared_distances(points):
        rows = np.arange(len(squared))
        if apart is None:
            squared[rows, start + rows] = np.inf
        else:
            squared[apart[start : start + len(squared), None] == apart[None, :]] = np.inf
        found = np.argpartition(squared, width - 1, axis=1)[:, :width]
        near = np.take_along_axis(squared, found, axis=1)
        order = np.argsort(near, axis=1, kind="stable")
        near = np.take_along_axis(near, order, axis=1)
        block = slice(start, start + len(squared))
        indices[block, :width] = np.where(np.isfinite(near), np.take_along_axis(found, order, axis=1), -1)
        distances[block, :width] = np.sqrt(near)
    return indices, distances


def label_accuracy(
    embedding: npt.NDArray[np.floating], labels: Codes, samples: Codes, *, k: int = NUM_NEIGHBORS
) -> npt.NDArray[np.bool_]:
    """Whether the majority of a cell's k nearest neighbours *among the other samples* has the cell's label.

    Mixing that destroys the labels lowers it, and so does a gap between samples that holds unlike cells together.
    Ties go to the label with the lowest code. (n,) bool; its mean is the accuracy.
    """
    found, _ = nearest(embedding, k=k, apart=samples)
    num_labels = int(labels.max()) + 1
    rows = np.repeat(np.arange(len(found)), k)[found.ravel() >= 0]
    votes = scipy.sparse.coo_matrix(
        (np.ones(len(rows)), (rows, labels[found.ravel()[found.ravel() >= 0]])), shape=(len(found), num_labels)
    ).toarray()
    return (votes.argmax(axis=1) == labels) & (votes.sum(axis=1) > 0)


def same_sample_ratio(neighbors: npt.NDArray[np.int64], samples: Codes) -> float:
    """Share of a cell's neighbours from its own sample, over the share expected if samples did not matter.

    Expected is sum_s p_s^2 with p_s the share of the cells in sample s. 1 is perfect mixing; the number of samples, for
    samples of equal size, is none.
    """
    shares = np.bincount(samples) / len(samples)
    return float(_share_alike(neighbors, samples) / np.square(shares).sum())


def label_purity(neighbors: npt.NDArray[np.int64], labels: Codes) -> float:
    """Mean share of a cell's neighbours, of any sample, with the cell's own label."""
    return float(_share_alike(neighbors, labels))


def label_asw(embedding: npt.NDArray[np.floating], labels: Codes) -> float:
    """Mean silhouette width of the labels, rescaled to (s + 1) / 2 (Rousseeuw 1987; scib).

    Exact, in blocks. A cell that is alone with its label has width 0.
    """
    points = _centred(embedding)
    num_labels = int(labels.max()) + 1
    counts = np.bincount(labels, minlength=num_labels).astype(np.float64)
    membership = np.zeros((len(points), num_labels))
    membership[np.arange(len(points)), labels] = 1.0
    total = 0.0
    for start, squared in _blocks_of_squared_distances(points):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = 0.0
        sums = np.sqrt(squared, out=squared) @ membership
        own = labels[start : start + len(squared)]
        inner = sums[rows, own] / np.maximum(1.0, counts[own] - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(counts > 0, sums / counts, np.inf)
        means[rows, own] = np.inf
        outer = means.min(axis=1)
        scale = np.maximum(np.maximum(inner, outer), np.finfo(np.float64).tiny)
        total += np.where(counts[own] > 1, (outer - inner) / scale, 0.0).sum()
    return float((total / len(points) + 1) / 2)


def kmeans(
    embedding: npt.NDArray[np.floating], num_clusters: int, *, seed: int, restarts: int = 10, iterations: int = 100
) -> npt.NDArray[np.int64]:
    """(n,) cluster of each cell by Lloyd's algorithm from k-means++ seeds, the best of `restarts`."""
    points = _centred(embedding)
    rng = np.random.default_rng((seed, 0x6B6D))
    best, best_inertia = np.zeros(len(points), np.int64), np.inf
    for _ in range(restarts):
        centres = _kmeans_plus_plus(points, num_clusters, rng)
        codes = np.full(len(points), -1)
        for _ in range(iterations):
            squared = _squared_distances(points, centres)
            before, codes = codes, squared.argmin(axis=1)
            if np.array_equal(before, codes):
                break
            counts = np.bincount(codes, minlength=num_clusters)
            sums = np.stack([np.bincount(codes, points[:, j], num_clusters) for j in range(points.shape[1])], axis=1)
            centres = np.where(counts[:, None] > 0, sums / np.maximum(1, counts)[:, None], centres)
        inertia = squared.min(axis=1).sum()
        if inertia < best_inertia:
            best, best_inertia = codes, inertia
    return best


def nmi(first: Codes, second: Codes) -> float:
    """Mutual information of two groupings over the mean of their entropies (arithmetic), 0 to 1."""
    joint = _contingency(first, second) / len(first)
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    present = joint > 0
    mutual = (joint[present] * np.log(joint[present] / np.outer(rows, columns)[present])).sum()
    mean_entropy = (_entropy(rows) + _entropy(columns)) / 2
    return float(mutual / mean_entropy) if mean_entropy > 0 else 1.0


def ari(first: Codes, second: Codes) -> float:
    """Rand index of two groupings adjusted for chance (Hubert and Arabie 1985), 1 for equal groupings."""

    def pairs(counts: npt.NDArray[np.floating]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    joint = _contingency(first, second)
    together, in_first, in_second = pairs(joint), pairs(joint.sum(axis=1)), pairs(joint.sum(axis=0))
    expected = in_first * in_second / (len(first) * (len(first) - 1) / 2)
    largest = (in_first + in_second) / 2
    return (together - expected) / (largest - expected) if largest != expected else 1.0


def score(
    embedding: npt.NDArray[np.floating],
    *,
    samples: Codes | None,
    labels: Codes | None,
    k: int = NUM_NEIGHBORS,
    seed: int = 0,
) -> dict[str, float]:
    """Every measure of `MEASURES` that the given columns allow.

    Parameters
    ----------
    embedding
        (n, d).
    samples, labels
        (n,) codes, none negative; None where there is no such column. Measures between samples need two samples.
    """
    neighbors, _ = nearest(embedding, k=k)
    scores: dict[str, float] = {}
    if samples is not None and len(np.unique(samples)) > 1:
        if labels is not None:
            scores["label_accuracy"] = float(label_accuracy(embedding, labels, samples, k=k).mean())
        scores["same_sample_ratio"] = same_sample_ratio(neighbors, samples)
    if labels is not None and len(np.unique(labels)) > 1:
        clusters = kmeans(embedding, len(np.unique(labels)), seed=seed)
        scores["label_asw"] = label_asw(embedding, labels)
        scores["label_purity"] = label_purity(neighbors, labels)
        scores["kmeans_nmi"] = nmi(clusters, labels)
        scores["kmeans_ari"] = ari(clusters, labels)
    return scores


def _centred(embedding: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """float64 and mean zero: |a|^2 + |b|^2 - 2ab loses digits far from the origin, and cells on a simplex lie close."""
    points = np.asarray(embedding, np.float64)
    return points - points.mean(axis=0)


def _squared_distances(points: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    squared = -2.0 * points @ others.T
    squared += np.square(points).sum(axis=1)[:, None]
    squared += np.square(others).sum(axis=1)[None, :]
    return np.maximum(squared, 0.0, out=squared)


def _blocks_of_squared_distances(points: npt.NDArray[np.float64]) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yields (first cell, (cells, n) squared distances to all cells), in order."""
    cells = max(1, _BLOCK_BYTES // (8 * len(points)))
    for start in range(0, len(points), cells):
        yield start, _squared_distances(points[start : start + cells], points)


def _share_alike(neighbors: npt.NDArray[np.int64], codes: Codes) -> float:
    known = neighbors >= 0
    return ((codes[neighbors] == codes[:, None]) & known).sum() / known.sum()


def _kmeans_plus_plus(
    points: npt.NDArray[np.float64], num_clusters: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Centres drawn one after another with probability of the squared distance to the nearest (Arthur 2007)."""
    centres = [points[rng.integers(len(points))]]
    squared = np.square(points - centres[0]).sum(axis=1)
    for _ in range(num_clusters - 1):
        total = squared.sum()
        chosen = rng.choice(len(points), p=squared / total) if total > 0 else rng.integers(len(points))
        centres.append(points[chosen])
        squared = np.minimum(squared, np.square(points - points[chosen]).sum(axis=1))
    return np.stack(centres)


def _contingency(first: Codes, second: Codes) -> npt.NDArray[np.float64]:
    shape = (int(first.max()) + 1, int(second.max()) + 1)
    return scipy.sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=shape).toarray()


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
