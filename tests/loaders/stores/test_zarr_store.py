"""Stores of our layout and of others, on disk and remote, give the same cells; damage is named."""

from __future__ import annotations

import itertools
import logging
import threading
from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr

from loaders.ecosystem import quiet_anndata
from loaders.schema import SCHEMA_KEY
from loaders.stores import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


def test_own_store_gives_every_count_and_column(own_store: Path, toy: ModuleType) -> None:
    store = open_store(own_store)
    assert store.schema.is_shuffled
    for modality in toy.FEATURES:
        toy.check_counts(store, modality)
        assert store.matrix(modality).read(0, 5).values.dtype == np.uint16
    toy.check_obs(store)
    assert store.modality_rows("rna") is None
    assert store.obs_column("sample").categories == ("donor3", "donor2", "donor1", "donor0")
    pd.testing.assert_frame_equal(store.obs_frame(), toy.obs_frame(np.arange(toy.NUM_CELLS)), check_names=False)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_mudata_of_others_streams_as_a_mosaic(
    tmp_path: Path, zarr_format: int, caplog: pytest.LogCaptureFixture, toy: ModuleType
) -> None:
    toy.write_mudata(
        tmp_path / "a.zarr", toy.make_mudata(**{name: toy.cells_of(name) for name in toy.FEATURES}), zarr_format
    )
    with caplog.at_level(logging.INFO):
        store = open_store(tmp_path / "a.zarr")
    assert "was not made by" in caplog.text
    assert not store.schema.is_shuffled
    assert tuple(store.schema.modalities) == ("rna", "atac", "adt")
    for modality in toy.FEATURES:
        toy.check_counts(store, modality)
    toy.check_obs(store)
    assert set(store.schema.obs_columns) == set(toy.obs_frame(np.arange(2)).columns)


def test_modality_in_another_order_than_the_cells_is_put_right(tmp_path: Path, toy: ModuleType) -> None:
    cells = np.random.default_rng(3).permutation(toy.cells_of("atac"))
    toy.write_mudata(tmp_path / "a.zarr", toy.make_mudata(rna=toy.cells_of("rna"), atac=cells), 3)
    store = open_store(tmp_path / "a.zarr")
    toy.check_counts(store, "atac", cells)
    toy.check_obs(store)


def test_column_that_only_one_modality_has_is_missing_elsewhere(tmp_path: Path, toy: ModuleType) -> None:
    data = toy.make_mudata(rna=toy.cells_of("rna"), adt=toy.cells_of("adt"))
    data.mod["adt"].obs["well"] = [f"well{c % 2}" for c in toy.cells_of("adt")]
    toy.write_mudata(tmp_path / "a.zarr", data, 3)
    column = open_store(tmp_path / "a.zarr").obs_column("well")
    assert [column.categories[c] if c >= 0 else None for c in column.codes] == [
        f"well{c % 2}" if c >= 25 else None for c in range(toy.NUM_CELLS)
    ]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_anndata_is_named_by_option_or_by_its_features(tmp_path: Path, zarr_format: int, toy: ModuleType) -> None:
    cells = np.arange(toy.NUM_CELLS)
    for name in ("rna", "atac", "adt"):
        with quiet_anndata(zarr_format):
            toy.make_anndata(name, cells).write_zarr(tmp_path / f"{name}.zarr")
    toy.check_counts(open_store(tmp_path / "rna.zarr"), "rna")
    toy.check_counts(open_store(tmp_path / "atac.zarr"), "atac", cells)
    toy.check_counts(open_store(tmp_path / "adt.zarr", modality="prot"), "adt", cells)
    with pytest.raises(ValueError, match="modality: got 'lipids'; give one of rna, atac, adt"):
        open_store(tmp_path / "adt.zarr", modality="lipids")


def test_anndata_is_split_by_feature_types(tmp_path: Path, toy: ModuleType) -> None:
    cells = np.arange(toy.NUM_CELLS)
    parts = {name: toy.counts_of(name, cells) for name in ("rna", "adt")}
    other = np.ones((toy.NUM_CELLS, 2), np.float32)
    mixed = np.concatenate([parts["adt"][:, :3], parts["rna"], other, parts["adt"][:, 3:]], axis=1)
    kinds = ["Antibody Capture"] * 3 + ["Gene Expression"] * 30 + ["CRISPR"] * 2 + ["Antibody Capture"] * 4
    names = [*toy.names_of("adt")[:3], *toy.names_of("rna"), "guide0", "guide1", *toy.names_of("adt")[3:]]
    var = pd.DataFrame({"feature_types": pd.Categorical(kinds)}, index=names)
    anndata.AnnData(scipy.sparse.csr_matrix(mixed), obs=toy.obs_frame(cells), var=var).write_zarr(tmp_path / "a.zarr")
    store = open_store(tmp_path / "a.zarr")
    assert tuple(store.schema.modalities) == ("rna", "adt")
    for name in parts:
        toy.check_counts(store, name, cells)
    toy.check_obs(store)


def test_layer_dense_matrix_and_unsorted_columns(tmp_path: Path, toy: ModuleType) -> None:
    cells = np.arange(toy.NUM_CELLS)
    data = toy.make_anndata("rna", cells)
    reversed_rows = data.X.copy()
    for a, b in itertools.pairwise(reversed_rows.indptr):
        reversed_rows.indices[a:b] = reversed_rows.indices[a:b][::-1]
        reversed_rows.data[a:b] = reversed_rows.data[a:b][::-1]
    reversed_rows.has_sorted_indices = False
    data.layers["counts"] = reversed_rows
    data.layers["dense"] = toy.counts_of("rna", cells).astype(np.int64)
    data.layers["columns"] = data.X.tocsc()
    data.X = data.X * 0.5
    data.write_zarr(tmp_path / "a.zarr")
    toy.check_counts(open_store(tmp_path / "a.zarr", layer="counts"), "rna")
    dense = open_store(tmp_path / "a.zarr", layer="dense")
    toy.check_counts(dense, "rna")
    assert dense.schema.modalities["rna"].value_dtype == "uint32"
    with pytest.raises(ValueError, match=r"layers/columns: got a matrix compressed by column .*tocsr"):
        open_store(tmp_path / "a.zarr", layer="columns")
    with pytest.raises(ValueError, match=r"no layer 'spliced'; it has X, columns, counts, dense: name one"):
        open_store(tmp_path / "a.zarr", layer="spliced")


def test_methods_are_safe_from_several_threads(own_store: Path, toy: ModuleType) -> None:
    store = open_store(own_store)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for modality in toy.FEATURES:
                toy.check_counts(store, modality)
            toy.check_obs(store)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_flipped_bit_names_array_and_rows(own_store: Path) -> None:
    shard = own_store / "mod/rna/X/indices/c/0"
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(bytes(content))
    store = open_store(own_store)
    with pytest.raises(
        RuntimeError,
        match=r"X/indices: got damaged data: chunk 0 \(the cells 0 to 6\): its checksum.*; a check of the store",
    ):
        store.matrix("rna").read(0, 3)


def test_deleted_chunk_is_an_error_not_zeros(own_store: Path, toy: ModuleType) -> None:
    (own_store / "mod/rna/X/data/c/1").unlink()
    store = open_store(own_store)
    store.matrix("rna").read(0, 3)
    with pytest.raises(RuntimeError, match=r"mod/rna/X/data: got damaged data: chunk 4 .*its file 1 cannot be opened"):
        store.matrix("rna").read(0, toy.NUM_CELLS)


def test_unknown_names_are_refused_with_the_known_ones(own_store: Path) -> None:
    store = open_store(own_store)
    with pytest.raises(ValueError, match=r"obs column: got 'batch'.*sample, lane"):
        store.obs_column("batch")
    with pytest.raises(ValueError, match=r"obs\['score'\] of .*own.zarr: got values of type float64"):
        store.obs_column("score")
    with pytest.raises(ValueError, match=r"modality: got 'vdj'.*rna, atac, adt"):
        store.totals("vdj")
    with pytest.raises(ValueError, match="got rows 48:51"):
        store.matrix("rna").read(48, 51)
    with pytest.raises(ValueError, match=r"got modality='rna' for .*own.zarr, whose modalities and counts are fixed"):
        open_store(own_store, modality="rna")


def test_layout_of_a_newer_version_is_refused(own_store: Path) -> None:
    root = zarr.open_group(own_store, mode="r+")
    root.attrs[SCHEMA_KEY] = {**root.attrs[SCHEMA_KEY], "format": 99}
    with pytest.raises(ValueError, match="got 99"):
        open_store(own_store)
