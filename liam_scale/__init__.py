"""liam-scale: multimodal single-cell integration for data that does not fit in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liam_scale.api import Run, ingest, load_run
    from liam_scale.api import train as train

__all__ = ["Run", "ingest", "load_run", "train"]


def __getattr__(name: str) -> Any:
    # Handed on when first used: importing the package stays free of torch, and `python -m liam_scale.train` finds
    # its module not yet imported.
    if name not in __all__:
        raise AttributeError(f"module 'liam_scale' has no attribute {name!r}")
    from liam_scale import api

    globals().update({own: getattr(api, own) for own in __all__})
    return globals()[name]
