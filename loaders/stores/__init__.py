"""Stores: where cells are read from."""

from loaders.stores.base import ObsColumn, Store
from loaders.stores.embeddings import EMBEDDING_CHUNK_CELLS
from loaders.stores.open import open_store
from loaders.stores.zarr_store import ZarrStore

__all__ = ["EMBEDDING_CHUNK_CELLS", "ObsColumn", "Store", "ZarrStore", "open_store"]
