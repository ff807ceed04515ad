"""Writing an embedding into obsm of a Zarr store, from several threads, processes and machines."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore

from loaders.machine import HAS_FILE_LOCKS, lock

EMBEDDING_CHUNK_CELLS = 8192
"""Cells of one chunk. Writers whose ranges begin and end at multiples of it never touch each other's files."""


def write(
    root: zarr.Group,
    uri: str,
    name: str,
    start: int,
    values: npt.NDArray[np.float32],
    num_cells: int,
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Put (m, d) values into obsm[name] at the rows [start, start + m); the array is created, with attributes, when it
    is missing.

    Ranges that do not cover whole chunks are read, changed and written under a lock of the folder, which processes on
    one machine respect; on a remote store only whole chunks may be written by several processes.

    Raises
    ------
    ValueError
        The range lies outside the cells, or obsm[name] exists with another width.
    """
    stop = start + len(values)
    if values.ndim != 2 or start < 0 or stop > num_cells:
        raise ValueError(
            f"obsm[{name!r}] of {uri}: got values of shape {values.shape} at cell {start}; give (cells, width) within"
            f" {num_cells} cells"
        )
    array = _open_or_create(root, name, (num_cells, values.shape[1]), attributes or {})
    if array.shape != (num_cells, values.shape[1]):
        raise ValueError(
            f"obsm[{name!r}] of {uri}: got an embedding of width {values.shape[1]} where one of shape {array.shape}"
            f" stands; use another name, or remove the old one first (drop_embedding)"
        )
    chunk = array.chunks[0]
    covers_chunks = start % chunk == 0 and (stop % chunk == 0 or stop == num_cells)
    with contextlib.nullcontext() if covers_chunks else _folder_lock(array):
        array[start:stop] = np.ascontiguousarray(values, np.float32)


def read(root: zarr.Group, uri: str, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Rows [start, stop) of obsm[name].

    Raises
    ------
    ValueError
        There is no such array.
    """
    held = root.get("obsm", {})
    if name not in held:
        raise ValueError(
            f"obsm of {uri}: got {name!r}, it holds {', '.join(sorted(held)) or 'nothing'};"
            " write the embedding first: python -m liam_scale.embed RUN"
        )
    return np.asarray(held[name][start:stop], dtype=np.float32)


def attributes(root: zarr.Group, name: str) -> list[dict[str, Any]]:
    """Attributes of obsm[name]; none where there is no such array."""
    held = root.get("obsm", {})
    return [dict(held[name].attrs)] if name in held else []


def drop(root: zarr.Group, name: str) -> None:
    """Remove obsm[name] where it exists."""
    if "obsm" in root and name in root["obsm"]:
        del root["obsm"][name]
        _consolidate_again(root)


def _open_or_create(root: zarr.Group, name: str, shape: tuple[int, int], own: Mapping[str, str]) -> zarr.Array:
    obsm = root.require_group("obsm")
    if "encoding-type" not in obsm.attrs:
        obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    if name in obsm:
        return obsm[name]
    try:
        array = obsm.create_array(
            name,
            shape=shape,
            chunks=(EMBEDDING_CHUNK_CELLS, shape[1]),
            dtype=np.float32,
            fill_value=np.nan,
            attributes={**own, "encoding-type": "array", "encoding-version": "0.2.0"},
        )
    except (zarr.errors.ContainsArrayError, FileExistsError):  # another process made it a moment ago
        return obsm[name]
    _consolidate_again(root)
    return array


def _consolidate_again(root: zarr.Group) -> None:
    """Renew consolidated metadata of the group and those above it where there are any: readers look nowhere else."""
    parts = root.path.split("/") if root.path else []
    for path in ("/".join(parts[:depth]) for depth in range(len(parts) + 1)):
        try:
            zarr.open_consolidated(root.store_path.store, path=path or None, mode="r")
        except (ValueError, FileNotFoundError, KeyError):
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata", category=ZarrUserWarning)
            zarr.consolidate_metadata(root.store_path.store, path=path or None)


@contextlib.contextmanager
def _folder_lock(array: zarr.Array) -> Iterator[None]:
    """Exclusive lock of an array's folder on a local disk; nothing elsewhere."""
    backend = array.store_path.store
    # Without locks (Windows) ranges must be whole chunks, which those of the embed command are.
    if not HAS_FILE_LOCKS or not isinstance(backend, LocalStore):
        yield
        return
    descriptor = os.open(backend.root / array.path, os.O_RDONLY)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)
