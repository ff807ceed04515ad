"""What the loader reads from: per modality a reader, the rows' offsets and which cells have it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loaders.buffers import Pool
from loaders.readers import open_reader
from loaders.stores.base import Store
from loaders.windows import ModalitySource


def open_sources(store: Store, modalities: Sequence[str] | None = None) -> dict[str, ModalitySource]:
    """One source per modality, in the order of the schema.

    Raises
    ------
    ValueError
        A modality the store does not have.
    """
    known = store.schema.modalities
    for name in modalities or ():
        if name not in known:
            raise ValueError(f"modalities: got {name!r}; {store.uri} holds {', '.join(known)}")
    return {name: open_source(store, name) for name in known if modalities is None or name in modalities}


def open_source(store: Store, modality: str) -> ModalitySource:
    """Source of one modality, by the fastest reader that knows its format."""
    schema = store.schema.modalities[modality]
    rows = store.modality_rows(modality)
    return ModalitySource(
        name=modality,
        reader=open_reader(store, modality),
        rows=None if rows is None else rows.astype(np.int32),
        num_features=schema.num_features,
        nonzeros_per_cell=schema.num_nonzeros / max(1, store.schema.num_cells),
        indices_pool=Pool(),
        values_pool=Pool(),
    )
