"""Streams sparse multimodal single cells from stores into PyTorch; knows no model."""

from loaders.loader import Loader
from loaders.minibatch import Minibatch, SparseCounts
from loaders.stores import Store, iterate_rows, open_store

__all__ = ["Loader", "Minibatch", "SparseCounts", "Store", "iterate_rows", "open_store"]
