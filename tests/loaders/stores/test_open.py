"""What is not a store is refused by what was found, with the cure."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

from loaders.ecosystem import quiet_anndata
from loaders.ingest import ingest
from loaders.stores import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.zarr: got no such file or folder; check the path"):
        open_store(tmp_path / "a.zarr")


def test_leftover_of_an_interrupted_ingest(own_store: Path) -> None:
    left = own_store.parent / ".own.zarr.ingest-abc"
    left.mkdir()
    own_store.rename(left / "store")
    with pytest.raises(ValueError, match=r"own.zarr: got no such folder, but .own.zarr.ingest-abc beside it"):
        open_store(own_store)
    with pytest.raises(ValueError, match=r"ingest-abc/store: got an ingest that did not finish"):
        open_store(left / "store")


def test_a_file_that_is_not_hdf5(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").write_bytes(b"\x89HDF")
    with pytest.raises(ValueError, match=r"a.h5ad: got a file that is not HDF5, or not a complete one; give a store"):
        open_store(tmp_path / "a.h5ad")


def test_folder_of_something_else_is_listed(tmp_path: Path) -> None:
    (tmp_path / "matrix.mtx").touch()
    with pytest.raises(ValueError, match=r"got a folder that is no Zarr group \(holds matrix.mtx\)"):
        open_store(tmp_path)


def test_zarr_group_of_another_encoding(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "a.zarr", mode="w").attrs["encoding-type"] = "dataframe"
    with pytest.raises(ValueError, match=r"got a group of encoding 'dataframe'; give a store made by"):
        open_store(tmp_path / "a.zarr")
    zarr.open_group(tmp_path / "b.zarr", mode="w")
    with pytest.raises(ValueError, match=r"got a group that holds nothing at its top"):
        open_store(tmp_path / "b.zarr")


def test_zarr_array_is_no_store(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(3,), dtype="f4")
    with pytest.raises(ValueError, match=r"got nothing that Zarr can open as a group"):
        open_store(tmp_path / "a.zarr")


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr", None])
def test_an_anndata_without_counts_is_a_store_without_modalities_that_no_ingest_takes(
    tmp_path: Path, name: str | None
) -> None:
    data = anndata.AnnData(obs=pd.DataFrame({"donor": ["a", "b"]}, index=["c0", "c1"]))
    data.obsm["X_liam"] = np.arange(6, dtype=np.float32).reshape(2, 3)
    data.uns["X_liam"] = {"made_by": "run"}
    if name is not None:
        with quiet_anndata():
            data.write_zarr(tmp_path / name) if name == "a.zarr" else data.write(tmp_path / name)
    store = open_store(data if name is None else tmp_path / name)
    assert store.schema.modalities == {}
    assert store.obs_column("donor").categories == ("a", "b")
    np.testing.assert_array_equal(store.read_embedding("X_liam", 1, 2), [[3, 4, 5]])
    assert store.embedding_attributes("X_liam")[0]["made_by"] == "run"
    if name is not None:
        with pytest.raises(ValueError, match="got no counts, neither X nor layers; give a file that has them"):
            ingest(tmp_path / name, out=tmp_path / "out.zarr", progress=False)
