"""What a user keeps of a data set: cells by an expression over obs columns, features by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

_NAMED = re.compile(r"`([^`]+)`|'[^']*'|\"[^\"]*\"|([^\W\d]\w*)")
"""A column in backticks; a text, which names none; a word."""


def cells_where(
    where: str, label: str, columns: Sequence[str], read: Callable[[list[str]], Any]
) -> npt.NDArray[np.bool_]:
    """(n,) whether an expression is true of each cell.

    Parameters
    ----------
    where
        As `pandas.DataFrame.query` takes it, over obs columns: "tissue == 'blood' and n_counts > 500".
    label
        What messages call the data.
    columns
        Names of all its obs columns.
    read
        Gives the values of some of them, as what a DataFrame is made of.

    Raises
    ------
    ValueError
        The expression cannot be evaluated, or names no column.
    """
    words = {first or second for first, second in _NAMED.findall(where)} - {""}
    named = [name for name in columns if name in words]
    known = ", ".join(columns) or "none"
    if "@" in where or not named:
        raise ValueError(f"where: got {where!r}, which names no obs column of {label}; its columns are: {known}")
    frame = pd.DataFrame(read(named))
    for name in frame.columns[frame.dtypes == "category"]:
        # Comparing a category with a text that is none of them would fail.
        frame[name] = frame[name].astype(object)
    try:
        found = frame.eval(where, engine="python")
    except Exception as error:  # pandas raises what its parser, NumPy or a comparison raises
        raise ValueError(
            f"where: got {where!r}, which cannot be evaluated on {label} ({error}); its columns are: {known}"
        ) from None
    if not isinstance(found, pd.Series) or not pd.api.types.is_bool_dtype(found.dtype):
        raise ValueError(f"where: got {where!r}, which is no comparison; write for example \"{named[0]} == 'a'\"")
    return found.fillna(False).to_numpy(bool)


def nothing_left(where: str) -> ValueError:
    return ValueError(f"where: got {where!r}, for which no cell is left; loosen it")


def named_features(
    held: Mapping[str, pd.Index], names: Sequence[str], say: Callable[[str], None]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Per modality, (F,) which of its features are named; all of one of which none is.

    Raises
    ------
    ValueError
        No modality has any of them.
    """
    wanted = pd.Index(names)
    found = {name: own.isin(wanted) for name, own in held.items()}
    number = sum(int(chosen.sum()) for chosen in found.values())
    if not number:
        examples = ", ".join(repr(str(own[0])) for own in held.values() if len(own))
        example = f" such as {names[0]!r}" if len(wanted) else ""
        raise ValueError(f"features: got {len(wanted)} names{example}, none of which is there (there are {examples})")
    if number < len(wanted):
        say(f"{number:,} of the {len(wanted):,} features named are there")
    return {name: chosen if chosen.any() else np.ones(len(chosen), bool) for name, chosen in found.items()}
