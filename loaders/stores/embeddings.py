"""Embeddings in obsm: of a Zarr store, put whole in the place of the old one; of data in memory; of TileDB-SOMA."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import h5py
import mudata
import numpy as np
import numpy.typing as npt
import zarr
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore

from loaders.durable import replacing, writing
from loaders.formats.damage import Damaged
from loaders.formats.root import Address, Root, describe_address, local_path, open_root
from loaders.formats.sealed import CODECS, open_sealed, seal
from loaders.formats.soma import SomaExperiment

CHUNK_CELLS = 8192


class ZarrEmbeddings:
    """The obsm of what stands at an address, opened anew each time, as others may write to it. HDF5 is only read.

    Parameters
    ----------
    address, storage_options
        As for `open_root`.
    """

    def __init__(self, address: Address, storage_options: Mapping[str, Any] | None) -> None:
        self._open = partial(open_root, address, storage_options=storage_options)
        self._uri = describe_address(address)

    def write(self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None:
        try:
            root = self._open(mode="r+")
        except (ValueError, PermissionError, NotImplementedError) as error:
            raise self._unwritable(error) from None
        try:
            with writing(f"{self._uri}/obsm/{name}", only_full=True):
                write(root, name, values, attributes)
        except RuntimeError:
            raise
        except Exception as error:  # a backend's own: no permission, a server that takes no writes
            raise self._unwritable(error) from error

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return read(self._sealed(), self._uri, name, start, stop)

    def names(self) -> list[str]:
        return _embeddings(self._open().get("obsm", {}))

    def attributes(self, name: str) -> list[dict[str, Any]]:
        return attributes(self._sealed(), self._uri, name)

    def _sealed(self) -> Root:
        root = self._open()
        is_sealed = isinstance(root, zarr.Group) and root.metadata.zarr_format == 3
        return open_sealed(root, self._uri, {}) if is_sealed else root

    def _unwritable(self, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"store {self._uri}: cannot be written ({type(error).__name__}: {error});"
            f" make it writable, or write the embedding to a file instead"
        )


class HeldEmbeddings:
    """The obsm of an AnnData or MuData in memory; what is said of an embedding stands in its uns."""

    def __init__(self, data: anndata.AnnData | mudata.MuData) -> None:
        self._data = data

    def write(self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None:
        self._data.obsm[name], self._data.uns[name] = np.asarray(values, np.float32), dict(attributes)

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return read({"obsm": self._data.obsm}, f"{type(self._data).__name__} in memory", name, start, stop)

    def names(self) -> list[str]:
        return _embeddings(self._data.obsm)

    def attributes(self, name: str) -> list[dict[str, Any]]:
        made = self._data.uns.get(name, {})
        return [dict(made) if isinstance(made, Mapping) else {}] if name in self._data.obsm else []


def _embeddings(obsm: Any) -> list[str]:
    """All but what MuData keeps there of each modality: which cells have it."""
    return sorted(name for name in obsm if getattr(getattr(obsm[name], "dtype", None), "kind", None) != "b")


def write(root: zarr.Group, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None:
    """Put (n, d) values into obsm[name], with attributes.

    On a local disk a reader finds the old embedding or the new one, whatever happens; elsewhere, where nothing can be
    renamed, the old one goes first.
    """
    obsm = root.require_group("obsm")
    if "encoding-type" not in obsm.attrs:
        obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    backend = obsm.store_path.store
    if isinstance(backend, LocalStore):
        folder = backend.root.resolve() / obsm.path
        with replacing(folder / name, hidden=_hidden(backend.root.resolve(), folder, name)) as path:
            _create(LocalStore(path), None, root.metadata.zarr_format, values, attributes)
    else:
        _create(backend, f"{obsm.path}/{name}", root.metadata.zarr_format, values, attributes)
    _consolidate_again(root)


def read(root: Mapping[str, Any] | zarr.Group, uri: str, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Rows [start, stop) of obsm[name].

    Raises
    ------
    ValueError
        There is no such array.
    RuntimeError
        It is damaged.
    """
    with _naming(uri, name):
        held = root.get("obsm", {})
        if name in held:
            return np.asarray(held[name][start:stop], dtype=np.float32)
    raise ValueError(
        f"obsm of {uri}: got {name!r}, it holds {', '.join(sorted(held)) or 'nothing'}; write the embedding first"
    )


def attributes(root: zarr.Group | h5py.File, uri: str, name: str) -> list[dict[str, Any]]:
    """Attributes of obsm[name], in uns[name] where it was written from memory; none where there is no such array."""
    with _naming(uri, name):
        held, of_memory = root.get("obsm", {}), root.get("uns", {})
        if name not in held:
            return []
        made = anndata.io.read_elem(of_memory[name]) if name in of_memory else None
        return [{**(made if isinstance(made, Mapping) else {}), **held[name].attrs}]


@contextmanager
def _naming(uri: str, name: str) -> Iterator[None]:
    """Where a library refuses an embedding, say which."""
    try:
        yield
    except Damaged:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise Damaged(uri, f"obsm/{name}", f"it cannot be read ({error})") from error


def _hidden(store: Path, obsm: Path, name: str) -> Path:
    """Beside the store, whose readers remark on folders they do not know; in obsm where that cannot be."""
    can = os.access(store.parent, os.W_OK) and store.parent.stat().st_dev == obsm.stat().st_dev
    return store.parent / f"{store.name}.obsm.{name}" if can else obsm / name


def _create(
    backend: Any, path: str | None, zarr_format: Any, values: npt.NDArray[np.float32], attributes: Mapping[str, str]
) -> None:
    is_sealed = zarr_format == 3
    array = zarr.create_array(
        backend,
        name=path,
        shape=values.shape,
        chunks=(CHUNK_CELLS, values.shape[1]),
        dtype=np.float32,
        fill_value=np.nan,
        compressors=CODECS["compressors"] if is_sealed else "auto",
        # Every chunk is there: one that is not has been lost.
        config={"write_empty_chunks": True},
        zarr_format=zarr_format,
        attributes={**attributes, "encoding-type": "array", "encoding-version": "0.2.0"},
        overwrite=True,
    )
    array[:] = np.ascontiguousarray(values, np.float32)
    if is_sealed:
        seal(array)


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


class SomaEmbeddings:
    """The obsm of an experiment's first measurement: sparse arrays (joinid, dimension) of every value of the cells."""

    def __init__(self, experiment: SomaExperiment) -> None:
        self._held, self._soma, self._home = experiment, experiment.soma, experiment.home
        self._open = partial(experiment.soma.open, context=experiment.context)

    def write(self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None:
        """Put (n, d) values into obsm[name], a new array whose metadata take attributes.

        The array is whole before obsm names it. TileDB-SOMA cannot replace a name in one step: between the old array
        and the new, a reader finds none for some milliseconds.
        """
        try:
            with writing(f"{self._held.uri}/obsm/{name}"):
                self._replace(name, values, attributes)
        except self._soma.SOMAError as error:
            raise RuntimeError(
                f"store {self._held.uri}: cannot be written ({error}); make it writable, or write the embedding to a"
                f" file instead"
            ) from error

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """(m, d) values of the cells [start, stop); a cell that was never written is NaN."""
        joinids = self._held.joinids[start:stop]
        with self._open(self._home) as group:
            held = list(group["obsm"].keys()) if "obsm" in group else []
            if name not in held:
                raise ValueError(
                    f"{self._home}/obsm: got {name!r}, it holds {', '.join(sorted(held)) or 'nothing'};"
                    f" write the embedding first, or name one of these"
                )
            array = group["obsm"][name]
            values = np.full((len(joinids), array.shape[1]), np.nan, np.float32)
            if not len(joinids):
                return values
            for table in array.read((slice(int(joinids[0]), int(joinids[-1])),)).tables():
                cells, dimensions = table["soma_dim_0"].to_numpy(), table["soma_dim_1"].to_numpy()
                rows = np.searchsorted(joinids, cells)
                wanted = joinids[rows] == cells
                values[rows[wanted], dimensions[wanted]] = table["soma_data"].to_numpy()[wanted]
        return values

    def names(self) -> list[str]:
        with self._open(self._home) as group:
            return sorted(group["obsm"].keys()) if "obsm" in group else []

    def attributes(self, name: str) -> list[dict[str, Any]]:
        """Metadata of obsm[name]; none where there is no such array."""
        with self._open(self._home) as group:
            is_there = "obsm" in group and name in group["obsm"]
            return [dict(group["obsm"][name].metadata)] if is_there else []

    def _replace(self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None:
        obsm, num_rows, old = self._look(name)
        new = f"{obsm}/{name}-{secrets.token_hex(4)}"
        try:
            self._create(new, num_rows, values, attributes)
        except BaseException:
            _remove(new)
            raise
        if old is not None:
            with self._open(obsm, "d") as group:
                del group[name]
        with self._open(new) as array, self._open(obsm, "w") as group:
            group.set(name, array, use_relative_uri=True)
        if old is not None:
            _remove(old)

    def _look(self, name: str) -> tuple[str, int, str | None]:
        """Address of obsm, which is made where it is missing; cells of the measurement; address of obsm[name]."""
        with self._open(self._home) as group:
            num_rows = max(int(group["X"][layer].shape[0]) for layer in group["X"])
            if "obsm" in group:
                obsm = group["obsm"]
                return str(obsm.uri).rstrip("/"), num_rows, str(obsm[name].uri) if name in obsm else None
        with self._open(self._home, "w") as group:
            return str(group.add_new_collection("obsm").uri).rstrip("/"), num_rows, None

    def _create(self, uri: str, num_rows: int, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None:
        import pyarrow

        width = values.shape[1]
        entries = {
            "soma_dim_0": np.repeat(self._held.joinids, width),
            "soma_dim_1": np.tile(np.arange(width, dtype=np.int64), len(values)),
            "soma_data": np.ascontiguousarray(values, np.float32).ravel(),
        }
        shape, context = (num_rows, width), self._held.context
        with self._soma.SparseNDArray.create(uri, type=pyarrow.float32(), shape=shape, context=context) as array:
            array.write(pyarrow.table(entries))
            array.metadata.update(attributes)


def _remove(uri: str) -> None:
    """Remove an array that obsm does not name, where it stands on a local disk."""
    path = local_path(uri)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
