"""Obs columns as samples, the covariate to remove: which could serve, and which cannot."""

from __future__ import annotations

import logging
import re

from loaders.stores import Store

_log = logging.getLogger(__name__)

_USUAL_NAME = re.compile(
    r"(^|[^a-z])(sample|batch|donor|replicate|library|lane|plate|pool|site|patient|individual|subject)s?(id)?([^a-z]|$)"
)
"""How people call the column of the sample."""


def possible_keys(store: Store) -> list[str]:
    """Obs columns with at least two values and ten cells a value, those first that are named like a sample's."""
    return sorted(filter(lambda name: _could_serve(store, name), store.schema.obs_columns), key=is_unusual)


def is_unusual(name: str) -> bool:
    return _USUAL_NAME.search(name.lower()) is None


def _could_serve(store: Store, name: str) -> bool:
    try:
        column = store.obs_column(name)
    except ValueError:
        # Neither labels nor integers, such as a share.
        return False
    return 2 <= len(column.categories) <= store.schema.num_cells / 10 and int(column.codes.min()) >= 0


def check_batch_key(store: Store, batch_key: str, num_samples: int) -> None:
    """Refuse a column of which (nearly) every cell has a value of its own; warn where all cells have the same.

    Raises
    ------
    ValueError
        More than one value for two cells.
    """
    num_cells = store.schema.num_cells
    if 2 <= num_samples <= num_cells / 2:
        return
    others = [name for name in possible_keys(store) if name != batch_key][:8]
    listed = f"; columns that could serve: {', '.join(others)}" if others else "; no other column could serve"
    if num_samples > num_cells / 2 and num_cells > 1:
        raise ValueError(
            f"--batch-key: {batch_key} has {num_samples:,} values in {num_cells:,} cells of {store.uri}, (nearly) one "
            f"for each cell, so that removing it would remove all there is{listed}"
        )
    _log.warning("--batch-key: %s has one value in all cells, so nothing is removed%s", batch_key, listed)
