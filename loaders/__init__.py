"""Streams sparse multimodal single cells from stores into PyTorch; knows no model."""

from loaders.formats.cache import use_cache
from loaders.loader import Loader
from loaders.minibatch import Minibatch, SparseCounts
from loaders.options import LoaderConfig
from loaders.stores import Store, open_store

__all__ = ["Loader", "LoaderConfig", "Minibatch", "SparseCounts", "Store", "open_store", "use_cache"]
