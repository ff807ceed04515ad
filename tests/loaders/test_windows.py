"""Windows of one modality: our own reader and the matrix's plain one give the same rows, and damage is named."""

import logging
import shutil

import anndata
import numpy as np
import pytest
import scipy.sparse
import zarr
from identifying import identifying_store

from loaders.ecosystem import quiet_anndata
from loaders.formats import compressed
from loaders.formats.compressed import RowOffsets
from loaders.formats.matrix import Matrix, runs_of
from loaders.formats.sharded import ShardedArray
from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.stores import MatchedStore
from loaders.stores.open import open_store
from loaders.windows import open_inputs, read_window

CELLS = 900


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("readers") / "cells.zarr"
    identifying_store(path, num_cells=CELLS, num_features={"rna": 90, "atac": 200}, absent={"atac": [1]})
    return path


def read(matrix, start, stop, prepare=None):
    prepared = (prepare or type(matrix).prepare)(matrix, np.arange(start, stop))
    index_dtype, value_dtype = matrix.window_dtypes
    indices, values = np.empty(prepared.num_entries, index_dtype), np.empty(prepared.num_entries, value_dtype)
    prepared.fill(indices, values)
    indptr = np.append(prepared.starts, prepared.num_entries)
    assert np.array_equal(np.diff(indptr), prepared.lengths)
    return scipy.sparse.csr_matrix((values, indices.astype(np.int64), indptr), shape=(stop - start, 500))


@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_both_readers_give_the_same_rows(path, modality):
    matrix = open_store(path).matrix(modality)
    assert matrix.slow_because is None
    for start, stop in [(0, matrix.num_rows), (0, 1), (250, 270), (96, 97), (5, 5)]:
        expected = read(matrix, start, stop, Matrix.prepare)
        assert (read(matrix, start, stop) != expected).nnz == 0
        assert expected.has_sorted_indices


def test_a_chain_of_stores_is_read_by_the_fast_reader(path, tmp_path):
    identifying_store(tmp_path / "b.zarr", num_cells=200, num_features={"rna": 90, "atac": 200})
    chain = open_store([path, tmp_path / "b.zarr"])
    for modality in ("rna", "atac"):
        matrix = chain.matrix(modality)
        assert matrix.slow_because is None
        count = matrix.num_rows
        for start, stop in [(0, count), (count - 250, count - 150), (count - 201, count - 200), (count - 3, count)]:
            assert (read(matrix, start, stop) != read(matrix, start, stop, Matrix.prepare)).nnz == 0


def test_offsets_are_those_of_the_matrix(path):
    indptr = zarr.open_group(path, mode="r")["mod/rna/X/indptr"][:]
    whole, pieces = RowOffsets([indptr]), RowOffsets([indptr[:256], indptr[256:768], indptr[768:]])
    for offsets in (whole, pieces):
        assert (offsets.num_rows, offsets.num_entries) == (CELLS, indptr[-1])
        for start, stop in [(0, CELLS), (255, 257), (256, 256), (700, 900), (899, 900), (900, 900)]:
            assert np.array_equal(offsets.between(start, stop), indptr[start : stop + 1])
    ranges = list(pieces.ranges(2_000))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == CELLS
    for start, stop in ranges:
        assert indptr[stop] - indptr[start] <= 2_000
        assert stop == CELLS or indptr[stop + 1] - indptr[start] > 2_000
    for row in (0, 255, 256, 500, CELLS - 2):
        assert whole.rows_of(int(indptr[row]), int(indptr[row + 1])) == (row, row + 1)
    assert whole.rows_of(int(indptr[250]) + 1, int(indptr[700]) + 1) == (250, 701)


def test_runs_cover_the_rows_in_few_reads():
    rows = np.array([5, 6, 6, 9, 40, 41, 3, 4, 9_000])
    assert runs_of(rows) == [(0, 6), (6, 8), (8, 9)]
    sparse = np.arange(0, 30_000, 20)
    runs = runs_of(sparse)
    assert [sparse[b - 1] - sparse[a] < 1_100 for a, b in runs] == [True] * len(runs)
    assert runs[0][0] == 0
    assert runs[-1][1] == len(sparse)
    assert runs_of(np.arange(50_000)) == [(0, 50_000)]
    assert runs_of(np.empty(0, np.int64)) == []


@pytest.mark.parametrize("rows", [range(0, CELLS, 19), range(100, 700), [899, 3, 3, 898, 0], [1, 4, 7], []])
@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_windows_hold_the_cells_asked_for(path, modality, rows):
    store = open_store(path)
    cells = np.array(rows, np.uint32)
    order = np.random.default_rng(0).permutation(len(cells))
    window = read_window(open_inputs(store)[modality], cells, order)
    whole = store.matrix(modality).read(0, store.schema.modalities[modality].num_cells).to_scipy()
    mapping = store.modality_rows(modality)
    for k, cell in enumerate(cells[order]):
        row = cell if mapping is None else mapping[cell]
        span = slice(window.starts[k], window.starts[k] + window.lengths[k])
        expected = whole[max(row, 0)] if row >= 0 else whole[:0].sum(axis=0)
        assert np.array_equal(window.values[span], expected.data if row >= 0 else [])
        assert np.array_equal(window.indices[span], expected.indices if row >= 0 else [])
        assert window.present is None or window.present[k] == (row >= 0)
    if len(cells) == len(range(0, CELLS, 19)):
        assert len(window.values) == window.lengths.sum()


def flip(path, place):
    broken = bytearray(path.read_bytes())
    broken[place] ^= 16
    path.write_bytes(broken)


@pytest.mark.parametrize(("array", "modality"), [("data", "rna"), ("indices", "atac")])
def test_a_flipped_bit_names_store_array_chunk_and_cells(path, tmp_path, array, modality):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(path, copy)
    flip(copy / "mod" / modality / "X" / array / "c" / "0", 5_000)
    pattern = (
        rf"copy\.zarr/mod/{modality}/X/{array}: got damaged data: chunk 0 \(the cells \d+ to \d+\): .*checksum.*c/0"
    )
    with pytest.raises(RuntimeError, match=pattern):
        list(Loader(open_store(copy), LoaderConfig(minibatch=64), subset="all"))


def test_a_deleted_shard_is_an_error_and_not_zeros(path, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(path, copy)
    (copy / "mod" / "rna" / "X" / "indices" / "c" / "0").unlink()
    # Which of the shard's chunks is named depends on the thread that comes first.
    with pytest.raises(
        RuntimeError, match=r"rna/X/indices: got damaged data: chunk .*cells \d+ to \d+.* cannot be opened"
    ):
        list(Loader(open_store(copy), LoaderConfig(minibatch=64), subset="all"))


def write_foreign(path, *, sharded, sort=True, indices=np.int32):
    """An AnnData Zarr store as other tools write it, without checksums."""
    rng = np.random.default_rng(0)
    matrix = scipy.sparse.random(400, 150, 0.2, format="csr", dtype=np.float32, random_state=rng)
    matrix.data = rng.integers(1, 9, matrix.nnz).astype(np.float32)
    matrix.sort_indices()
    with quiet_anndata():
        anndata.AnnData(matrix).write_zarr(path)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)["X"]
    columns = matrix.indices.astype(indices)
    if not sort:
        for low, high in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
            columns[low:high], matrix.data[low:high] = columns[low:high][::-1], matrix.data[low:high][::-1].copy()
    for name, values in (("data", matrix.data), ("indices", columns)):
        del group[name]
        group.create_array(name, data=values, chunks=(1_000,), shards=(5_000,) if sharded else None)
    zarr.consolidate_metadata(path)
    return scipy.sparse.csr_matrix((matrix.data, columns, matrix.indptr), shape=matrix.shape)


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("indices", [np.int32, np.int64])
def test_stores_of_others_stream_with_sorted_columns(tmp_path, caplog, sharded, sort, indices):
    expected = write_foreign(tmp_path / "a.zarr", sharded=sharded, sort=sort, indices=indices)
    expected.sort_indices()
    store = open_store(tmp_path / "a.zarr", modality="rna")
    with caplog.at_level(logging.INFO, logger="loaders"):
        loader = Loader(store, LoaderConfig(minibatch=50), subset="all")
        Loader(store, LoaderConfig(minibatch=50), subset="train")
    assert caplog.text.count("read through the store's own library: it is not sharded") == (not sharded)
    for got in loader:
        rows = got.counts["rna"].to_scipy()
        assert np.array_equal(rows.indices, expected[got.rows.numpy()].indices)
        assert np.array_equal(rows.data, expected[got.rows.numpy()].data)


def test_a_view_of_our_own_store_by_feature_names_is_no_slow_store(path, caplog):
    """Nor is the modality that it lacks."""
    names = {"rna": ["rna3", "elsewhere"], "adt": ["CD4"]}
    with caplog.at_level(logging.INFO, logger="loaders"):
        loader = Loader(
            MatchedStore(open_store(path), names), LoaderConfig(minibatch=50), subset="all", modalities=("rna", "adt")
        )
    assert sum(minibatch.num_cells for minibatch in loader) == open_store(path).schema.num_cells
    assert "library" not in caplog.text


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("sharded", [True, False])
def test_a_column_outside_the_features_is_an_error_and_not_a_crash(tmp_path, sharded):
    matrix = write_foreign(tmp_path / "a.zarr", sharded=sharded)
    columns = zarr.open_group(tmp_path / "a.zarr", mode="r+")["X"]["indices"]
    columns[int(matrix.indptr[31]) - 1] = 1_000_000
    with pytest.raises(RuntimeError, match=r"column outside 0\.\.149 in row 30"):
        list(Loader(open_store(tmp_path / "a.zarr", modality="rna"), LoaderConfig(minibatch=50), subset="all"))


def test_each_array_is_opened_once(path, monkeypatch):
    """Training and validation share offsets, shard indexes and open files."""
    opened = []

    def counted(place):
        opened.append(place.name(""))
        return ShardedArray(place)

    monkeypatch.setattr(compressed, "ShardedArray", counted)
    store = open_store(path)
    matrix = store.matrix("rna")
    for subset in ("train", "validation"):
        with Loader(store, LoaderConfig(minibatch=64), subset=subset, modalities=["rna"]) as loader:
            next(iter(loader))
    matrix.read(0, 10)
    assert sorted(opened) == sorted(set(opened))
    assert sum("mod/rna" in folder for folder in opened) == 2
