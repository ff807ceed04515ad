"""Zarr stores: this package's own, and AnnData or MuData Zarr (format 2 or 3) that others wrote.

Reading goes through zarr-python, which reads every codec and every backend.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from loaders.csr import SparseRows
from loaders.durable import writing
from loaders.schema import SCHEMA_KEY, Schema
from loaders.stores import columns, embeddings, foreign
from loaders.stores.base import ObsColumn, check_embedding, describe_store
from loaders.stores.matrices import CsrMatrix, once
from loaders.stores.parts import ModalityPart
from loaders.stores.zarr_root import Source, describe_source, is_local, open_root

_log = logging.getLogger(__name__)


class ZarrStore:
    """A Zarr root as the loader's `Store`.

    Parameters
    ----------
    source
        Path, address, zarr store object or open group; see `zarr_root.open_root`.
    storage_options
        Options of fsspec for a remote address.
    modality
        Name of the one modality of an AnnData (rna, atac or adt). Without it: var["feature_types"] where there is
        one, which may split the columns into several modalities; else atac where features are named as intervals;
        else rna.
    layer
        Layer that holds the counts ("counts", or "raw" for AnnData's raw) instead of X. Not for this package's own
        stores.

    Raises
    ------
    ValueError
        Not a store, or one that cannot be streamed; the message says what to do.
    """

    def __init__(
        self,
        source: Source,
        *,
        storage_options: Mapping[str, Any] | None = None,
        modality: str | None = None,
        layer: str | None = None,
    ) -> None:
        self.uri = describe_source(source)
        self._source = source
        self._storage_options = storage_options
        self._root = open_root(source, storage_options=storage_options)
        if SCHEMA_KEY in self._root.attrs:
            if modality is not None or layer is not None:
                raise ValueError(
                    f"store {self.uri}: got modality={modality!r}, layer={layer!r} for a store made by"
                    f" `liam-scale ingest`, whose modalities and counts are fixed; leave both out"
                )
            self.schema = Schema.from_json(dict(self._root.attrs[SCHEMA_KEY]))
            self._parts = {name: _own_part(self._root, name, self.uri, self.schema) for name in self.schema.modalities}
            self._obs = foreign.ObsSource(self._root["obs"], {})
        else:
            derived = foreign.derive(self._root, self.uri, modality=modality, layer=layer)
            self.schema, self._parts, self._obs = derived.schema, derived.parts, derived.obs
        if not is_local(self._root):
            _log.info(
                "%s is read through zarr-python, as it is not on a local disk: slower than a local copy"
                " (every chunk is a request); copy it, or give the loader more memory so that reads are longer",
                self.uri,
            )

    __repr__ = describe_store

    @property
    def group(self) -> zarr.Group:
        """The root group, open for reading."""
        return self._root

    def arrays(self, modality: str) -> dict[str, zarr.Array] | None:
        """Data, indices and indptr of a modality whose rows are those of one csr_matrix on disk, else None.

        In a store that others wrote, columns may not ascend and values may have any type: `read_rows` mends both.
        """
        matrix = self._part(modality).matrix
        return matrix.arrays if isinstance(matrix, CsrMatrix) else None

    def cell_ids(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        return self._obs.ids(start, stop)

    def obs_column(self, name: str) -> ObsColumn:
        try:
            return self._obs.column(name)
        except KeyError:
            known = ", ".join(self.schema.obs_columns) or "none"
            raise ValueError(
                f"obs column: got {name!r}, which {self.uri} does not have; columns are: {known}"
            ) from None

    def feature_names(self, modality: str) -> npt.NDArray[np.str_]:
        return self._part(modality).feature_names()

    def modality_rows(self, modality: str) -> npt.NDArray[np.int64] | None:
        return self._part(modality).rows()

    def totals(self, modality: str) -> npt.NDArray[np.float64]:
        return self._part(modality).totals()

    def row_nonzeros(self, modality: str) -> npt.NDArray[np.int64]:
        return self._part(modality).matrix.indptr()

    def read_rows(self, modality: str, start: int, stop: int) -> SparseRows:
        matrix = self._part(modality).matrix
        if not 0 <= start <= stop <= matrix.num_rows:
            raise ValueError(f"{self.uri} {modality}: got rows {start}:{stop}; give rows within 0:{matrix.num_rows}")
        return matrix.read(start, stop)

    def write_embedding(
        self, name: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str] | None = None
    ) -> None:
        check_embedding(self, name, values)
        root = self._writable()
        try:
            with writing(f"{self.uri}/obsm/{name}", only_full=True):
                embeddings.write(root, name, values, attributes or {})
        except RuntimeError:
            raise
        except Exception as error:  # a backend's own: no permission, a server that takes no writes
            raise self._unwritable(error) from error

    def read_embedding(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return embeddings.read(self._reopened(), self.uri, name, start, stop)

    def embedding_attributes(self, name: str) -> list[dict[str, Any]]:
        return embeddings.attributes(self._reopened(), name)

    def obs_frame(self) -> pd.DataFrame:
        return self._obs.frame()

    def _part(self, modality: str) -> ModalityPart:
        if modality not in self._parts:
            raise ValueError(f"modality: got {modality!r}; {self.uri} holds {', '.join(self._parts)}")
        return self._parts[modality]

    def _reopened(self) -> zarr.Group:
        """The root as it stands now, embeddings that others wrote included."""
        return open_root(self._source, storage_options=self._storage_options)

    def _writable(self) -> zarr.Group:
        try:
            return open_root(self._source, storage_options=self._storage_options, mode="r+")
        except (ValueError, PermissionError, NotImplementedError) as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"store {self.uri}: cannot be written ({type(error).__name__}: {error});"
            f" make it writable, or write the embedding to a file instead"
        )


def _own_part(root: zarr.Group, name: str, uri: str, schema: Schema) -> ModalityPart:
    group = root["mod"][name]
    matrix = CsrMatrix(group["X"], f"{uri}/mod/{name}/X", is_ours=True)
    return ModalityPart(
        matrix=matrix,
        feature_names=once(lambda: columns.read_index(group["var"])),
        rows=once(lambda: None if matrix.num_rows == schema.num_cells else foreign.rows_of(root["obsmap"][name])),
        totals=once(lambda: np.asarray(group["obs"]["total_counts"][:]).astype(np.float64)),
    )
