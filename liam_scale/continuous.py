"""Continuous covariates: obs columns of numbers that the decoders read beside the latent space, standardised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.options import named_numbers
from loaders.stores import Store

OPTION = "--continuous-key"

_LEAST_SPREAD = 1e-6
"""Standard deviation, of the largest absolute value, below which a column is as good as constant in float32."""


def described(store: Store, keys: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each column over all cells.

    Raises
    ------
    ValueError
        No such column, one that holds no numbers or is the same in all cells, or a cell without a value.
    """
    if len(set(keys)) < len(keys):
        raise ValueError(f"{OPTION}: got {' '.join(keys)}; name each column once")
    found = {}
    for key, values in _columns(store, keys, OPTION).items():
        mean, deviation = float(values.mean()), float(values.std())
        if deviation <= _LEAST_SPREAD * np.abs(values).max(initial=0.0):
            raise ValueError(
                f"{OPTION}: {key} is {mean:g} in all cells of {store.uri}, so that nothing can be learned of it; leave"
                " it out"
            )
        found[key] = (mean, deviation)
    return found


def standardised(store: Store, known: Mapping[str, tuple[float, float]]) -> dict[str, npt.NDArray[np.float32]]:
    """(n,) of every cell, by column: how many of the training's standard deviations it lies above the training's mean.

    Parameters
    ----------
    known
        What `described` gave for the cells of the training.

    Raises
    ------
    ValueError
        The store lacks a column, it holds no numbers, or a cell has no value.
    """
    columns = _columns(store, list(known), "continuous covariates of the run")
    return {key: ((columns[key] - mean) / deviation).astype(np.float32) for key, (mean, deviation) in known.items()}


def _columns(store: Store, keys: Sequence[str], option: str) -> dict[str, npt.NDArray[np.float64]]:
    held = store.schema.obs_columns
    if lacking := [key for key in keys if key not in held]:
        raise ValueError(
            f"{option}: got {', '.join(lacking)}, but obs of {store.uri} has no such column; it has {', '.join(held)}"
        )
    if not keys:
        return {}
    frame = store.obs_frame(list(keys))
    return {key: _numbers(frame[key], key, store.uri, option) for key in keys}


def _numbers(column: pd.Series, key: str, uri: str, option: str) -> npt.NDArray[np.float64]:
    given = column.astype(object) if isinstance(column.dtype, pd.CategoricalDtype) else column
    values = pd.to_numeric(given, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    is_bad = ~np.isfinite(values)
    if is_bad.any():
        first = column.index[int(np.argmax(is_bad))]
        raise ValueError(
            f"{option}: {key} has no finite number in {int(is_bad.sum()):,} of {len(values):,} cells of {uri}, such as"
            f" {first} ({column.loc[first]}); every cell needs one: fill them in, or leave these cells out (--where)"
        )
    return values


def values_at(texts: Sequence[str], known: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Standardised values of columns of a run, of texts such as `age=40`.

    Raises
    ------
    ValueError
        A text says no number, or the run has no such column.
    """
    given = named_numbers("--at", texts, wanted="columns with a number, such as age=40")
    if unknown := [name for name in given if name not in known]:
        held = f"the run has {', '.join(known)}" if known else "the run has no continuous covariates"
        raise ValueError(f"--at: got {', '.join(unknown)}; {held}")
    return {name: (value - known[name][0]) / known[name][1] for name, value in given.items()}
