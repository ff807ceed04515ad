"""Stores of our layout and of others, on disk and remote, give the same cells; damage is named."""

from __future__ import annotations

import itertools
import logging
import threading
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from loaders.schema import SCHEMA_KEY, ModalitySchema, Schema, sha256_of_names
from loaders.stores import ZarrStore, open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]

NUM_CELLS = 50
FEATURES = {"rna": 30, "atac": 70, "adt": 7}


def counts_of(modality: str, cells: np.ndarray) -> np.ndarray:
    """(cells, F) counts, of which every non-zero value is cell * F + feature + 1: it names where it belongs."""
    width = FEATURES[modality]
    value = cells[:, None] * width + np.arange(width)[None, :] + 1
    return np.where((value * 7 + cells[:, None]) % 3 == 0, value, 0).astype(np.float32)


def cells_of(modality: str) -> np.ndarray:
    """The cells that have a modality: RNA all, ATAC two in three, ADT the second half."""
    cells = np.arange(NUM_CELLS)
    return {"rna": cells, "atac": cells[cells % 3 != 1], "adt": cells[cells >= 25]}[modality]


def obs_frame(cells: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sample": pd.Categorical(
                [f"donor{c % 4}" for c in cells], categories=["donor3", "donor2", "donor1", "donor0"]
            ),
            "lane": [int(c) % 3 for c in cells],
            "good": [c % 2 == 0 for c in cells],
            "type": pd.Categorical([None if c % 5 == 0 else f"type{c % 3}" for c in cells]),
            "score": cells / 7,
        },
        index=[f"cell{c}" for c in cells],
    )


def names_of(modality: str) -> list[str]:
    if modality == "atac":
        return [f"chr1:{100 * f}-{100 * f + 99}" for f in range(FEATURES[modality])]
    return [f"{modality}_{f}" for f in range(FEATURES[modality])]


def make_anndata(modality: str, cells: np.ndarray) -> anndata.AnnData:
    matrix = scipy.sparse.csr_matrix(counts_of(modality, cells))
    return anndata.AnnData(matrix, obs=obs_frame(cells), var=pd.DataFrame(index=names_of(modality)))


def make_mudata(**cells: np.ndarray) -> mudata.MuData:
    with mudata.set_options(pull_on_update=False):
        return mudata.MuData({name: make_anndata(name, which) for name, which in cells.items()})


def write_mudata(path: Path, data: mudata.MuData, zarr_format: int) -> None:
    with mudata.set_options(pull_on_update=False), anndata.settings.override(zarr_write_format=zarr_format):
        mudata.write_zarr(path, data)


def write_own_store(path: Path, modalities: tuple[str, ...] = ("rna", "atac", "adt")) -> None:
    """A small store in this package's layout, written with nothing but mudata and zarr-python."""
    write_mudata(path, make_mudata(**{name: cells_of(name) for name in modalities}), 3)
    root = zarr.open_group(path, mode="r+", zarr_format=3)
    del root["obs"]
    anndata.io.write_elem(root, "obs", obs_frame(np.arange(NUM_CELLS)))
    entries = {}
    for name in modalities:
        matrix = scipy.sparse.csr_matrix(counts_of(name, cells_of(name)))
        group = root["mod"][name]
        group["obs"].attrs["column-order"] = ["total_counts"]
        total = group["obs"].create_array("total_counts", data=np.asarray(matrix.sum(1)).ravel().astype(np.float64))
        total.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        dtypes = {"data": np.uint16, "indices": np.uint16, "indptr": np.int64}
        for part, dtype in dtypes.items():
            del group["X"][part]
            values = np.asarray(getattr(matrix, part)).astype(dtype)
            group["X"].create_array(
                part,
                data=values,
                chunks=(64,),
                shards=(256,),
                serializer=BytesCodec(),
                compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()],
            )
        entries[name] = ModalitySchema(
            name, matrix.shape[0], matrix.shape[1], matrix.nnz, "uint16", sha256_of_names(names_of(name))
        )
    ids = [f"cell{c}" for c in range(NUM_CELLS)]
    columns = ("sample", "lane", "good", "type", "score")
    root.attrs[SCHEMA_KEY] = Schema(NUM_CELLS, entries, columns, True, sha256_of_names(ids)).to_json()


@pytest.fixture
def own_store(tmp_path: Path) -> Path:
    path = tmp_path / "own.zarr"
    write_own_store(path)
    return path


def check_counts(store: ZarrStore, modality: str, cells: np.ndarray | None = None) -> None:
    """Every row, read in pieces, holds the counts that its cell must have."""
    have = cells_of(modality) if cells is None else cells
    rows = store.modality_rows(modality)
    expected_rows = np.full(store.schema.num_cells, -1)
    position = {f"cell{c}": i for i, c in enumerate(have)}
    ids = store.cell_ids(0, store.schema.num_cells)
    order = [cell_id for cell_id in ids if cell_id in position]
    expected_rows[[i for i, cell_id in enumerate(ids) if cell_id in position]] = np.arange(len(order))
    if rows is None:
        assert len(have) == store.schema.num_cells
    else:
        np.testing.assert_array_equal(rows, expected_rows)
    expected = counts_of(modality, np.array([int(cell_id[4:]) for cell_id in order]))
    for start in range(0, len(order), 11):
        stop = min(start + 11, len(order))
        part = store.read_rows(modality, start, stop)
        assert part.values.dtype in (np.uint8, np.uint16, np.uint32, np.float32)
        assert part.indptr.dtype == np.int64
        assert part.indices.dtype in (np.uint16, np.uint32, np.int32)
        assert all((np.diff(part.indices[a:b].astype(np.int64)) > 0).all() for a, b in itertools.pairwise(part.indptr))
        np.testing.assert_array_equal(part.to_scipy().toarray(), expected[start:stop])
    np.testing.assert_array_equal(store.totals(modality), expected.sum(1))
    np.testing.assert_array_equal(np.diff(store.row_nonzeros(modality)), (expected != 0).sum(1))
    assert store.schema.modalities[modality].num_nonzeros == (expected != 0).sum()
    np.testing.assert_array_equal(store.feature_names(modality), names_of(modality))


def check_obs(store: ZarrStore) -> None:
    expected = obs_frame(np.array([int(i[4:]) for i in store.cell_ids(0, store.schema.num_cells)]))
    sample = store.obs_column("sample")
    assert [sample.categories[code] for code in sample.codes] == list(expected["sample"])
    lane = store.obs_column("lane")
    assert lane.categories == ("0", "1", "2")
    np.testing.assert_array_equal(lane.codes, expected["lane"])
    good = store.obs_column("good")
    assert good.categories == ("False", "True")
    np.testing.assert_array_equal(good.codes, expected["good"].astype(int))
    kind = store.obs_column("type")
    assert kind.codes.dtype == np.int32
    assert [None if code < 0 else kind.categories[code] for code in kind.codes] == [
        None if pd.isna(value) else value for value in expected["type"]
    ]


def test_own_store_gives_every_count_and_column(own_store: Path) -> None:
    store = open_store(own_store)
    assert store.schema.is_shuffled
    for modality in FEATURES:
        check_counts(store, modality)
        assert store.read_rows(modality, 0, 5).values.dtype == np.uint16
    check_obs(store)
    assert store.modality_rows("rna") is None
    assert store.obs_column("sample").categories == ("donor3", "donor2", "donor1", "donor0")
    pd.testing.assert_frame_equal(store.obs_frame(), obs_frame(np.arange(NUM_CELLS)), check_names=False)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_mudata_of_others_streams_as_a_mosaic(
    tmp_path: Path, zarr_format: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_mudata(tmp_path / "a.zarr", make_mudata(**{name: cells_of(name) for name in FEATURES}), zarr_format)
    with caplog.at_level(logging.INFO):
        store = open_store(tmp_path / "a.zarr")
    assert "was not made by" in caplog.text
    assert not store.schema.is_shuffled
    assert tuple(store.schema.modalities) == ("rna", "atac", "adt")
    for modality in FEATURES:
        check_counts(store, modality)
    check_obs(store)
    assert set(store.schema.obs_columns) == set(obs_frame(np.arange(2)).columns)


def test_modality_in_another_order_than_the_cells_is_put_right(tmp_path: Path) -> None:
    cells = np.random.default_rng(3).permutation(cells_of("atac"))
    write_mudata(tmp_path / "a.zarr", make_mudata(rna=cells_of("rna"), atac=cells), 3)
    store = open_store(tmp_path / "a.zarr")
    check_counts(store, "atac", cells)
    check_obs(store)


def test_column_that_only_one_modality_has_is_missing_elsewhere(tmp_path: Path) -> None:
    data = make_mudata(rna=cells_of("rna"), adt=cells_of("adt"))
    data.mod["adt"].obs["well"] = [f"well{c % 2}" for c in cells_of("adt")]
    write_mudata(tmp_path / "a.zarr", data, 3)
    column = open_store(tmp_path / "a.zarr").obs_column("well")
    assert [column.categories[c] if c >= 0 else None for c in column.codes] == [
        f"well{c % 2}" if c >= 25 else None for c in range(NUM_CELLS)
    ]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_anndata_is_named_by_option_or_by_its_features(tmp_path: Path, zarr_format: int) -> None:
    cells = np.arange(NUM_CELLS)
    for name in ("rna", "atac", "adt"):
        with anndata.settings.override(zarr_write_format=zarr_format):
            make_anndata(name, cells).write_zarr(tmp_path / f"{name}.zarr")
    check_counts(open_store(tmp_path / "rna.zarr"), "rna")
    check_counts(open_store(tmp_path / "atac.zarr"), "atac", cells)
    check_counts(open_store(tmp_path / "adt.zarr", modality="prot"), "adt", cells)
    with pytest.raises(ValueError, match="modality: got 'lipids'; give one of rna, atac, adt"):
        open_store(tmp_path / "adt.zarr", modality="lipids")


def test_anndata_is_split_by_feature_types(tmp_path: Path) -> None:
    cells = np.arange(NUM_CELLS)
    parts = {name: counts_of(name, cells) for name in ("rna", "adt")}
    other = np.ones((NUM_CELLS, 2), np.float32)
    mixed = np.concatenate([parts["adt"][:, :3], parts["rna"], other, parts["adt"][:, 3:]], axis=1)
    kinds = ["Antibody Capture"] * 3 + ["Gene Expression"] * 30 + ["CRISPR"] * 2 + ["Antibody Capture"] * 4
    names = [*names_of("adt")[:3], *names_of("rna"), "guide0", "guide1", *names_of("adt")[3:]]
    var = pd.DataFrame({"feature_types": pd.Categorical(kinds)}, index=names)
    anndata.AnnData(scipy.sparse.csr_matrix(mixed), obs=obs_frame(cells), var=var).write_zarr(tmp_path / "a.zarr")
    store = open_store(tmp_path / "a.zarr")
    assert tuple(store.schema.modalities) == ("rna", "adt")
    for name in parts:
        check_counts(store, name, cells)
    check_obs(store)


def test_layer_dense_matrix_and_unsorted_columns(tmp_path: Path) -> None:
    cells = np.arange(NUM_CELLS)
    data = make_anndata("rna", cells)
    reversed_rows = data.X.copy()
    for a, b in itertools.pairwise(reversed_rows.indptr):
        reversed_rows.indices[a:b] = reversed_rows.indices[a:b][::-1]
        reversed_rows.data[a:b] = reversed_rows.data[a:b][::-1]
    reversed_rows.has_sorted_indices = False
    data.layers["counts"] = reversed_rows
    data.layers["dense"] = counts_of("rna", cells).astype(np.int64)
    data.layers["columns"] = data.X.tocsc()
    data.X = data.X * 0.5
    data.write_zarr(tmp_path / "a.zarr")
    check_counts(open_store(tmp_path / "a.zarr", layer="counts"), "rna")
    dense = open_store(tmp_path / "a.zarr", layer="dense")
    check_counts(dense, "rna")
    assert dense.schema.modalities["rna"].value_dtype == "uint32"
    with pytest.raises(ValueError, match=r"layers/columns: got encoding 'csc_matrix'.*tocsr"):
        open_store(tmp_path / "a.zarr", layer="columns")
    with pytest.raises(ValueError, match="layer: got 'spliced'"):
        open_store(tmp_path / "a.zarr", layer="spliced")


def test_methods_are_safe_from_several_threads(own_store: Path) -> None:
    store = open_store(own_store)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for modality in FEATURES:
                check_counts(store, modality)
            check_obs(store)
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
        RuntimeError, match=r"own.zarr/mod/rna/X/indices: rows 0:3 \(entries 0:\d+\) cannot be read.*copy"
    ):
        store.read_rows("rna", 0, 3)


def test_deleted_chunk_is_an_error_not_zeros(own_store: Path) -> None:
    (own_store / "mod/rna/X/data/c/1").unlink()
    store = open_store(own_store)
    store.read_rows("rna", 0, 3)
    with pytest.raises(RuntimeError, match=r"mod/rna/X/data: got a zero at entry 256 .*missing"):
        store.read_rows("rna", 0, NUM_CELLS)


def test_unknown_names_are_refused_with_the_known_ones(own_store: Path) -> None:
    store = open_store(own_store)
    with pytest.raises(ValueError, match=r"obs column: got 'batch'.*sample, lane"):
        store.obs_column("batch")
    with pytest.raises(ValueError, match=r"obs\['score'\]: got values of type float64"):
        store.obs_column("score")
    with pytest.raises(ValueError, match=r"modality: got 'vdj'.*rna, atac, adt"):
        store.totals("vdj")
    with pytest.raises(ValueError, match="got rows 48:51"):
        store.read_rows("rna", 48, 51)
    with pytest.raises(ValueError, match="fixed"):
        open_store(own_store, modality="rna")


def test_layout_of_a_newer_version_is_refused(own_store: Path) -> None:
    root = zarr.open_group(own_store, mode="r+")
    root.attrs[SCHEMA_KEY] = {**root.attrs[SCHEMA_KEY], "format": 99}
    with pytest.raises(ValueError, match="got 99"):
        open_store(own_store)
