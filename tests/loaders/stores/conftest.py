"""Toy stores on disk of every layout, and the checks that a store gives back exactly what they hold.

Every non-zero value names its cell and feature, so that a wrong row or column cannot pass.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from loaders.ecosystem import quiet_anndata
from loaders.schema import SCHEMA_KEY, ModalitySchema, Schema, sha256_of_names
from loaders.stores import Store

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
    return mudata.MuData({name: make_anndata(name, which) for name, which in cells.items()})


def write_mudata(path: Path, data: mudata.MuData, zarr_format: int) -> None:
    with quiet_anndata(zarr_format):
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


def check_counts(store: Store, modality: str, cells: np.ndarray | None = None) -> None:
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
        part = store.matrix(modality).read(start, stop)
        assert part.values.dtype in (np.uint8, np.uint16, np.uint32, np.float32)
        assert part.indptr.dtype == np.int64
        assert part.indices.dtype in (np.uint16, np.uint32, np.int32)
        assert all((np.diff(part.indices[a:b].astype(np.int64)) > 0).all() for a, b in itertools.pairwise(part.indptr))
        np.testing.assert_array_equal(part.to_scipy().toarray(), expected[start:stop])
    np.testing.assert_array_equal(store.totals(modality), expected.sum(1))
    np.testing.assert_array_equal(store.matrix(modality).lengths(), (expected != 0).sum(1))
    assert store.schema.modalities[modality].num_nonzeros == (expected != 0).sum()
    np.testing.assert_array_equal(store.feature_names(modality), names_of(modality))


def check_obs(store: Store) -> None:
    expected = obs_frame(np.array([int(i[4:]) for i in store.cell_ids(0, store.schema.num_cells)]))
    sample = store.obs_column("sample")
    assert [sample.categories[code] for code in sample.codes] == list(expected["sample"])
    lane = store.obs_column("lane")
    assert lane.categories == tuple(str(value) for value in sorted(set(expected["lane"])))
    assert [int(lane.categories[code]) for code in lane.codes] == list(expected["lane"])
    good = store.obs_column("good")
    assert good.categories == tuple(str(value) for value in sorted(set(expected["good"])))
    assert [good.categories[code] for code in good.codes] == [str(value) for value in expected["good"]]
    kind = store.obs_column("type")
    assert kind.codes.dtype == np.int32
    assert [None if code < 0 else kind.categories[code] for code in kind.codes] == [
        None if pd.isna(value) else value for value in expected["type"]
    ]


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The functions of this file, which test files cannot import."""
    return sys.modules[__name__]


@pytest.fixture
def own_store(tmp_path: Path) -> Path:
    """A store of our layout: RNA everywhere, ATAC and ADT in some cells."""
    path = tmp_path / "own.zarr"
    write_own_store(path)
    return path
