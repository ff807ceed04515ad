"""What a file of others declares, looked at before anything of it is read: links, codecs, sizes; and its failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import zarr

_NOT_READ = ("uns", "obsm", "varm", "obsp", "varp")
_IN_PIECES = ("data", "indices")
"""Arrays of a sparse matrix that may be larger than memory; all others of one dimension are read whole."""

_OBJECT_CODECS = ("pickle", "json2", "msgpack2", "vlen-bytes", "vlen-array", "categorize")
"""Codecs of numcodecs that build Python objects; of them anndata writes vlen-utf8 alone, and pickle runs code."""

_STRING_BYTES = 16


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn a failure whose message does not name the file, which is a library's, into one that does, with a cure."""
    try:
        yield
    except Exception as error:  # those of HDF5, Zarr, anndata and codecs are of every kind
        is_ours = label in str(error) and isinstance(error, ValueError | RuntimeError)
        if is_ours or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(
            f"{label}: got something that cannot be read ({type(error).__name__}: {error}); the file is damaged or was"
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
