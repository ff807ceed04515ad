"""The cells that are evaluated: a seeded draw from a store, what is read of them, and the baseline of their counts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse

from loaders.csr import centred_log_ratio, offsets_of
from loaders.modalities import Kind
from loaders.stores import ObsColumn, Store

_log = logging.getLogger(__name__)

_BLOCK_CELLS = 256
"""Cells drawn together from a shuffled store: about one chunk, so that a draw reads what it needs and no more."""

_EMBEDDING_CELLS = 65_536
"""Cells whose embedding is read at a time."""


def draw_cells(
    store: Store, columns: Mapping[str, ObsColumn], *, max_cells: int, num_draws: int, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Rows of the cells that have every column: all of them, or several draws in proportion to the columns' values.

    Raises
    ------
    ValueError
        Fewer than three cells have every column.
    """
    codes = np.stack([np.asarray(column.codes) for column in columns.values()], axis=1)
    known = np.asarray((codes >= 0).all(axis=1))
    num_known = int(known.sum())
    if num_known < 3:
        raise ValueError(
            f"{' and '.join(columns)}: got values in {num_known} of {len(known)} cells of {store.uri};"
            " at least 3 are needed to score an embedding"
        )
    if num_known < len(known):
        missing = f"{len(known) - num_known:,} of {len(known):,}"
        _log.info("%s cells have no %s and are left out", missing, " or ".join(columns))
    inverse = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)  # NumPy 2.0.0 keeps the shape of codes
    strata = np.where(known, inverse, -1)
    return [
        draw_rows(strata, max_cells=max_cells, seed=seed, by_blocks=store.schema.is_shuffled, draw=draw)
        for draw in range(num_draws if num_known > max_cells else 1)
    ]


def draw_rows(
    strata: npt.NDArray[np.integer], *, max_cells: int, seed: int, by_blocks: bool, draw: int = 0
) -> npt.NDArray[np.int64]:
    """Ascending rows of at most `max_cells` cells, the same for the same seed and draw.

    Parameters
    ----------
    strata
        (n,) codes of which each is drawn in proportion to its cells; cells of a negative one are left out.
    by_blocks
        Whole blocks of 256 neighbours first: as good as single cells where the cells stand in random order, and the
        only draw that does not read a large store from end to end.
    """
    rows = np.flatnonzero(strata >= 0)
    if len(rows) <= max_cells:
        return rows
    rng = np.random.default_rng((seed, 0x6576616C, draw))
    size = _BLOCK_CELLS if by_blocks else 1
    rank = rng.permutation(-(-len(strata) // size))[rows // size]
    _, codes, counts = np.unique(strata[rows], return_inverse=True, return_counts=True)
    order = np.lexsort((rank, codes))
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Rounding the running sum, not each quota, keeps the sum at max_cells.
    quotas = np.diff(np.rint(np.cumsum(counts) * (max_cells / len(rows))), prepend=0)
    return np.sort(rows[order[within < np.repeat(quotas, counts)]])


def read_column(store: Store, name: str, *, option: str) -> ObsColumn:
    """An obs column as codes; ValueError that names the option where it cannot be."""
    try:
        return store.obs_column(name)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


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
    matrix = store.matrix(modality)
    picked = [
        matrix.read(int(b[0]), int(b[-1]) + 1).to_scipy()[b - b[0]] for b in _blocks(places[present], _BLOCK_CELLS)
    ]
    num_features = store.schema.modalities[modality].num_features
    if not picked:
        return scipy.sparse.csr_matrix((len(places), num_features), dtype=np.float32)
    together = scipy.sparse.vstack(picked, format="csr")
    lengths = np.zeros(len(places), np.int64)
    lengths[present] = np.diff(together.indptr)
    parts = (together.data, together.indices, offsets_of(lengths))
    return scipy.sparse.csr_matrix(parts, shape=(len(places), num_features))


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


NUM_COMPONENTS = 20
"""As many as liam's latent dimensions by default."""

TARGET_SUM = 1_000.0
"""Counts that every cell is scaled to in a modality before the logarithm."""


def normalised(
    kind: Kind, counts: scipy.sparse.csr_matrix, *, target_sum: float = TARGET_SUM
) -> scipy.sparse.csr_matrix:
    """The centred log-ratio of ADT and what is taken as it, else log(1 + target_sum * share); absent counts stay zeros.
    float32."""
    from sklearn.preprocessing import normalize

    if kind.transform == "clr":
        ratios = scipy.sparse.csr_matrix(counts, dtype=np.float32, copy=True)
        centred_log_ratio(ratios.indptr, ratios.data, counts.shape[1])
        return ratios
    shares = normalize(scipy.sparse.csr_matrix(counts, dtype=np.float32), norm="l1")
    shares.data = np.log1p(target_sum * shares.data, dtype=np.float32)
    return shares


def principal_components(
    blocks: Sequence[scipy.sparse.csr_matrix], *, num_components: int = NUM_COMPONENTS
) -> npt.NDArray[np.float32]:
    """(n, d) scores of the centred matrix whose columns are those of all blocks, largest variance first.

    Raises
    ------
    ValueError
        Fewer than two cells or features.
    """
    from sklearn.decomposition import PCA

    together = scipy.sparse.hstack(blocks, format="csr")
    width = min(num_components, *(size - 1 for size in together.shape))
    if width < 1:
        raise ValueError(
            f"baseline: got {together.shape[0]} cells x {together.shape[1]} features; give at least 2 of each"
        )
    # ARPACK centres a sparse matrix without making it dense.
    return PCA(width, svd_solver="arpack", random_state=0).fit_transform(together).astype(np.float32)
