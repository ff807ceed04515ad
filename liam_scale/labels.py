"""Labels for new cells from their neighbours in the embedding of a trained model, with uncertainty.

As scArches does (Lotfollahi et al., Nature Biotechnology 2022): the probability of a label is its share of the weights
of the nearest labelled cells, which fall with the distance as a normal density does.

Shapes: B new cells, R reference cells, K neighbours, C labels, L latent dimensions.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from liam_scale.evaluation.cells import draw_rows, read_embedding
from liam_scale.finding import stores_of
from liam_scale.posterior import check_embedded, single
from liam_scale.run import RunDirectory
from loaders.stores import ObsColumn, Store

MOST_REFERENCE_CELLS = 100_000
"""Labelled cells that are searched; of more, so many are drawn in proportion to the labels."""

DISTANCE_BYTES = 64 * 2**20
"""Memory of the distances of the new cells that are looked at together."""

CELLS_PER_CHUNK = 16_384

UNKNOWN = "unknown"


def check_labelled(
    directory: RunDirectory, *, label_key: str, key: str, reference: Store | None = None
) -> tuple[Store, ObsColumn]:
    """The reference and its labels; refuses one without this run's embedding or without the labels.

    Without a reference that is given it is the store of the training.
    """
    record, stores = single(directory, "label by"), () if reference is None else (reference.uri,)
    reference = reference or stores_of(directory)
    check_embedded(directory, record.model.n_latent or 0, reference, key=key, stores=stores)
    try:
        return reference, reference.obs_column(label_key)
    except ValueError as error:
        raise ValueError(f"--label-key: {error}") from None


def transfer_labels(
    directory: RunDirectory,
    store: Store,
    *,
    label_key: str,
    key: str,
    neighbors: int,
    unknown: float,
    seed: int = 0,
    reference: Store | None = None,
) -> pd.DataFrame:
    """Label the cells of a store as their neighbours among the labelled cells of a run's training.

    Parameters
    ----------
    directory
        The run whose embedding stands in both stores.
    store
        The new cells; their embedding stands in obsm[key].
    label_key
        Obs column of the reference.
    unknown
        A label less probable than 1 - unknown is "unknown".
    reference
        The labelled cells, in the place of the store of the training.

    Returns
    -------
    DataFrame indexed by cell id: `label`; `nearest_label`, the most probable one, also where it is unknown;
    `uncertainty`, one minus its probability; `distance`, mean distance to the neighbours, in units of the median
    distance of labelled cells to theirs.

    Raises
    ------
    ValueError
        There is no such column or embedding, or no cell with a label.
    """
    reference, column = check_labelled(directory, label_key=label_key, key=key, reference=reference)
    is_shuffled = reference.schema.is_shuffled
    rows = draw_rows(np.asarray(column.codes), max_cells=MOST_REFERENCE_CELLS, seed=seed, by_blocks=is_shuffled)
    if len(rows) <= neighbors:
        raise ValueError(
            f"--label-key: got {label_key}, which {len(rows):,} cells of {reference.uri} have; a label needs more than "
            f"{neighbors} labelled cells (--neighbors)"
        )
    known = torch.from_numpy(read_embedding(reference, key, rows))
    codes = torch.from_numpy(column.codes[rows].astype(np.int64))
    some = known[torch.linspace(0, len(known) - 1, min(len(known), 1_000)).long()]
    usual = float(_nearest(some, known, neighbors + 1)[0][:, 1:].mean(dim=1).median().clamp(min=1e-12))
    parts, names = [], np.array([*column.categories, UNKNOWN], dtype=object)
    for start in range(0, store.schema.num_cells, CELLS_PER_CHUNK):
        cells = np.arange(start, min(store.schema.num_cells, start + CELLS_PER_CHUNK))
        own = torch.from_numpy(read_embedding(store, key, cells))
        distances, places = _nearest(own, known, neighbors)
        probability, label = _weighted(distances, codes[places], len(column.categories)).max(dim=1)
        uncertainty = (1.0 - probability).clamp(min=0.0).numpy()
        frame = {
            "label": names[np.where(uncertainty > unknown, len(names) - 1, label.numpy())],
            "nearest_label": names[label.numpy()],
            "uncertainty": uncertainty,
            "distance": distances.mean(dim=1).numpy() / usual,
        }
        parts.append(pd.DataFrame(frame, index=pd.Index(store.cell_ids(start, start + len(cells)), name="cell")))
    return pd.concat(parts)


def _nearest(cells_BL: Tensor, known_RL: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """(B, K) distances and places of the nearest reference cells, exactly."""
    step = max(1, DISTANCE_BYTES // (4 * len(known_RL)))
    found = [torch.cdist(part, known_RL).topk(neighbors, dim=1, largest=False) for part in cells_BL.split(step)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _weighted(distances_BK: Tensor, codes_BK: Tensor, num_labels: int) -> Tensor:
    """(B, C) share of the weights: a normal density whose deviation is half the root mean square distance."""
    square = distances_BK.double().square()
    scale = square.mean(dim=1, keepdim=True).clamp(min=1e-24)
    weights = torch.softmax(-2.0 * square / scale, dim=1)
    return torch.zeros(len(weights), num_labels, dtype=weights.dtype).scatter_add_(1, codes_BK, weights)
