"""What is not a store is refused by what was found, with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import zarr

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
