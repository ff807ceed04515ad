"""Embeddings in obsm of a measurement of a TileDB-SOMA experiment: sparse arrays (joinid, dimension) of every value."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.durable import writing
from loaders.formats.root import local_path
from loaders.formats.soma import SomaExperiment


class SomaEmbeddings:
    """The obsm of an experiment's first measurement, at the joinids of the chosen cells."""

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
