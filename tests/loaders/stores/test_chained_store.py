"""Several stores are one data set: cells follow each other, features are matched by name, obs columns united."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import anndata
import mudata
import numpy as np
import pytest
import zarr

from loaders.stores import ChainedStore, open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


def cells_between(toy: ModuleType, modality: str, start: int, stop: int) -> np.ndarray:
    cells = toy.cells_of(modality)
    return cells[(cells >= start) & (cells < stop)]


@pytest.fixture
def three(tmp_path: Path, toy: ModuleType) -> list[Path]:
    """The toy cells over three stores: a MuData with RNA and ATAC, an AnnData of RNA, a MuData of everything."""
    toy.write_mudata(
        tmp_path / "a.zarr",
        toy.make_mudata(rna=cells_between(toy, "rna", 0, 20), atac=cells_between(toy, "atac", 0, 20)),
        3,
    )
    toy.make_anndata("rna", np.arange(20, 27)).write_zarr(tmp_path / "b.zarr")
    last = {name: cells_between(toy, name, 27, 50) for name in toy.FEATURES}
    toy.write_mudata(tmp_path / "c.zarr", toy.make_mudata(**last), 2)
    return [tmp_path / f"{name}.zarr" for name in "abc"]


def test_cells_follow_each_other(three: list[Path], toy: ModuleType) -> None:
    store = open_store(three)
    assert store.schema.num_cells == toy.NUM_CELLS
    assert list(store.cell_ids(15, 30)) == [f"cell{c}" for c in range(15, 30)]
    have = {
        "rna": np.arange(50),
        "atac": np.concatenate([cells_between(toy, "atac", 0, 20), cells_between(toy, "atac", 27, 50)]),
        "adt": cells_between(toy, "adt", 27, 50),
    }
    for modality, cells in have.items():
        toy.check_counts(store, modality, cells)
    toy.check_obs(store)
    assert store.modality_rows("rna") is None
    assert not store.schema.is_shuffled
    assert list(store.obs_frame().index) == [f"cell{c}" for c in range(50)]
    assert store.matrix("adt").read(0, 0).num_rows == 0


def test_features_are_matched_by_name_in_the_order_of_the_first(tmp_path: Path, toy: ModuleType) -> None:
    first = toy.make_anndata("rna", np.arange(20))[:, [9, 3, 4, 27, 0, 12]].copy()
    second = toy.make_anndata("rna", np.arange(20, 50))[:, [0, 1, 27, 9, 8, 12, 4]].copy()
    first.write_zarr(tmp_path / "a.zarr")
    second.X = second.X.astype(np.int32)
    second.write_zarr(tmp_path / "b.zarr")
    store = open_store([tmp_path / "a.zarr", tmp_path / "b.zarr"])
    shared = [9, 4, 27, 0, 12]
    assert list(store.feature_names("rna")) == [f"rna_{f}" for f in shared]
    expected = toy.counts_of("rna", np.arange(50))[:, shared]
    rows = store.matrix("rna").read(0, 50)
    assert rows.values.dtype == np.float32
    assert rows.indices.dtype == np.int32
    np.testing.assert_array_equal(rows.to_scipy().toarray(), expected)
    np.testing.assert_array_equal(store.matrix("rna").read(17, 23).to_scipy().toarray(), expected[17:23])
    np.testing.assert_array_equal(store.totals("rna"), expected.sum(1))
    np.testing.assert_array_equal(store.matrix("rna").lengths(), (expected != 0).sum(1))


def test_stores_without_a_common_feature_are_refused(tmp_path: Path, toy: ModuleType) -> None:
    cells = np.arange(10)
    toy.make_anndata("rna", cells).write_zarr(tmp_path / "a.zarr")
    other = toy.make_anndata("rna", cells)
    other.var_names = [f"ENSG{f}" for f in range(30)]
    other.write_zarr(tmp_path / "b.zarr")
    with pytest.raises(ValueError, match=r"no feature of .*b.zarr \(for example 'ENSG0'\).*'rna_0'.*bring the names"):
        open_store([tmp_path / "a.zarr", tmp_path / "b.zarr"])
    other.var_names = ["rna_0", *["same"] * 29]
    other.write_zarr(tmp_path / "c.zarr")
    with pytest.raises(ValueError, match=r"c.zarr: feature names of rna: got 'same' more than once \(28"):
        open_store([tmp_path / "a.zarr", tmp_path / "c.zarr"])
    with pytest.raises(ValueError, match="stores: got none"):
        open_store([])


def test_obs_columns_are_united(tmp_path: Path, toy: ModuleType) -> None:
    first, second = toy.make_anndata("rna", np.arange(20)), toy.make_anndata("rna", np.arange(20, 50))
    first.obs["batch"] = [f"x{c % 2}" for c in range(20)]
    first.obs["site"] = "here"
    second.obs["site"] = "there"
    first.write_zarr(tmp_path / "a.zarr")
    second.write_zarr(tmp_path / "b.zarr")
    store = open_store([tmp_path / "a.zarr", tmp_path / "b.zarr"])
    batch = store.obs_column("batch")
    assert [batch.categories[c] if c >= 0 else None for c in batch.codes] == [
        f"x{c % 2}" if c < 20 else None for c in range(50)
    ]
    assert store.obs_column("site").categories == ("here", "there")
    assert list(store.obs_column("site").codes) == [0] * 20 + [1] * 30
    with pytest.raises(ValueError, match=r"obs column: got 'sex', which no store"):
        store.obs_column("sex")


def test_embedding_goes_to_each_store(three: list[Path], toy: ModuleType) -> None:
    store = open_store(three)
    values = np.arange(100, dtype=np.float32).reshape(50, 2)
    store.write_embedding("X_liam", values)
    np.testing.assert_array_equal(open_store(three).read_embedding("X_liam", 0, 50), values)
    np.testing.assert_array_equal(store.read_embedding("X_liam", 18, 29), values[18:29])
    np.testing.assert_array_equal(mudata.read_zarr(three[2]).obsm["X_liam"], values[27:])
    with pytest.raises(ValueError, match=r"values of shape \(20, 2\) for .* of 50"):
        store.write_embedding("X_liam", values[:20])


def test_zarr_and_soma_stores_in_one_chain(tmp_path: Path, toy: ModuleType, write_soma: Callable) -> None:
    write_soma(tmp_path / "a", toy.make_anndata("rna", np.arange(20)))
    toy.make_anndata("rna", np.arange(20, 50)).write_zarr(tmp_path / "b.zarr")
    store = open_store([tmp_path / "a", tmp_path / "b.zarr"])
    toy.check_counts(store, "rna")
    toy.check_obs(store)


def test_annbatch_collection_opens_as_a_chain(tmp_path: Path, toy: ModuleType) -> None:
    """The layout that annbatch 0.3 writes: sharded AnnData side by side, metadata consolidated at the root."""
    root = zarr.open_group(tmp_path / "collection.zarr", mode="w", zarr_format=3)
    narrow = "write_csr_csc_indices_with_min_possible_dtype"  # not every anndata that is allowed has it
    with anndata.settings.override(**({narrow: True} if hasattr(anndata.settings, narrow) else {})):
        for i, cells in enumerate((np.arange(20), np.arange(20, 31), np.arange(31, 50))):
            anndata.io.write_elem(root, f"dataset_{i}", toy.make_anndata("rna", cells))
    with pytest.raises(ValueError, match=r"got a group that holds dataset_0"):
        open_store(tmp_path / "collection.zarr")
    root.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    zarr.consolidate_metadata(root.store)
    store = open_store(tmp_path / "collection.zarr")
    assert isinstance(store, ChainedStore)
    assert store.schema.is_shuffled
    toy.check_counts(store, "rna")
    toy.check_obs(store)
    values = np.arange(50, dtype=np.float32)[:, None]
    store.write_embedding("X_liam", values)
    np.testing.assert_array_equal(
        zarr.open_group(tmp_path / "collection.zarr", mode="r")["dataset_1/obsm/X_liam"][:], values[20:31]
    )
    check = anndata.read_zarr(tmp_path / "collection.zarr" / "dataset_2")
    np.testing.assert_array_equal(check.obsm["X_liam"], values[31:])
