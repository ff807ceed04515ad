"""How well an embedding mixes samples and keeps labels apart: the table of measures, one small function each.

What scikit-learn and scib-metrics have is theirs. A measure of a covariate (sample, site, ...) that needs labels takes
the first label column, a measure of a label that needs samples the first covariate.

The last ones are those of liam's paper as it took them, by scib 1.0.1, for comparing with its tables (`--published`)
alone: of the graph of neighbours, not of the distances. The graph is UMAP's over 15 neighbours, as scanpy makes it.
LISI walks it by shortest paths whose steps are the *weights* of the edges, so that weak edges count as near: its
figures cannot be compared with those of other LISIs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from liam_scale.evaluation.scored import (
    GRAPH_NEIGHBORS,
    KBET_NEIGHBORS,
    LISI_NEIGHBORS,
    Scored,
    as_graph,
    median_lisi,
    scib_graph,
)

Compute = Callable[[Scored, str, str], float]
"""From the embedding, the name of a covariate (or of the column of pairs or pseudotime) and that of a label."""

_PACKAGES = {
    "sklearn": "scikit-learn",
    "scib_metrics": "scib-metrics",
    "umap": "umap-learn",
    "matplotlib": "matplotlib",
}

_FEWEST_CELLS = 10
"""Labels with fewer cells say nothing of mixing within a label."""


@dataclass(frozen=True)
class Measure:
    """One measure: its key in tables, what it says, which direction is better, and how it is computed.

    `of` is what it is computed for, each covariate, label, or column of pairs or pseudotime; `needs` what must be
    there, of a column at least two values; `cost` 0: scikit-learn alone, 1: seconds, most of them JAX, 2: minutes for
    20,000 cells.
    """

    key: str
    title: str
    better: str
    of: Literal["covariate", "label", "pair", "pseudotime"]
    needs: tuple[str, ...]
    cost: int
    is_published: bool
    compute: Compute


MEASURES: dict[str, Measure] = {}
"""By key, in the order of the table."""


def require_extra() -> None:
    """RuntimeError where a library of the `[evaluate]` extra cannot be imported."""
    missing = [package for module, package in _PACKAGES.items() if not _can_import(module)]
    if missing:
        raise RuntimeError(f"evaluate: {' and '.join(missing)} cannot be imported; pip install 'liam-scale[evaluate]'")


def score(
    scored: Scored,
    *,
    covariates: Sequence[str] = (),
    labels: Sequence[str] = (),
    pairs: Sequence[str] = (),
    pseudotimes: Sequence[str] = (),
    most_cost: int = 2,
    with_published: bool = False,
) -> dict[tuple[str, str], float]:
    """By key and column every measure of at most this cost that the columns allow."""
    columns = {
        kind: [name for name in names if len(np.unique(scored.codes[name])) > 1]
        for kind, names in (("covariate", covariates), ("label", labels), ("pair", pairs))
    }
    columns["pseudotime"] = list(pseudotimes)
    first = {kind: (names[0] if names else "") for kind, names in columns.items()}
    first["cell_cycle"] = "cell_cycle" if "cell_cycle" in scored.known else ""
    found = {}
    with _quietly():
        for measure in MEASURES.values():
            if (measure.cost > most_cost and not measure.is_published) or measure.is_published > with_published:
                continue
            for name in columns[measure.of]:
                asked = {**first, measure.of: name}
                if all(asked[kind] for kind in measure.needs):
                    covariate = name if measure.of in ("pair", "pseudotime") else asked["covariate"]
                    found[measure.key, name] = float(measure.compute(scored, covariate, asked["label"]))
    return found


def measure(
    title: str,
    better: str,
    *,
    of: Literal["covariate", "label", "pair", "pseudotime"],
    needs: str = "",
    cost: int = 0,
    is_published: bool = False,
) -> Callable[[Compute], Compute]:
    """Enter a function into the table under its name."""

    def enter(compute: Compute) -> Compute:
        key, columns = compute.__name__, (of, *needs.split())
        MEASURES[key] = Measure(key, title, better, of, columns, cost, is_published, compute)
        return compute

    return enter


@measure("label predicted from other samples (accuracy)", "higher", of="label", needs="covariate")
def label_accuracy(scored: Scored, covariate: str, label: str) -> float:
    """Mixing that destroys the labels lowers it, and so does a gap between samples that holds unlike cells together."""
    return (scored.predicted(covariate, label) == scored.codes[label]).mean()


@measure("label predicted, every label alike (macro recall)", "higher", of="label", needs="covariate")
def macro_recall(scored: Scored, covariate: str, label: str) -> float:
    from sklearn.metrics import recall_score

    codes = scored.codes[label]
    return recall_score(codes, scored.predicted(covariate, label), average="macro", labels=np.unique(codes))


@measure("neighbours with the same label (share)", "higher", of="label")
def label_purity(scored: Scored, covariate: str, label: str) -> float:
    return scored.share_alike(label)


@measure("separation of labels (cLISI)", "higher", of="label", cost=1)
def clisi(scored: Scored, covariate: str, label: str) -> float:
    import scib_metrics

    return scib_metrics.clisi_knn(as_graph(scored.nearest, LISI_NEIGHBORS), scored.codes[label])


@measure("cells of a label hang together (graph connectivity)", "higher", of="label", cost=1)
def graph_connectivity(scored: Scored, covariate: str, label: str) -> float:
    import scib_metrics

    return scib_metrics.graph_connectivity(as_graph(scored.nearest, GRAPH_NEIGHBORS), scored.codes[label])


@measure("labels of the fewest samples found (isolated-label F1)", "higher", of="label", needs="covariate", cost=1)
def isolated_label_f1(scored: Scored, covariate: str, label: str) -> float:
    """Mean over the labels that stand in the fewest samples of the F1 of the cluster that fits each best (scib)."""
    from sklearn.metrics.cluster import contingency_matrix

    codes = scored.codes[label]
    found = contingency_matrix(scored.codes[covariate], codes)
    num_samples = (found > 0).sum(axis=0)
    best = np.zeros(found.shape[1])
    for clusters in scored.clusterings:
        overlap = contingency_matrix(codes, clusters)
        f1 = 2 * overlap / (overlap.sum(axis=1, keepdims=True) + overlap.sum(axis=0, keepdims=True))
        best = np.maximum(best, f1.max(axis=1))
    return best[num_samples == num_samples.min()].mean()


def _enter_clusterings() -> None:
    """NMI, AMI and ARI of Leiden and of k-means: six measures of one form."""
    scores = {"nmi": "normalized_mutual_info", "ami": "adjusted_mutual_info", "ari": "adjusted_rand"}
    for clusters, cost, title in (("leiden", 1, "Leiden at its best resolution"), ("kmeans", 0, "k-means")):
        for short, name in scores.items():

            def compute(scored: Scored, covariate: str, label: str, name: str = name, kind: str = clusters) -> float:
                import sklearn.metrics

                return getattr(sklearn.metrics, f"{name}_score")(scored.codes[label], getattr(scored, kind)(label))

            compute.__name__ = f"{clusters}_{short}"
            measure(f"{title} against labels ({short.upper()})", "higher", of="label", cost=cost)(compute)


_enter_clusterings()


@measure("neighbours from the same sample (times expected)", "towards 1", of="covariate")
def same_sample_ratio(scored: Scored, covariate: str, label: str) -> float:
    """Share of a cell's neighbours from its own sample, over the share expected if samples did not matter.

    Expected is sum_s p_s^2 with p_s the share of the cells in sample s. 1 is perfect mixing; the number of samples, for
    samples of equal size, is none.
    """
    codes = scored.codes[covariate]
    return scored.share_alike(covariate) / np.square(np.bincount(codes) / len(codes)).sum()


@measure("mixing of samples (iLISI)", "higher", of="covariate", cost=1)
def ilisi(scored: Scored, covariate: str, label: str) -> float:
    import scib_metrics

    return scib_metrics.ilisi_knn(as_graph(scored.nearest, LISI_NEIGHBORS), scored.codes[covariate])


@measure("mixing of samples within labels (CiLISI)", "higher", of="covariate", needs="label", cost=1)
def cilisi(scored: Scored, covariate: str, label: str) -> float:
    """Mean over cells of LISI among the cells of their label, 0 to 1 by the label's own samples (Andreatta 2024).

    Labels of one sample or of fewer than 10 cells are left out.
    """
    import scib_metrics
    from sklearn.metrics.cluster import contingency_matrix

    codes = scored.codes[covariate]
    lisi = scib_metrics.lisi_knn(as_graph(scored.nearest_alike(label), LISI_NEIGHBORS), codes)
    found = contingency_matrix(codes, scored.codes[label])
    of_cell = np.unique(scored.codes[label], return_inverse=True)[1]
    num_samples = (found > 0).sum(axis=0)[of_cell]
    counts = (num_samples > 1) & (found.sum(axis=0)[of_cell] >= _FEWEST_CELLS)
    return ((lisi[counts] - 1) / (num_samples[counts] - 1)).mean() if counts.any() else np.nan


@measure("mixing of samples within labels (BRAS)", "higher", of="covariate", needs="label", cost=2)
def bras(scored: Scored, covariate: str, label: str) -> float:
    """Cosine distances, which depend on where the origin is: of the embedding as it stands."""
    import scib_metrics

    return scib_metrics.bras(scored.points, scored.codes[label], scored.codes[covariate])


@measure("mixing of samples within labels (kBET)", "higher", of="covariate", needs="label", cost=2)
def kbet(scored: Scored, covariate: str, label: str) -> float:
    import scib_metrics

    graph = as_graph(scored.nearest, KBET_NEIGHBORS)
    return scib_metrics.kbet_per_label(graph, scored.codes[covariate], scored.codes[label])


@measure("variance that samples explain (PCR)", "lower", of="covariate", cost=1)
def pcr(scored: Scored, covariate: str, label: str) -> float:
    from scib_metrics.utils import principal_component_regression

    return principal_component_regression(scored.centred.astype(np.float32), scored.codes[covariate], categorical=True)


@measure("cell cycle kept (scib)", "higher", of="covariate", needs="cell_cycle")
def cell_cycle(scored: Scored, covariate: str, label: str) -> float:
    return scored.known["cell_cycle"].conservation(scored, scored.codes[covariate])


@measure("trajectory kept (scib)", "higher", of="pseudotime", needs="label")
def trajectory(scored: Scored, pseudotime: str, label: str) -> float:
    return scored.known[pseudotime].conservation(scored, label)


@measure("cells of the other half nearer than the partner (FOSCTTM)", "lower", of="pair")
def foscttm(scored: Scored, pair: str, label: str) -> float:
    """Fraction of samples closer than the true match (Liu 2019), both ways; 0.5 where halves lie by chance."""
    one, other = (scored.centred[rows] for rows in scored.halves(pair))
    return (_nearer(one, other) + _nearer(other, one)) / 2


@measure("nearest cell of the other half has the label", "higher", of="pair", needs="label")
def partner_label(scored: Scored, pair: str, label: str) -> float:
    """Share over the cells of both halves."""
    from sklearn.neighbors import NearestNeighbors

    halves, codes = scored.halves(pair), scored.codes[label]
    found = []
    for own, other in (halves, halves[::-1]):
        finder = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(scored.centred[other])
        nearest = finder.kneighbors(scored.centred[own], return_distance=False)[:, 0]
        found.append(codes[other][nearest] == codes[own])
    return np.concatenate(found).mean()


def _nearer(own: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Mean share of the other cells that are nearer to a cell than that of its own row; 1,024 cells at a time."""
    from sklearn.metrics import pairwise_distances

    shares = []
    for start in range(0, len(own), 1024):
        distances = pairwise_distances(own[start : start + 1024], other)
        rows = np.arange(len(distances))
        shares.append((distances < distances[rows, start + rows][:, None]).sum(axis=1) / max(1, len(other) - 1))
    return float(np.concatenate(shares).mean())


def _can_import(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


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


@measure("label silhouette (ASW, 0 to 1)", "higher", of="label", is_published=True)
def asw_label(scored: Scored, covariate: str, label: str) -> float:
    """Mean silhouette width of the labels, rescaled to (s + 1) / 2 (Rousseeuw 1987)."""
    from sklearn.metrics import silhouette_score

    return (silhouette_score(scored.centred, scored.codes[label]) + 1) / 2


@measure("silhouette of samples within labels (ASW)", "higher", of="covariate", needs="label", is_published=True)
def asw_batch(scored: Scored, covariate: str, label: str) -> float:
    import scib_metrics

    points = scored.centred.astype(np.float32)
    return scib_metrics.silhouette_batch(points, scored.codes[label], scored.codes[covariate])


@measure("cells of a label hang together (scib's graph)", "higher", of="label", is_published=True)
def graph_conn(scored: Scored, covariate: str, label: str) -> float:
    from scipy.sparse.csgraph import connected_components

    graph, codes, shares = scib_graph(scored), scored.codes[label], []
    for code in np.unique(codes):
        own = np.flatnonzero(codes == code)
        components = connected_components(graph[own][:, own], connection="strong")[1]
        shares.append(np.bincount(components).max() / len(own))
    return np.mean(shares)


@measure("mixing of samples (scib's graph iLISI)", "higher", of="covariate", is_published=True)
def graph_ilisi(scored: Scored, covariate: str, label: str) -> float:
    return (median_lisi(scored, covariate) - 1) / (len(np.unique(scored.codes[covariate])) - 1)


@measure("separation of labels (scib's graph cLISI)", "higher", of="label", is_published=True)
def graph_clisi(scored: Scored, covariate: str, label: str) -> float:
    num_labels = len(np.unique(scored.codes[label]))
    return (num_labels - median_lisi(scored, label)) / (num_labels - 1)
