"""The scIB measures of the scib-metrics package (Luecken et al. 2022), where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from liam_scale.evaluation.metrics import Codes, Measure, nearest

QUICK = (
    Measure("scib_ilisi", "scIB iLISI (mixing of samples)", "higher"),
    Measure("scib_clisi", "scIB cLISI (separation of labels)", "higher"),
    Measure("scib_graph_connectivity", "scIB graph connectivity", "higher"),
    Measure("scib_isolated_labels", "scIB isolated labels", "higher"),
)
"""About ten seconds, most of it importing JAX and compiling."""

SLOW = (
    Measure("scib_kbet", "scIB kBET (mixing of samples, per label)", "higher"),
    Measure("scib_silhouette_batch", "scIB silhouette of samples", "higher"),
    Measure("scib_bras", "scIB BRAS (silhouette of samples, revised)", "higher"),
)
"""Half a minute for 1,600 cells, minutes for 20,000."""

_LISI_NEIGHBORS, _KBET_NEIGHBORS, _GRAPH_NEIGHBORS = 90, 50, 15


def is_installed() -> bool:
    return importlib.util.find_spec("scib_metrics") is not None


def scib_scores(
    embedding: npt.NDArray[np.floating], *, samples: Codes, labels: Codes, with_slow: bool = False
) -> dict[str, float]:
    """scIB measures by key, from exact neighbours: 90 for LISI, 50 for kBET, 15 for the graph, as scib-metrics does.

    Parameters
    ----------
    embedding
        (n, d).
    samples, labels
        (n,) codes, none negative.
    with_slow
        Also those of `SLOW`.

    Raises
    ------
    RuntimeError
        scib-metrics is not installed.
    """
    if not is_installed():
        raise RuntimeError("scib: scib-metrics is not installed; pip install 'liam-scale[evaluate]'")
    with _quietly():
        return _compute(np.asarray(embedding, np.float32), samples, labels, with_slow)


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


def _compute(points: npt.NDArray[np.float32], samples: Codes, labels: Codes, with_slow: bool) -> dict[str, float]:
    import scib_metrics

    graph = _neighbors(points)

    def near(count: int) -> Any:
        return graph.subset_neighbors(min(count, graph.n_neighbors))

    jobs: dict[str, Callable[[], float]] = {
        "scib_ilisi": lambda: scib_metrics.ilisi_knn(graph, samples),
        "scib_clisi": lambda: scib_metrics.clisi_knn(graph, labels),
        "scib_graph_connectivity": lambda: scib_metrics.graph_connectivity(near(_GRAPH_NEIGHBORS), labels),
        "scib_isolated_labels": lambda: scib_metrics.isolated_labels(points, labels, samples),
    }
    if with_slow:
        jobs["scib_kbet"] = lambda: scib_metrics.kbet_per_label(near(_KBET_NEIGHBORS), samples, labels)
        jobs["scib_silhouette_batch"] = lambda: scib_metrics.silhouette_batch(points, labels, samples)
        jobs["scib_bras"] = lambda: scib_metrics.bras(points, labels, samples)
    return {key: float(job()) for key, job in jobs.items()}


def _neighbors(points: npt.NDArray[np.float32]) -> Any:
    """Exact neighbours in scib-metrics' form: the cell itself first."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    indices, distances = nearest(points, k=min(_LISI_NEIGHBORS, len(points)) - 1)
    own = np.arange(len(points))[:, None]
    return NeighborsResults(
        indices=np.concatenate([own, indices], axis=1).astype(np.int32),
        distances=np.concatenate([np.zeros((len(points), 1)), distances], axis=1).astype(np.float32),
    )
