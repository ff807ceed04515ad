"""A small model and its minibatches."""

from dataclasses import replace

import scipy.sparse
import torch

from liam_scale.model import Liam, ModelConfig, ModelData
from loaders.minibatch import Minibatch, SparseCounts

FEATURES = {"rna": 60, "atac": 150, "adt": 7}


def minibatch(num_cells: int, modalities: tuple[str, ...], *, transpose: bool, density: float = 0.2) -> Minibatch:
    counts = {}
    for seed, name in enumerate(modalities):
        matrix = scipy.sparse.random(num_cells, FEATURES[name], density, random_state=seed, format="csr")
        matrix.data = (matrix.data * 5 + 1).round()
        counts[name] = SparseCounts.from_scipy(matrix, transpose=transpose)
        counts[name] = counts[name].map_tensors(lambda t: t.float() if t.is_floating_point() else t)
    places = torch.arange(num_cells)
    present = {name: c.totals() > 0 for name, c in counts.items()}
    return Minibatch(counts, present, places % 3, places, places, num_cells)


def make_model(modalities: tuple[str, ...], **options: object) -> Liam:
    data = ModelData(
        num_features={name: FEATURES[name] for name in modalities},
        samples=("a", "b", "c"),
        prior_mean=dict.fromkeys(modalities, (3.0,) * 3),
        prior_variance=dict.fromkeys(modalities, (0.3,) * 3),
    )
    return Liam(ModelConfig(modalities=modalities, n_hidden=16, n_latent=4, **options), data)


def as_stored(cells: Minibatch, dtype: torch.dtype) -> Minibatch:
    counts = {name: replace(c, values=c.values.to(dtype)) for name, c in cells.counts.items()}
    return replace(cells, counts=counts)
