"""Cells and features that an ingest keeps: by an expression over obs, and by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.choice import cells_where, named_features, nothing_left
from loaders.formats.features import Joined
from loaders.formats.source import Say, Source


def chosen_cells(sources: Sequence[Source], where: str, say: Say) -> list[Source]:
    """The sources with the cells for which an expression is true (`cells_where`); those without any are left out.

    Raises
    ------
    ValueError
        The expression cannot be evaluated, names no column, or leaves no cell.
    """
    kept = []
    for source in sources:
        is_chosen = cells_where(where, source.label, source.obs.columns, partial(_columns, source))
        if is_chosen.any():
            kept.append(source.at(np.flatnonzero(is_chosen)))
        say(f"{source.label}: {int(is_chosen.sum()):,} of {len(is_chosen):,} cells are kept ({where})")
    if not kept:
        raise nothing_left(where)
    return kept


def _columns(source: Source, names: Sequence[str]) -> dict[str, Any]:
    return {name: source.obs.column(name).array for name in names}


def chosen_features(joined: Mapping[str, Joined], names: Sequence[str], say: Say) -> dict[str, Joined]:
    """Only the features named, in the order in which they stand; a modality of which none is named keeps all.

    Raises
    ------
    ValueError
        No modality has any of them.
    """
    chosen = named_features({name: one.var.index for name, one in joined.items()}, names, say)
    return {name: one if chosen[name].all() else _narrowed(one, chosen[name]) for name, one in joined.items()}


def without_unused(columns: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Obs columns without the categories that no chosen cell has."""
    for name, values in columns:
        is_category = isinstance(values, pd.Series) and isinstance(values.dtype, pd.CategoricalDtype)
        yield name, values.cat.remove_unused_categories() if is_category else values


def _narrowed(joined: Joined, chosen: npt.NDArray[np.bool_]) -> Joined:
    place = np.where(chosen, np.cumsum(chosen) - 1, -1)
    columns = tuple(np.where(own >= 0, place[own], -1) for own in joined.columns)
    return Joined(joined.var[chosen], columns)
