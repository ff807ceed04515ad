"""liam-scale: multimodal single-cell integration for data that does not fit in memory."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liam_scale.api import Run, ingest, load_run, train

__all__ = ["Run", "ingest", "load_run", "train"]


class _Package(ModuleType):
    """`liam_scale.train` is the function, also after the module of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # Handed on when first used: importing the package stays free of torch, and `python -m liam_scale.train` finds
    # its module not yet imported.
    if name not in __all__:
        raise AttributeError(f"module 'liam_scale' has no attribute {name!r}")
    from liam_scale import api

    return getattr(api, name)
