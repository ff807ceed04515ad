"""Stores: where cells are read from."""

from loaders.stores.base import ObsColumn, Store
from loaders.stores.chained_store import ChainedStore
from loaders.stores.iterate import iterate_rows
from loaders.stores.matched_store import MatchedStore
from loaders.stores.open import open_store
from loaders.stores.soma_store import SomaStore
from loaders.stores.whole import read_store
from loaders.stores.zarr_store import ZarrStore

__all__ = [
    "ChainedStore",
    "MatchedStore",
    "ObsColumn",
    "SomaStore",
    "Store",
    "ZarrStore",
    "iterate_rows",
    "open_store",
    "read_store",
]
