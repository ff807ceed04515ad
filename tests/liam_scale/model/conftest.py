"""Toy minibatches of any modalities, on one thread."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from liam_scale.model import ModelData
from loaders.minibatch import Minibatch, SparseCounts

FEATURES = {"rna": 13, "atac": 21, "adt": 5}
CELLS = 17


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Arrays this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="toy")
def toy_fixture() -> Callable[..., Minibatch]:
    return toy


@pytest.fixture(name="data")
def data_fixture() -> Callable[..., ModelData]:
    return data


@pytest.fixture(name="part")
def part_fixture() -> Callable[[Minibatch, Tensor], Minibatch]:
    return part


def toy(modalities: tuple[str, ...], *, samples: int = 3, dtype: Any = np.float64, seed: int = 0) -> Minibatch:
    """Counts with absent modalities: cell 0 has all, each other modality misses some cells."""
    rng = np.random.default_rng(seed)
    counts = {}
    for k, name in enumerate(modalities):
        values = rng.poisson(1.5, (CELLS, FEATURES[name])).astype(dtype)
        if name == "adt":
            values = np.log1p(values)
        if len(modalities) > 1:
            values[1 + k :: 5] = 0
        counts[name] = SparseCounts.from_scipy(scipy.sparse.csr_matrix(values))
    return Minibatch(
        counts=counts,
        present={name: c.totals() > 0 for name, c in counts.items()},
        sample=torch.from_numpy(rng.integers(0, samples, CELLS)),
        place=torch.arange(CELLS),
        rows=torch.arange(CELLS),
        num_global=CELLS,
    )


def data(modalities: tuple[str, ...], *, samples: int = 3) -> ModelData:
    rng = np.random.default_rng(1)
    return ModelData(
        num_features={name: FEATURES[name] for name in modalities},
        samples=tuple(f"s{k}" for k in range(samples)),
        prior_mean={name: tuple(rng.normal(2, 0.3, samples)) for name in modalities},
        prior_variance={name: tuple(rng.uniform(0.1, 0.5, samples)) for name in modalities},
    )


def part(cells: Minibatch, rows: Tensor) -> Minibatch:
    """Some cells of a minibatch, as another rank holds them."""
    counts = {
        name: SparseCounts.from_scipy(scipy.sparse.csr_matrix(c.to_dense().numpy()[rows.numpy()]))
        for name, c in cells.counts.items()
    }
    return replace(
        cells,
        counts=counts,
        present={name: p[rows] for name, p in cells.present.items()},
        sample=cells.sample[rows],
        place=cells.place[rows],
        rows=cells.rows[rows],
    )
