"""Stores: where cells are read from."""

from loaders.schema import ObsColumn
from loaders.stores.base import Store, cell_totals
from loaders.stores.chosen import choose
from loaders.stores.open import open_known, open_store, read_store
from loaders.stores.views import ChainedStore, MatchedStore

__all__ = [
    "ChainedStore",
    "MatchedStore",
    "ObsColumn",
    "Store",
    "cell_totals",
    "choose",
    "open_known",
    "open_store",
    "read_store",
]
