"""A whole modality of a store, in order: what an ingest or a pass for statistics reads."""

from __future__ import annotations

from collections.abc import Iterator

from loaders.csr import SparseRows
from loaders.stores.base import Store

_ENTRY_BYTES = 40
"""Peak bytes of an entry while it is read: 20 as TileDB-SOMA hands it out, and the compressed rows twice."""


def iterate_rows(store: Store, modality: str, *, memory: int = 256 << 20) -> Iterator[tuple[int, SparseRows]]:
    """All rows of a modality in their order, as (first row, rows).

    Parameters
    ----------
    memory
        Bytes that one read may take; at least what the store decodes together (`row_alignment`) is read.
    """
    held = store.schema.modalities[modality]
    alignment = getattr(store, "row_alignment", 1)
    step = int(memory / _ENTRY_BYTES / max(1.0, held.nonzeros_per_cell))
    step = max(1, step // alignment) * alignment
    for start in range(0, held.num_cells, step):
        yield start, store.read_rows(modality, start, min(start + step, held.num_cells))
