"""What is asked of a store stands in its protocol, and nothing else is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import Loader, LoaderConfig, open_store
from loaders.stores import ChainedStore, MatchedStore, Store, cell_totals

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
]

MEMBERS = {*Store.__annotations__, *(name for name in vars(Store) if not name.startswith("_"))}


class Strict:
    """A store that answers what the protocol names."""

    def __init__(self, store: Store) -> None:
        self._held = store

    def __getattr__(self, name: str) -> Any:
        assert name in MEMBERS, f"a store is asked for {name}"
        return getattr(self._held, name)


@pytest.mark.parametrize("kind", ["own", "chained", "matched"])
def test_loader_views_and_embeddings_ask_for_nothing_else(own_store: Path, kind: str) -> None:
    held = Strict(open_store(own_store))
    store: Any = held
    if kind == "chained":
        store = ChainedStore([held, Strict(open_store(own_store))])
    elif kind == "matched":
        store = MatchedStore(held, {"rna": ["rna_3", "rna_1", "none"], "adt": ["adt_2"]})
    for subset in ("train", "validation", "all"):
        with Loader(store, LoaderConfig(minibatch=8, memory="64MiB"), subset=subset, sample="sample") as loader:
            assert sum(minibatch.num_cells for minibatch in loader) == loader.num_cells
            assert len(loader.cell_ids(next(iter(loader)))) > 0
    assert (cell_totals(store, "adt", "clr") >= 0).all()
    values = np.ones((store.schema.num_cells, 2), np.float32)
    store.write_embedding("X_liam", values)
    np.testing.assert_array_equal(store.read_embedding("X_liam", 0, len(values)), values)
    assert list(store.obs_frame()["lane"][:3]) == [0, 1, 2]
    store.close()
