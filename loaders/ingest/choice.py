"""Cells and features that an ingest keeps: by an expression over obs, and by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.formats.features import Joined
from loaders.formats.source import Say, Source

_NAMED = re.compile(r"`([^`]+)`|'[^']*'|\"[^\"]*\"|([^\W\d]\w*)")
"""A column in backticks; a text, which names none; a word."""


def chosen_cells(sources: Sequence[Source], where: str, say: Say) -> list[Source]:
    """The sources with the cells for which an expression is true; those without any are left out.

    Parameters
    ----------
    where
        As `pandas.DataFrame.query` takes it, over obs columns: "tissue == 'blood' and n_counts > 500".

    Raises
    ------
    ValueError
        The expression cannot be evaluated, names no column, or leaves no cell.
    """
    kept = []
    for source in sources:
        is_chosen = _evaluate(source, where)
        if is_chosen.any():
            kept.append(source.at(np.flatnonzero(is_chosen)))
        say(f"{source.label}: {int(is_chosen.sum()):,} of {len(is_chosen):,} cells are kept ({where})")
    if not kept:
        raise ValueError(f"where: got {where!r}, for which no cell is left; loosen it")
    return kept


def _evaluate(source: Source, where: str) -> npt.NDArray[np.bool_]:
    words = {first or second for first, second in _NAMED.findall(where)} - {""}
    named = [name for name in source.obs.columns if name in words]
    known = ", ".join(source.obs.columns) or "none"
    if "@" in where or not named:
        raise ValueError(f"where: got {where!r}, which names no obs column of {source.label}; its columns are: {known}")
    frame = pd.DataFrame({name: source.obs.column(name).array for name in named})
    for name in frame.columns[frame.dtypes == "category"]:
        # Comparing a category with a text that is none of them would fail.
        frame[name] = frame[name].astype(object)
    try:
        found = frame.eval(where, engine="python")
    except Exception as error:  # pandas raises what its parser, NumPy or a comparison raises
        raise ValueError(
            f"where: got {where!r}, which cannot be evaluated on {source.label} ({error}); its columns are: {known}"
        ) from None
    if not isinstance(found, pd.Series) or not pd.api.types.is_bool_dtype(found.dtype):
        raise ValueError(f"where: got {where!r}, which is no comparison; write for example \"{named[0]} == 'a'\"")
    return found.fillna(False).to_numpy(bool)


def chosen_features(joined: Mapping[str, Joined], names: Sequence[str], say: Say) -> dict[str, Joined]:
    """Only the features named, in the order in which they stand; a modality of which none is named keeps all.

    Raises
    ------
    ValueError
        No modality has any of them.
    """
    wanted = pd.Index(names)
    found = {name: one.var.index.isin(wanted) for name, one in joined.items()}
    held = sum(int(chosen.sum()) for chosen in found.values())
    if not held:
        held_names = ", ".join(repr(str(one.var.index[0])) for one in joined.values() if len(one.var))
        raise ValueError(
            f"features: got {len(wanted)} names such as {names[0]!r}, none of which is there (there are {held_names})"
        )
    if held < len(wanted):
        say(f"{held:,} of the {len(wanted):,} features named are there")
    return {name: _narrowed(one, found[name]) if found[name].any() else one for name, one in joined.items()}


def without_unused(columns: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Obs columns without the categories that no chosen cell has."""
    for name, values in columns:
        is_category = isinstance(values, pd.Series) and isinstance(values.dtype, pd.CategoricalDtype)
        yield name, values.cat.remove_unused_categories() if is_category else values


def _narrowed(joined: Joined, chosen: npt.NDArray[np.bool_]) -> Joined:
    place = np.where(chosen, np.cumsum(chosen) - 1, -1)
    columns = tuple(np.where(own >= 0, place[own], -1) for own in joined.columns)
    return Joined(joined.var[chosen], columns)
