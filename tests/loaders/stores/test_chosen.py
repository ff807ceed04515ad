"""Some cells and features of a store: each count, label and id is that of its cell, and nothing is copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.stores import MatchedStore, choose, open_store
from loaders.stores.base import cell_totals

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


def test_every_cell_chosen_has_its_own_counts_labels_and_id(toy, own_store: Path) -> None:
    whole = open_store(own_store)
    store = choose(whole, where="sample == 'donor1' and lane != 2")
    cells = np.array([c for c in range(toy.NUM_CELLS) if c % 4 == 1 and c % 3 != 2])
    assert store.cell_ids(0, len(cells)).tolist() == [f"cell{c}" for c in cells]
    assert store.cell_ids(2, 4).tolist() == [f"cell{c}" for c in cells[2:4]]
    column = store.obs_column("sample")
    assert column.categories == ("donor1",)
    assert not column.codes.any()
    lane = store.obs_column("lane")
    assert lane.categories == ("0", "1")
    assert [int(lane.categories[code]) for code in lane.codes] == (cells % 3).tolist()
    frame = store.obs_frame()
    assert frame["score"].tolist() == (cells / 7).tolist()
    assert list(frame["type"].cat.categories) == sorted({f"type{c % 3}" for c in cells if c % 5})
    for name in ("rna", "atac", "adt"):
        own = cells[np.isin(cells, toy.cells_of(name))]
        rows, counts = store.modality_rows(name), toy.counts_of(name, own)
        held = store.schema.modalities[name]
        assert (held.num_cells, held.num_nonzeros) == (len(own), (counts != 0).sum())
        read = [store.matrix(name).read(int(row), int(row) + 1).to_scipy().toarray()[0] for row in rows[rows >= 0]]
        np.testing.assert_array_equal(np.array(read), counts)
        np.testing.assert_array_equal(cell_totals(store, name)[rows[rows >= 0]], counts.sum(1))
        assert cell_totals(store, name, "clr").shape == (store.matrix(name).num_rows,)


def test_features_stand_in_the_order_of_the_store_and_modalities_without_any_stay_whole(toy, own_store: Path) -> None:
    whole = open_store(own_store)
    store = choose(whole, features=["rna_7", "rna_3", "nothing"])
    assert store.feature_names("rna").tolist() == ["rna_3", "rna_7"]
    expected = toy.counts_of("rna", toy.cells_of("rna"))[:, [3, 7]]
    np.testing.assert_array_equal(store.matrix("rna").read(0, len(expected)).to_scipy().toarray(), expected)
    np.testing.assert_array_equal(store.totals("rna"), expected.sum(1))
    assert store.matrix("atac") is whole.matrix("atac"), "what is whole is read as fast as before"
    told, held = store.schema.modalities["rna"].num_nonzeros, (expected != 0).sum()
    assert held <= told <= 1.2 * held


def test_minibatches_hold_every_cell_chosen_once_an_epoch(toy, own_store: Path) -> None:
    store = choose(open_store(own_store), where="good", features=["atac_5", "chr1:500-599"])
    seen, config = [], LoaderConfig(minibatch=8, streams=2, memory="16MiB")
    with Loader(store, config, subset="all", sample="sample", modalities=("rna", "atac")) as loader:
        for minibatch in loader:
            ids = store.cell_ids(0, store.schema.num_cells)[minibatch.rows.numpy()]
            cells = np.array([int(name[4:]) for name in ids])
            seen += cells.tolist()
            dense = minibatch.counts["rna"].to_dense().numpy()
            np.testing.assert_array_equal(dense, toy.counts_of("rna", cells))
    assert sorted(seen) == list(range(0, toy.NUM_CELLS, 2))


@pytest.mark.parametrize("names", [["own.zarr"], ["own.zarr", "own.zarr"]])
def test_several_stores_are_chosen_from_as_one(toy, own_store: Path, names: list[str]) -> None:
    chained = open_store([own_store.with_name(name) for name in names])
    assert choose(chained, where="lane == 1").schema.num_cells == len(names) * len(range(1, toy.NUM_CELLS, 3))


def test_an_embedding_of_some_cells_says_which_and_leaves_the_others_without(toy, own_store: Path) -> None:
    whole = open_store(own_store)
    store = choose(whole, where="lane == 1")
    values = np.arange(2 * store.schema.num_cells, dtype=np.float32).reshape(-1, 2)
    store.write_embedding("X_part", values, {"by": "me"})
    np.testing.assert_array_equal(store.read_embedding("X_part", 3, 9), values[3:9])
    held = whole.read_embedding("X_part", 0, toy.NUM_CELLS)
    np.testing.assert_array_equal(held[1::3], values)
    assert np.isnan(held[0::3]).all()
    assert whole.embedding_attributes("X_part")[0]["liam_scale_where"] == "lane == 1"
    assert "liam_scale_where" not in store.embedding_attributes("X_part")[0]


def test_peaks_seen_by_overlap_are_added_up_in_a_type_that_holds_the_sum(toy, own_store: Path) -> None:
    """Peak f of the toy is chr1:[100 f, 100 f + 99)."""
    asked = ["chr1:500-560", "chr1:0-450", "chr2:0-9"]
    store = MatchedStore(open_store(own_store), {"atac": asked}, by_overlap=True)
    whole = toy.counts_of("atac", toy.cells_of("atac"))
    expected = np.stack([whole[:, 5], whole[:, :5].sum(1), np.zeros(len(whole))], axis=1)
    np.testing.assert_array_equal(store.matrix("atac").read(0, len(whole)).to_scipy().toarray(), expected)
    assert store.matrix("atac").value_dtype == np.uint32
    np.testing.assert_array_equal(store.totals("atac"), expected.sum(1))
    with Loader(store, LoaderConfig(minibatch=8, streams=2, memory="16MiB"), subset="all") as loader:
        for minibatch in loader:
            cells = np.array([int(name[4:]) for name in store.cell_ids(0, toy.NUM_CELLS)[minibatch.rows.numpy()]])
            has = np.isin(cells, toy.cells_of("atac"))
            counts = toy.counts_of("atac", cells)[:, :6] * has[:, None]
            dense = minibatch.counts["atac"].to_dense().numpy()
            np.testing.assert_array_equal(dense[:, :2], np.stack([counts[:, 5], counts[:, :5].sum(1)], axis=1))
    with pytest.raises(ValueError, match=r"atac of .* has no feature in common with the 1 asked for"):
        MatchedStore(open_store(own_store), {"atac": ["chr7:1-2"]}, by_overlap=True)
