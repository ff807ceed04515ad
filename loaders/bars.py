"""A progress bar, where somebody can watch one."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from tqdm import TqdmWarning, tqdm


def open_bar(*, total: int, **options: Any) -> tqdm | None:
    """A bar on a terminal (stderr) or in a notebook; None elsewhere: a file gets lines instead.

    Parameters
    ----------
    total
        What the bar counts up to.
    **options
        Further options of tqdm.
    """
    with warnings.catch_warnings():
        # It warns that it is experimental, and that a notebook without ipywidgets has no bar.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.autonotebook import tqdm as bar_of_here
    if bar_of_here is not tqdm:
        return bar_of_here(total=total, **(options | {"bar_format": None}))
    # A terminal without a size (`docker run -t`, `script`) would be told nothing at all by tqdm.
    if not sys.stderr.isatty() or not all(os.get_terminal_size(sys.stderr.fileno())):
        return None
    return tqdm(total=total, dynamic_ncols=True, file=sys.stderr, **options)
