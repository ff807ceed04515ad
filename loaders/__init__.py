"""Streams sparse multimodal single cells from stores into PyTorch; knows no model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loaders.formats.cache import use_cache
from loaders.options import LoaderConfig
from loaders.stores import Store, open_store

if TYPE_CHECKING:
    from loaders.loader import Loader
    from loaders.minibatch import Minibatch, SparseCounts

__all__ = ["Loader", "LoaderConfig", "Minibatch", "SparseCounts", "Store", "open_store", "use_cache"]

_ON_TORCH = {"Loader": "loaders.loader", "Minibatch": "loaders.minibatch", "SparseCounts": "loaders.minibatch"}
"""Imported when they are asked for: an ingest, which makes no minibatch, takes 180 MB less without torch."""


def __getattr__(name: str) -> Any:
    if name not in _ON_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_TORCH[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
