"""Stores: where cells are read from."""

from loaders.schema import ObsColumn
from loaders.stores.base import Store, cell_totals
from loaders.stores.chained_store import ChainedStore
from loaders.stores.matched_store import MatchedStore
from loaders.stores.open import open_store
from loaders.stores.whole import read_store

__all__ = [
    "ChainedStore",
    "MatchedStore",
    "ObsColumn",
    "Store",
    "cell_totals",
    "open_store",
    "read_store",
]
