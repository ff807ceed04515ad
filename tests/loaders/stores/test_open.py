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


@pytest.mark.parametrize("name", ["a.h5ad", "a.h5mu", "filtered_feature_bc_matrix.h5"])
def test_hdf5_file_names_the_ingest_command(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x89HDF")
    with pytest.raises(ValueError, match=rf"got an HDF5 file.*liam-scale ingest .*{name} --out {Path(name).stem}.zarr"):
        open_store(tmp_path / name)


def test_folder_of_something_else_is_listed(tmp_path: Path) -> None:
    (tmp_path / "matrix.mtx").touch()
    with pytest.raises(ValueError, match=r"got a folder that is no Zarr group \(holds matrix.mtx\)"):
        open_store(tmp_path)


def test_zarr_group_of_another_encoding(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "a.zarr", mode="w").attrs["encoding-type"] = "dataframe"
    with pytest.raises(ValueError, match=r"got a Zarr group of encoding 'dataframe'; give a store made by"):
        open_store(tmp_path / "a.zarr")
    zarr.open_group(tmp_path / "b.zarr", mode="w")
    with pytest.raises(ValueError, match=r"got a Zarr group of nothing known"):
        open_store(tmp_path / "b.zarr")


def test_zarr_array_is_no_store(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(3,), dtype="f4")
    with pytest.raises(ValueError, match=r"got nothing that Zarr can open as a group"):
        open_store(tmp_path / "a.zarr")
