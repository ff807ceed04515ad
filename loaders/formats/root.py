"""The root of a file, Zarr or HDF5, local or remote: named, opened, and looked at before anything of it is read."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

import h5py
import zarr
import zarr.errors
from zarr.abc.store import Store as ZarrBackend
from zarr.storage import FsspecStore, LocalStore

from loaders.formats.damage import Damaged, said_by, unreachable
from loaders.formats.storage import RemoteStore
from loaders.options import check_size

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
        A path, an address of an object store (s3://, gs://, az://, https://, by obstore) or of fsspec (memory:// ...),
        a store object of zarr or a group already open.
    storage_options
        Options of obstore for an address, such as {"skip_signature": True} for a public bucket; of fsspec for others.
    mode
        "r" to read, "r+" to write; writing ignores consolidated metadata, which would hide arrays made after it. HDF5
        is only read.

    Raises
    ------
    ValueError
        Nothing is there, or something that is neither a Zarr group nor an HDF5 file.
    RuntimeError
        A remote store does not answer, or does not let read.
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # no JSON, or not of a group
        what = f"its metadata cannot be read ({said_by(error)})"
        raise Damaged(describe_address(address), "zarr.json", what) from error
    except Exception as error:  # obstore's own: no permission, no answer
        if remote := unreachable(describe_address(address), error):
            raise remote from error
        raise


def not_a_store(address: str, found: str) -> ValueError:
    """The error of opening something that holds no cells."""
    return ValueError(
        f"{address}: got {found}; give a store made by an ingest, an AnnData or MuData (.h5ad, .h5mu, .zarr),"
        f" a 10x .h5, an annbatch collection or a TileDB-SOMA experiment"
    )


_OBJECT_STORES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https")
"""Schemes of addresses that obstore opens; fsspec opens all others."""

_RETRIES = {"max_retries": 8, "retry_timeout": timedelta(seconds=90)}
_CLIENT = {"connect_timeout": "10 seconds", "timeout": "60 seconds"}
"""A request that stalls is given up after a minute and tried again, with pauses that grow; then an error names it."""


def _remote(address: str | Path, storage_options: Mapping[str, Any], read_only: bool) -> ZarrBackend:
    scheme = str(address).partition("://")[0]
    if scheme in _OBJECT_STORES:
        return _object_store(str(address), storage_options, read_only)
    try:
        return FsspecStore.from_url(str(address), storage_options=dict(storage_options), read_only=read_only)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{address}: got an address whose file system is not installed ({error}); install what fsspec needs for it"
        ) from None


def _object_store(address: str, options: Mapping[str, Any], read_only: bool) -> RemoteStore:
    try:
        from obstore.store import from_url
    except ImportError:
        raise ValueError(f"{address}: got an address of an object store; `pip install obstore` reads it") from None
    own = dict(options)
    client = {**_CLIENT, **own.pop("client_options", {})}
    if "http://" in (address[:7], str(own.get("endpoint", os.environ.get("AWS_ENDPOINT_URL", "")))[:7]):
        client["allow_http"] = True
    options = {"client_options": client, "retry_config": _RETRIES, **own}
    try:
        store = from_url(address, **options)
    except Exception as error:  # obstore's own and ValueError
        raise ValueError(f"{address}: cannot be addressed so ({said_by(error)}); correct it or its options") from None
    kind = _WebServer if address.startswith("http") else RemoteStore
    return kind(store, read_only=read_only)


class _WebServer(RemoteStore):
    """A server of files, whose folders fsspec lists by the links on its pages, where it shows any."""

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        from fsspec.implementations.http import HTTPFileSystem

        files = HTTPFileSystem(asynchronous=True, skip_instance_cache=True)
        session = await files.set_session()
        try:
            for entry in await files._ls(f"{self.store.url}/{prefix}".rstrip("/") + "/", detail=False):
                yield entry.rstrip("/").rpartition("/")[2]
        except FileNotFoundError:
            return
        finally:
            await session.close()


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
    for document in (path / name for name in (*ZARR_MARKS, ".zattrs")):
        if document.is_file():
            try:
                check_size(document)
            except ValueError as error:
                raise ValueError(
                    f"{path}: got metadata that cannot be read ({error}); copy or write the store again"
                ) from None
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


_NOT_READ = ("uns", "obsm", "varm", "obsp", "varp")
_IN_PIECES = ("data", "indices")
"""Arrays of a sparse matrix that may be larger than memory; all others of one dimension are read whole."""

_OBJECT_CODECS = ("pickle", "json2", "msgpack2", "vlen-bytes", "vlen-array", "categorize")
"""Codecs of numcodecs that build Python objects; of them anndata writes vlen-utf8 alone, and pickle runs code."""

_STRING_BYTES = 16


@contextmanager
def reading(label: str, what: str = "something") -> Iterator[None]:
    """Turn a failure whose message does not name the file, which is a library's, into one that does, with a cure."""
    try:
        yield
    except Exception as error:  # those of HDF5, Zarr, anndata and codecs are of every kind
        is_ours = label in str(error) and isinstance(error, ValueError | RuntimeError)
        if is_ours or getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG):
            raise
        if remote := unreachable(label, error):
            raise remote from error
        raise ValueError(
            f"{label}: got {what} that cannot be read ({said_by(error)}); the file is damaged or was"
            f" written wrongly: copy it again, or write it again with a current anndata"
        ) from error


def check_foreign(root: Any, label: str) -> None:
    """Refuse links out of the file, codecs that build objects, and arrays declared larger than memory.

    Data in memory and servers that list no folders have nothing to look at.
    """
    if isinstance(root, h5py.Group):
        arrays = _hdf5_arrays(root, label)
    elif isinstance(root, zarr.Group):
        arrays = _zarr_arrays(root, label)
    else:
        return
    memory = _physical_memory()
    for name, array in arrays:
        if array.ndim != 1 or name.rpartition("/")[2] in _IN_PIECES:
            continue
        size = int(array.shape[0]) * max(_STRING_BYTES if array.dtype.hasobject else 1, array.dtype.itemsize)
        if size > memory:
            raise ValueError(
                f"{label}: got {array.shape[0]:,} declared elements in {name} ({size / 2**30:,.0f} GiB, this machine"
                f" has {memory / 2**30:,.0f}); the file is damaged or was written wrongly: write it again from its"
                f" source"
            )


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system without POSIX calls
        return 1 << 40


def _hdf5_arrays(root: h5py.Group, label: str) -> Iterator[tuple[str, h5py.Dataset]]:
    waiting, seen = [root], set()
    while waiting:
        group = waiting.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:  # links may form a ring
            continue
        seen.add(address)
        for key in group:
            if key in _NOT_READ:
                continue
            name = f"{group.name.rstrip('/')}/{key}".lstrip("/")
            link = group.get(key, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise ValueError(
                    f"{label}: got a link at {name} into another file ({link.filename}), which is not followed; read it"
                    f" with anndata and save it to one file"
                )
            element = group.get(key)
            if isinstance(element, h5py.Group):
                waiting.append(element)
            elif isinstance(element, h5py.Dataset):
                if element.external or element.is_virtual:
                    raise ValueError(
                        f"{label}: got an array at {name} whose values lie in another file, which is not read; read it"
                        f" with anndata and save it to one file"
                    )
                _check_chunks(element, label, name)
                yield name, element


def _check_chunks(array: h5py.Dataset, label: str, name: str) -> None:
    """Refuse an array of which chunks were never written: HDF5 would make up zeros, however many are declared."""
    if array.chunks is None or array.ndim != 1:
        return
    expected, written = -(-array.shape[0] // array.chunks[0]), array.id.get_num_chunks()
    if written < expected:
        raise ValueError(
            f"{label}: got {written} of {expected:,} chunks of {name}; the file is damaged or was not written to its"
            f" end: write it again from its source"
        )


def _zarr_arrays(root: zarr.Group, label: str) -> Iterator[tuple[str, zarr.Array]]:
    if not root.store.supports_listing and root.metadata.consolidated_metadata is None:
        return
    waiting = [("", root)]
    while waiting:
        at, group = waiting.pop()
        for key, element in group.members():
            if key in _NOT_READ:
                continue
            if isinstance(element, zarr.Group):
                waiting.append((f"{at}{key}/", element))
                continue
            filters = [codec.codec_id for codec in getattr(element.metadata, "filters", None) or ()]
            compressor = getattr(getattr(element.metadata, "compressor", None), "codec_id", None)
            refused = [codec for codec in (*filters, compressor) if codec in _OBJECT_CODECS]
            if refused:
                raise ValueError(
                    f"{label}: got the codec {refused[0]} at {at}{key}, which builds Python objects; of such"
                    f" only vlen-utf8 is read: write the file again with a current anndata"
                )
            yield f"{at}{key}", element


_SUFFIXES = {"AnnData": "h5ad", "MuData": "h5mu"}


def addresses(given: Any, what: str) -> list[str]:
    """A path or address, or several of them, as texts.

    Raises
    ------
    ValueError
        It is something else, such as an AnnData in memory.
    """
    several = list(given) if isinstance(given, Sequence | Iterator) and not isinstance(given, str) else [given]
    for one in several:
        if not isinstance(one, str | os.PathLike):
            refuse_data_in_memory(one, what)
            raise ValueError(f"{what}: got {one!r} ({type(one).__name__}); give the path or address of a file or store")
    return [str(one) for one in several]


def refuse_data_in_memory(given: Any, what: str) -> None:
    """Refuse an AnnData or MuData object.

    Raises
    ------
    ValueError
        It is one; the message says how to make a store of it.
    """
    # By name: neither library needs to be imported to know that it is not one of theirs.
    suffix = _SUFFIXES.get(type(given).__name__)
    if suffix is not None:
        raise ValueError(
            f"{what}: got an {type(given).__name__} in memory ({given.n_obs:,} cells); write it to a file, "
            f'data.write("data.{suffix}"), and make a store of that: ingest("data.{suffix}", out="data.zarr")'
        )
