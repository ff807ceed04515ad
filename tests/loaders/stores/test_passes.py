"""A pass over a modality gives every row once, in bounded pieces that respect the store's tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.sparse

from loaders.stores import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


@pytest.mark.parametrize("modality", ["rna", "atac", "adt"])
def test_pieces_of_a_zarr_store(own_store: Path, toy: ModuleType, modality: str) -> None:
    store = open_store(own_store)
    pieces = list(store.matrix(modality).in_order(memory=1000))
    assert len(pieces) >= 3
    starts, rows = zip(*pieces, strict=True)
    assert list(starts) == [0, *np.cumsum([part.num_rows for part in rows])[:-1]]
    stacked = scipy.sparse.vstack([part.to_scipy() for part in rows])
    np.testing.assert_array_equal(stacked.toarray(), toy.counts_of(modality, toy.cells_of(modality)))


def test_pieces_of_an_experiment_are_whole_tiles(tmp_path: Path, toy: ModuleType, write_soma: Callable) -> None:
    counts = scipy.sparse.random(5000, 30, density=0.1, format="csr", random_state=0, dtype=np.float32)
    data = toy.anndata.AnnData(counts)
    write_soma(tmp_path / "exp", data)
    store = open_store(tmp_path / "exp")
    pieces = list(store.matrix("rna").in_order(memory=1000))
    assert [start for start, _ in pieces] == [0, 2048, 4096]
    assert (scipy.sparse.vstack([rows.to_scipy() for _, rows in pieces]) != counts).nnz == 0
