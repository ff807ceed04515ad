"""liam-scale: multimodal single-cell integration for data that does not fit in memory."""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata, util
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liam_scale.api import (
        Callback,
        Run,
        append,
        check,
        evaluate,
        features,
        ingest,
        load_run,
        merge,
        open_store,
        read_store,
        train,
    )

__all__ = [
    "Callback",
    "Run",
    "append",
    "check",
    "evaluate",
    "features",
    "ingest",
    "load_run",
    "merge",
    "open_store",
    "read_store",
    "train",
]


class _Package(ModuleType):
    """`liam_scale.train` is the function, also after the module of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _check_loaders() -> None:
    """The second package of this distribution has a common name: say so where another one stands before it."""
    spec = util.find_spec("loaders")
    found = "nothing" if spec is None else spec.origin or ", ".join(spec.submodule_search_locations or ())
    own = os.path.join(os.path.dirname(os.path.dirname(__file__)), "loaders", "__init__.py")
    if not (os.path.exists(own) and os.path.exists(found) and os.path.samefile(own, found)):
        raise ImportError(
            f"liam_scale needs its own package loaders ({own}), but `import loaders` finds {found}; rename that one, "
            "start Python in another folder, or put it behind the installed packages on sys.path"
        )


_check_loaders()

if "RANK" in os.environ:
    # torch reads this once, when it is imported; of a rank that is lost, `training.watch` tells.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def __getattr__(name: str) -> Any:
    # Handed on when first used: importing the package stays free of torch, and `python -m liam_scale.train` finds
    # its module not yet imported.
    if name == "__version__":
        return metadata.version("liam-scale")
    if name == "pl":
        return import_module("liam_scale.pl")
    if name not in __all__:
        raise AttributeError(f"module 'liam_scale' has no attribute {name!r}")
    _check_loaders()
    from liam_scale import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "pl", "__version__"]
