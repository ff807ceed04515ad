"""How well an embedding mixes samples and keeps labels apart: measures of scikit-learn and scib-metrics, as a table.

Shapes: n cells, d dimensions, k neighbours. Neighbours are exact and Euclidean.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.integer]

NUM_NEIGHBORS = 15
"""Neighbours of a cell in every measure that counts them."""

_LISI_NEIGHBORS, _KBET_NEIGHBORS, _GRAPH_NEIGHBORS = 90, 50, 15
"""As scib-metrics' benchmark takes them, the cell itself among them."""


_PACKAGES = {
    "sklearn": "scikit-learn",
    "scib_metrics": "scib-metrics",
    "umap": "umap-learn",
    "matplotlib": "matplotlib",
}


def require_extra() -> None:
    """RuntimeError where a library of the `[evaluate]` extra cannot be imported."""
    missing = [package for module, package in _PACKAGES.items() if not _can_import(module)]
    if missing:
        raise RuntimeError(f"evaluate: {' and '.join(missing)} cannot be imported; pip install 'liam-scale[evaluate]'")


def _can_import(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


class Scored:
    """An embedding and the columns of its cells; what several measures need is computed once.

    Parameters
    ----------
    points
        (n, d) embedding.
    samples, labels
        (n,) codes, none negative.
    k
        Neighbours of a cell.
    """

    def __init__(
        self,
        points: npt.NDArray[np.floating],
        *,
        samples: Codes | None = None,
        labels: Codes | None = None,
        k: int = NUM_NEIGHBORS,
        seed: int = 0,
    ) -> None:
        # Cells on a simplex lie close together, and |a|^2 + |b|^2 - 2ab loses digits far from the origin.
        self.points = np.asarray(points, np.float64) - np.mean(points, axis=0, dtype=np.float64)
        none = np.zeros(len(points), np.int32)
        self.samples, self.labels = (none if codes is None else codes for codes in (samples, labels))
        self.k, self.seed = k, seed

    @cached_property
    def nearest(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """(n, m) nearest other cells, nearest first, and their distances: as many as the widest measure asks for."""
        from sklearn.neighbors import NearestNeighbors

        width = min(max(self.k, _LISI_NEIGHBORS - 1), len(self.points) - 1)
        distances, indices = NearestNeighbors(n_neighbors=width, algorithm="brute").fit(self.points).kneighbors()
        return indices, distances

    def graph(self, width: int) -> Any:
        """`width` neighbours in scib-metrics' form: the cell itself is the first."""
        from scib_metrics.nearest_neighbors import NeighborsResults

        indices, distances = (found[:, : width - 1] for found in self.nearest)
        own = np.arange(len(indices))
        return NeighborsResults(
            indices=np.column_stack([own, indices]).astype(np.int32),
            distances=np.column_stack([np.zeros(len(own)), distances]).astype(np.float32),
        )

    def share_alike(self, codes: Codes) -> float:
        """Mean share of a cell's k nearest neighbours that have its own code."""
        return float((codes[self.nearest[0][:, : self.k]] == codes[:, None]).mean())

    @cached_property
    def is_predicted(self) -> npt.NDArray[np.bool_]:
        """(n,) whether the majority of a cell's k nearest neighbours *among the other samples* has the cell's label.

        Mixing that destroys the labels lowers it, and so does a gap between samples that holds unlike cells together.
        Ties go to the label with the lowest code.
        """
        from sklearn.neighbors import KNeighborsClassifier

        predicted = np.empty_like(self.labels)
        for sample in np.unique(self.samples):
            own = self.samples == sample
            voters = KNeighborsClassifier(min(self.k, np.count_nonzero(~own)), algorithm="brute")
            predicted[own] = voters.fit(self.points[~own], self.labels[~own]).predict(self.points[own])
        return predicted == self.labels

    @cached_property
    def clusters(self) -> Codes:
        """(n,) k-means cluster, of as many as there are labels, the best of 10 starts."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than labels
            return KMeans(len(np.unique(self.labels)), n_init=10, random_state=self.seed).fit_predict(self.points)


@dataclass(frozen=True)
class Measure:
    """One measure: its key in tables, what it says, which direction is better, and how it is computed."""

    key: str
    title: str
    better: str
    needs: str
    """"samples" or "labels", of which two must be there, or "both"."""
    compute: Callable[[Scored], float]
    cost: int = 0
    """0: scikit-learn alone; 1: scib-metrics, about ten seconds, most of it JAX; 2: minutes for 20,000 cells."""


def same_sample_ratio(scored: Scored) -> float:
    """Share of a cell's neighbours from its own sample, over the share expected if samples did not matter.

    Expected is sum_s p_s^2 with p_s the share of the cells in sample s. 1 is perfect mixing; the number of samples, for
    samples of equal size, is none.
    """
    return scored.share_alike(scored.samples) / np.square(np.bincount(scored.samples) / len(scored.samples)).sum()


def label_asw(scored: Scored) -> float:
    """Mean silhouette width of the labels, rescaled to (s + 1) / 2 (Rousseeuw 1987; scib)."""
    from sklearn.metrics import silhouette_score

    return (silhouette_score(scored.points, scored.labels) + 1) / 2


def _against_labels(name: str) -> Callable[[Scored], float]:
    """A score of scikit-learn between k-means and the labels."""

    def compute(scored: Scored) -> float:
        import sklearn.metrics

        return getattr(sklearn.metrics, name)(scored.labels, scored.clusters)

    return compute


def _scib(name: str, *columns: str, width: int | None = None) -> Callable[[Scored], float]:
    """A score of scib-metrics from the embedding, or from a graph of `width` neighbours."""

    def compute(scored: Scored) -> float:
        with _quietly():
            import scib_metrics

            points = scored.points.astype(np.float32) if width is None else scored.graph(width)
            return getattr(scib_metrics, name)(points, *(getattr(scored, column) for column in columns))

    return compute


MEASURES = (
    Measure(
        "label_accuracy",
        "label predicted from other samples (accuracy)",
        "higher",
        "both",
        lambda scored: scored.is_predicted.mean(),
    ),
    Measure(
        "same_sample_ratio",
        "neighbours from the same sample (times expected)",
        "towards 1",
        "samples",
        same_sample_ratio,
    ),
    Measure("label_asw", "label silhouette (ASW, 0 to 1)", "higher", "labels", label_asw),
    Measure(
        "label_purity",
        "neighbours with the same label (share)",
        "higher",
        "labels",
        lambda scored: scored.share_alike(scored.labels),
    ),
    Measure(
        "kmeans_nmi",
        "k-means against labels (NMI)",
        "higher",
        "labels",
        _against_labels("normalized_mutual_info_score"),
    ),
    Measure("kmeans_ari", "k-means against labels (ARI)", "higher", "labels", _against_labels("adjusted_rand_score")),
    Measure(
        "scib_ilisi",
        "scIB iLISI (mixing of samples)",
        "higher",
        "both",
        _scib("ilisi_knn", "samples", width=_LISI_NEIGHBORS),
        1,
    ),
    Measure(
        "scib_clisi",
        "scIB cLISI (separation of labels)",
        "higher",
        "both",
        _scib("clisi_knn", "labels", width=_LISI_NEIGHBORS),
        1,
    ),
    Measure(
        "scib_graph_connectivity",
        "scIB graph connectivity",
        "higher",
        "both",
        _scib("graph_connectivity", "labels", width=_GRAPH_NEIGHBORS),
        1,
    ),
    Measure(
        "scib_isolated_labels",
        "scIB isolated labels",
        "higher",
        "both",
        _scib("isolated_labels", "labels", "samples"),
        1,
    ),
    Measure(
        "scib_kbet",
        "scIB kBET (mixing of samples, per label)",
        "higher",
        "both",
        _scib("kbet_per_label", "samples", "labels", width=_KBET_NEIGHBORS),
        2,
    ),
    Measure(
        "scib_silhouette_batch",
        "scIB silhouette of samples",
        "higher",
        "both",
        _scib("silhouette_batch", "labels", "samples"),
        2,
    ),
    Measure(
        "scib_bras",
        "scIB BRAS (silhouette of samples, revised)",
        "higher",
        "both",
        _scib("bras", "labels", "samples"),
        2,
    ),
)
"""In the order of the table."""


def score(scored: Scored, *, most_cost: int = 0) -> dict[str, float]:
    """By key every measure of at most this cost that the columns allow."""
    there = {name for name in ("samples", "labels") if len(np.unique(getattr(scored, name))) > 1}
    return {
        m.key: float(m.compute(scored))
        for m in MEASURES
        if m.cost <= most_cost and there >= ({"samples", "labels"} if m.needs == "both" else {m.needs})
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what JAX and scib-metrics tell of accelerators and optional packages: nothing here needs them."""
    if "jax" not in sys.modules:
        # On a GPU JAX would take three quarters of its memory, which a training beside it may need.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
