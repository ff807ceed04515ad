"""The cells that are evaluated, and what is read of them: a seeded draw from a store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import scipy.sparse

from loaders.stores.base import ObsColumn, Store

_BLOCK_CELLS = 256
"""Cells drawn together from a shuffled store: about one chunk, so that a draw reads what it needs and no more."""

_EMBEDDING_CELLS = 65_536
"""Cells whose embedding is read at a time."""


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
    rank = rng.permutation(-(-len(candidates) // _BLOCK_CELLS))
    by_rank = rows[np.argsort(rank[rows // _BLOCK_CELLS], kind="stable")]
    return np.sort(by_rank[:max_cells])


def read_column(store: Store, name: str, *, option: str) -> ObsColumn:
    """An obs column as codes; ValueError that names the option where there is none."""
    try:
        return store.obs_column(name)
    except ValueError:
        columns = ", ".join(store.schema.obs_columns) or "none"
        raise ValueError(
            f"{option}: got {name!r}, which {store.uri} does not have; its columns are: {columns}"
        ) from None


def read_embedding(store: Store, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(m, d) ascending rows of obsm[name], block by block.

    Raises
    ------
    ValueError
        There is no such embedding, or it is not complete at these cells.
    """
    blocks = _blocks(rows, _EMBEDDING_CELLS)
    try:
        read = [store.read_embedding(name, int(b[0]), int(b[-1]) + 1)[b - b[0]] for b in blocks]
    except ValueError as error:
        raise ValueError(f"--embedding: {error}") from error
    values = np.concatenate(read)
    missing = int((~np.isfinite(values)).any(axis=1).sum())
    if missing:
        raise ValueError(
            f"--embedding: obsm[{name!r}] of {store.uri} is not finite in {missing} of {len(rows)} cells looked at;"
            f" the embedding was interrupted: run the same embed command again"
        )
    return values


def modality_places(store: Store, modality: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(m,) row of each of the cells in the modality's matrix, -1 where it lacks the modality."""
    within = store.modality_rows(modality)
    return rows if within is None else np.asarray(within[rows], np.int64)


def read_counts(store: Store, modality: str, places: npt.NDArray[np.int64]) -> scipy.sparse.csr_matrix:
    """(m, F) float32 counts at ascending places, empty where a place is -1.

    Read by blocks of which only the wanted rows are kept.
    """
    present = np.flatnonzero(places >= 0)
    picked = [
        store.read_rows(modality, int(b[0]), int(b[-1]) + 1).to_scipy()[b - b[0]]
        for b in _blocks(places[present], _BLOCK_CELLS)
    ]
    num_features = store.schema.modalities[modality].num_features
    if not picked:
        return scipy.sparse.csr_matrix((len(places), num_features), dtype=np.float32)
    together = scipy.sparse.vstack(picked, format="csr")
    lengths = np.zeros(len(places), np.int64)
    lengths[present] = np.diff(together.indptr)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return scipy.sparse.csr_matrix((together.data, together.indices, indptr), shape=(len(places), num_features))


def modalities_of_cells(places: Mapping[str, npt.NDArray[np.int64]], num_cells: int) -> ObsColumn:
    """Which modalities each cell has, as a column: "RNA", "ADT", "RNA + ADT"."""
    names = list(places)
    bits = sum(((places[name] >= 0).astype(np.int32) << i for i, name in enumerate(names)), np.zeros(num_cells, int))
    values, codes = np.unique(bits, return_inverse=True)
    titles = [" + ".join(name.upper() for i, name in enumerate(names) if v >> i & 1) or "none" for v in values.tolist()]
    return ObsColumn(codes.astype(np.int32), tuple(titles))


def _blocks(rows: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    """Ascending rows by the block of `size` in which they lie."""
    return np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1) if len(rows) else []
