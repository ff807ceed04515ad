"""The cells that are evaluated, and what is read of them: a seeded draw from a store or from data in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anndata
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse

from loaders.schema import MODALITIES
from loaders.stores.base import ObsColumn, Store

_BLOCK_CELLS = 256
"""Cells drawn together from a shuffled store: about one chunk, so that a draw reads what it needs and no more."""

_EMBEDDING_CELLS = 65_536
"""Cells whose embedding is read at a time."""


@dataclass(frozen=True)
class Source:
    """Data that can be evaluated: a store on disk, or an AnnData or MuData in memory."""

    name: str
    num_cells: int
    modalities: tuple[str, ...]
    is_shuffled: bool
    store: Store | None = None
    data: anndata.AnnData | mudata.MuData | None = None

    @classmethod
    def of_store(cls, store: Store) -> Source:
        schema = store.schema
        return cls(str(store.uri), schema.num_cells, tuple(schema.modalities), schema.is_shuffled, store=store)

    @classmethod
    def of_memory(cls, data: anndata.AnnData | mudata.MuData, *, name: str = "data in memory") -> Source:
        if isinstance(data, mudata.MuData):
            modalities = tuple(m for m in MODALITIES if m in data.mod)
        else:
            modalities = ("rna",) if data.X is not None and data.n_vars else ()
        return cls(name, data.n_obs, modalities, False, data=data)

    def obs_column(self, name: str, option: str) -> ObsColumn:
        """A column as codes; ValueError that names the option where there is none."""
        try:
            if self.store is not None:
                return self.store.obs_column(name)
            assert self.data is not None
            values = pd.Categorical(self.data.obs[name])
        except (KeyError, ValueError):
            known = self.store.schema.obs_columns if self.store is not None else self._memory_columns()
            columns = ", ".join(known) or "none"
            raise ValueError(
                f"{option}: got {name!r}, which {self.name} does not have; its columns are: {columns}"
            ) from None
        return ObsColumn(np.asarray(values.codes, np.int32), tuple(str(c) for c in values.categories))

    def embedding(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(m, d) rows of obsm[name].

        Raises
        ------
        ValueError
            There is no such embedding, or it is not complete at these cells.
        """
        if self.store is not None:
            values = _read_embedding(self.store, name, rows)
        else:
            assert self.data is not None
            if name not in self.data.obsm:
                raise ValueError(
                    f"--embedding: obsm of {self.name}: got {name!r}, it holds"
                    f" {', '.join(sorted(self.data.obsm)) or 'nothing'}; name one that is there"
                )
            values = np.asarray(np.asarray(self.data.obsm[name])[rows], np.float32)
        missing = int((~np.isfinite(values)).any(axis=1).sum())
        if missing:
            raise ValueError(
                f"--embedding: obsm[{name!r}] of {self.name} is not finite in {missing} of {len(rows)} cells looked at;"
                f" the embedding was interrupted: run the same embed command again"
            )
        return values

    def counts(
        self, modality: str, rows: npt.NDArray[np.int64]
    ) -> tuple[scipy.sparse.csr_matrix, npt.NDArray[np.bool_]]:
        """(m, F) float32 counts, empty where a cell lacks the modality, and (m,) whether it has it; rows ascend."""
        if self.data is not None:
            return _counts_in_memory(self.data, modality, rows)
        assert self.store is not None
        within = self.store.modality_rows(modality)
        places = rows if within is None else np.asarray(within[rows], np.int64)
        present = places >= 0
        return _read_scattered(self.store, modality, places[present], present), present

    def presence(self, modality: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(m,) whether each of the cells has the modality."""
        if isinstance(self.data, mudata.MuData):
            return self.data.mod[modality].obs_names.get_indexer(self.data.obs_names[rows]) >= 0
        within = self.store.modality_rows(modality) if self.store is not None else None
        return np.ones(len(rows), bool) if within is None else np.asarray(within[rows]) >= 0

    def _memory_columns(self) -> list[str]:
        assert self.data is not None
        return [str(column) for column in self.data.obs.columns]


def draw_rows(
    candidates: npt.NDArray[np.bool_], *, max_cells: int, seed: int, by_blocks: bool
) -> npt.NDArray[np.int64]:
    """Ascending rows of at most `max_cells` candidates, the same for the same seed.

    With `by_blocks`, whole blocks of 256 neighbours: as good as single cells where the cells stand in random order,
    and the only draw that does not read a large store from end to end.
    """
    rows = np.flatnonzero(candidates)
    if len(rows) <= max_cells:
        return rows
    rng = np.random.default_rng((seed, 0x6576616C))
    if not by_blocks:
        return np.sort(rng.choice(rows, max_cells, replace=False))
    num_blocks = -(-len(candidates) // _BLOCK_CELLS)
    order = rng.permutation(num_blocks)
    rank = np.empty(num_blocks, np.int64)
    rank[order] = np.arange(num_blocks)
    by_rank = rows[np.argsort(rank[rows // _BLOCK_CELLS], kind="stable")]
    return np.sort(by_rank[:max_cells])


def modalities_of_cells(presence: Mapping[str, npt.NDArray[np.bool_]]) -> ObsColumn:
    """Which modalities each cell has, as a column: "RNA", "ADT", "RNA + ADT"."""
    names = list(presence)
    bits = sum((presence[name].astype(np.int32) << i for i, name in enumerate(names)), np.int32(0))
    values, codes = np.unique(bits, return_inverse=True)
    titles = [" + ".join(name.upper() for i, name in enumerate(names) if v >> i & 1) or "none" for v in values.tolist()]
    return ObsColumn(codes.astype(np.int32), tuple(titles))


def read_in_memory(path: Path) -> anndata.AnnData | mudata.MuData:
    """A whole h5ad or h5mu file."""
    if path.suffix == ".h5ad":
        return anndata.read_h5ad(path)
    with mudata.set_options(pull_on_update=False):
        return mudata.read_h5mu(path)


def _read_embedding(store: Store, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(m, d) ascending rows of an embedding, block by block."""
    blocks = np.split(rows, np.flatnonzero(np.diff(rows // _EMBEDDING_CELLS)) + 1)
    try:
        return np.concatenate(
            [store.read_embedding(name, int(b[0]), int(b[-1]) + 1)[b - b[0]] for b in blocks if len(b)]
        )
    except ValueError as error:
        raise ValueError(f"--embedding: {error}") from error


def _read_scattered(
    store: Store, modality: str, places: npt.NDArray[np.int64], present: npt.NDArray[np.bool_]
) -> scipy.sparse.csr_matrix:
    """(m, F) ascending rows of a modality at the cells that have it, empty ones elsewhere.

    Read by blocks of which only the wanted rows are kept, into memory that is allocated once.
    """
    offsets = store.row_nonzeros(modality)
    indptr = _offsets(offsets[places + 1] - offsets[places], present)
    indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    filled = 0
    for block in np.split(places, np.flatnonzero(np.diff(places // _BLOCK_CELLS)) + 1) if len(places) else []:
        start, stop = int(block[0]), int(block[-1]) + 1
        read = store.read_rows(modality, start, stop).to_scipy()
        wanted = read if len(block) == stop - start else read[block - start]
        entries = slice(filled, filled + wanted.nnz)
        indices[entries], values[entries] = wanted.indices, wanted.data
        filled += wanted.nnz
    num_features = store.schema.modalities[modality].num_features
    return scipy.sparse.csr_matrix((values, indices, indptr), shape=(len(present), num_features))


def _offsets(lengths: npt.NDArray[np.integer], present: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """indptr of rows of these lengths where they are present, and empty rows between them."""
    all_lengths = np.zeros(len(present), np.int64)
    all_lengths[present] = lengths
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(all_lengths)])


def _counts_in_memory(
    data: anndata.AnnData | mudata.MuData, modality: str, rows: npt.NDArray[np.int64]
) -> tuple[scipy.sparse.csr_matrix, npt.NDArray[np.bool_]]:
    if isinstance(data, anndata.AnnData):
        return scipy.sparse.csr_matrix(data.X[rows], dtype=np.float32), np.ones(len(rows), bool)
    part = data.mod[modality]
    places = part.obs_names.get_indexer(data.obs_names[rows])
    present = places >= 0
    picked = scipy.sparse.csr_matrix(part.X[places[present]], dtype=np.float32)
    indptr = _offsets(np.diff(picked.indptr), present)
    shape = (len(rows), picked.shape[1])
    return scipy.sparse.csr_matrix((picked.data, picked.indices, indptr), shape=shape), present
