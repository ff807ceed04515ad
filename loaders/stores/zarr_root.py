"""Opening a Zarr root, local or remote, and saying what stands there instead when it is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import zarr
import zarr.errors
from zarr.abc.store import Store as ZarrBackend
from zarr.storage import FsspecStore, LocalStore

Source: TypeAlias = str | Path | ZarrBackend | zarr.Group
"""A path, an address, a store object of zarr-python, or an open group."""

INGEST_MARK = ".ingest-"
"""Part of the name of the folder in which ingest builds a store, and which stays behind when it is killed."""

HDF5_SUFFIXES = (".h5", ".h5ad", ".h5mu", ".hdf5", ".loom")


def local_path(uri: str | Path) -> Path | None:
    """The path of a local address, None for a remote one."""
    text = str(uri)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


def describe_source(source: Source) -> str:
    """How messages name a source: its address."""
    if isinstance(source, zarr.Group):
        return str(source.store_path).removeprefix("file://")
    return str(source).removeprefix("file://")


def open_root(
    source: Source, *, storage_options: Mapping[str, Any] | None = None, mode: Literal["r", "r+"] = "r"
) -> zarr.Group:
    """Open the group at an address.

    Parameters
    ----------
    source
        A path, an address of fsspec (http://, s3://, memory:// ...), a store object of zarr (`zarr.storage.ObjectStore`
        for obstore) or a group already open.
    storage_options
        Options of fsspec for an address, such as {"anon": True} for a public bucket.
    mode
        "r" to read, "r+" to write; writing ignores consolidated metadata, which would hide arrays made after it.

    Raises
    ------
    ValueError
        Nothing is there, or something that is not a Zarr group.
    """
    if isinstance(source, zarr.Group):
        if mode == "r":
            return source
        backend = source.store.with_read_only(False) if source.store.read_only else source.store
        return zarr.open_group(backend, path=source.path, mode="r+", use_consolidated=False)
    backend = source if isinstance(source, ZarrBackend) else _backend(source, storage_options or {}, mode == "r")
    try:
        return zarr.open_group(backend, mode=mode, use_consolidated=None if mode == "r" else False)
    except (zarr.errors.GroupNotFoundError, FileNotFoundError, zarr.errors.ContainsArrayError) as error:
        raise not_a_store(describe_source(source), f"nothing that Zarr can open as a group ({error})") from None


def not_a_store(uri: str, found: str) -> ValueError:
    """The error of opening something that is no store."""
    return ValueError(
        f"store {uri}: got {found}; give a store made by `liam-scale ingest`, an AnnData or MuData Zarr,"
        f" an annbatch collection or a TileDB-SOMA experiment"
    )


def is_local(group: zarr.Group) -> bool:
    return isinstance(group.store, LocalStore)


def _backend(source: str | Path, storage_options: Mapping[str, Any], read_only: bool) -> ZarrBackend:
    path = local_path(source)
    if path is None:
        try:
            return FsspecStore.from_url(str(source), storage_options=dict(storage_options), read_only=read_only)
        except ImportError as error:
            raise ValueError(
                f"store {source}: got an address whose file system is not installed ({error});"
                f' install it, for example `pip install "fsspec[http]"` or `pip install s3fs`'
            ) from None
    _check_path(path)
    return LocalStore(path, read_only=read_only)


def _check_path(path: Path) -> None:
    if not path.exists():
        left = sorted(p.name for p in path.parent.glob(f".{path.name}{INGEST_MARK}*"))
        if left:
            raise ValueError(
                f"store {path}: got no such folder, but {left[0]} beside it: an ingest that did not finish;"
                f" run `liam-scale ingest` again with the same output"
            )
        raise ValueError(
            f"store {path}: got no such file or folder; check the path, or make it with `liam-scale ingest`"
        )
    if INGEST_MARK in str(path.absolute()):
        raise not_a_store(str(path), "an ingest that did not finish (run it again)")
    if path.is_file():
        if path.suffix in HDF5_SUFFIXES:
            raise ValueError(
                f"store {path}: got an HDF5 file, which cannot be streamed;"
                f" run `liam-scale ingest {path} --out {path.with_suffix('.zarr').name}` once and open that"
            )
        raise not_a_store(str(path), "a file")
    if not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata", ".zarray")):
        inside = sorted(p.name for p in path.iterdir())
        shown = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
        raise not_a_store(str(path), f"a folder that is no Zarr group (holds {shown or 'nothing'})")
