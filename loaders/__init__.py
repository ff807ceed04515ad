"""Streams sparse multimodal single cells from stores into PyTorch; knows no model."""

from loaders.loader import Loader
from loaders.minibatch import Minibatch, SparseCounts
from loaders.stores import Store, open_store

__all__ = ["Loader", "Minibatch", "SparseCounts", "Store", "open_store"]
