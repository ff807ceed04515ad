"""Opening the root of a file, Zarr or HDF5, local or remote, and saying what stands there instead when it is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import h5py
import zarr
import zarr.errors
from zarr.abc.store import Store as ZarrBackend
from zarr.storage import FsspecStore, LocalStore

from loaders.formats.sharded import Damaged

Address: TypeAlias = str | Path | ZarrBackend | zarr.Group
"""A path, an address, a store object of zarr-python, or an open group."""

Root: TypeAlias = zarr.Group | h5py.File

INGEST_MARK = ".ingest-"
"""Part of the name of the folder in which ingest builds a store, and which stays behind when it is killed."""

HDF5_SUFFIXES = (".h5", ".h5ad", ".h5mu", ".hdf5", ".loom")

ZARR_MARKS = ("zarr.json", ".zgroup", ".zmetadata", ".zarray")
SOMA_MARKS = ("__tiledb_group.tdb", "__group", "__schema")
"""Entries of a folder that Zarr wrote, or TileDB: of a group, or of an array (which is then refused by its type)."""


def local_path(address: str | Path) -> Path | None:
    """The path of a local address, None for a remote one."""
    text = str(address)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


def describe_address(address: Address) -> str:
    """How messages name what is opened."""
    if isinstance(address, zarr.Group):
        return str(address.store_path).removeprefix("file://")
    return str(address).removeprefix("file://")


def is_soma(address: Address) -> bool:
    """Whether TileDB wrote what stands there; of remote addresses, those that begin with tiledb://."""
    if not isinstance(address, str | Path):
        return False
    path = local_path(address)
    return str(address).startswith("tiledb://") if path is None else any((path / mark).exists() for mark in SOMA_MARKS)


def open_root(
    address: Address, *, storage_options: Mapping[str, Any] | None = None, mode: Literal["r", "r+"] = "r"
) -> Root:
    """Open the group at an address.

    Parameters
    ----------
    address
        A path, an address of fsspec (http://, s3://, memory:// ...), a store object of zarr (`zarr.storage.ObjectStore`
        for obstore) or a group already open.
    storage_options
        Options of fsspec for an address, such as {"anon": True} for a public bucket.
    mode
        "r" to read, "r+" to write; writing ignores consolidated metadata, which would hide arrays made after it. HDF5
        is only read.

    Raises
    ------
    ValueError
        Nothing is there, or something that is neither a Zarr group nor an HDF5 file.
    """
    if isinstance(address, zarr.Group):
        if mode == "r":
            return address
        backend = address.store.with_read_only(False) if address.store.read_only else address.store
        return zarr.open_group(backend, path=address.path, mode="r+", use_consolidated=False)
    if isinstance(address, str | Path) and (path := local_path(address)) is not None:
        _check_path(path)
        if path.is_file():
            return _open_hdf5(path, mode)
        backend = LocalStore(path, read_only=mode == "r")
    else:
        backend = address if isinstance(address, ZarrBackend) else _remote(address, storage_options or {}, mode == "r")
    try:
        return zarr.open_group(backend, mode=mode, use_consolidated=None if mode == "r" else False)
    except (zarr.errors.GroupNotFoundError, FileNotFoundError, zarr.errors.ContainsArrayError) as error:
        raise not_a_store(describe_address(address), f"nothing that Zarr can open as a group ({error})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # JSON that is none, or not of a group
        what = f"its metadata cannot be read ({type(error).__name__}: {error})"
        raise Damaged(describe_address(address), "zarr.json", what) from error


def not_a_store(address: str, found: str) -> ValueError:
    """The error of opening something that holds no cells."""
    return ValueError(
        f"{address}: got {found}; give a store made by an ingest, an AnnData or MuData (.h5ad, .h5mu, .zarr),"
        f" a 10x .h5, an annbatch collection or a TileDB-SOMA experiment"
    )


def _remote(address: str | Path, storage_options: Mapping[str, Any], read_only: bool) -> ZarrBackend:
    try:
        return FsspecStore.from_url(str(address), storage_options=dict(storage_options), read_only=read_only)
    except ImportError as error:
        raise ValueError(
            f"{address}: got an address whose file system is not installed ({error});"
            f' install it, for example `pip install "fsspec[http]"` or `pip install s3fs`'
        ) from None


def _check_path(path: Path) -> None:
    if not path.exists():
        left = sorted(p.name for p in path.parent.glob(f".{path.name}{INGEST_MARK}*"))
        if left:
            raise ValueError(
                f"{path}: got no such folder, but {left[0]} beside it: an ingest that did not finish;"
                f" ingest again with the same output"
            )
        raise ValueError(f"{path}: got no such file or folder; check the path")
    if INGEST_MARK in str(path.absolute()):
        raise not_a_store(str(path), "an ingest that did not finish (run it again)")
    if path.is_dir() and not any((path / name).exists() for name in ZARR_MARKS):
        inside = sorted(p.name for p in path.iterdir())
        shown = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
        raise not_a_store(str(path), f"a folder that is no Zarr group (holds {shown or 'nothing'})")


def _open_hdf5(path: Path, mode: str) -> h5py.File:
    if not h5py.is_hdf5(path):
        raise not_a_store(str(path), "a file that is not HDF5, or not a complete one")
    if mode != "r":
        raise ValueError("an HDF5 file is only read")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error}); copy or download the file again") from error
