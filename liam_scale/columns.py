"""Obs columns of a store that could be the covariate to remove."""

from __future__ import annotations

import re

from loaders.stores import Store

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
