"""obs and var tables in files, read one column at a time: memory is one column, whatever the number of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem

Strings = np.dtypes.StringDType()
"""Variable-length strings at 16 bytes and the text: Python objects need 60 bytes more."""

_READ_AT_ONCE = 100_000


class Frame:
    """An anndata dataframe in an HDF5 or Zarr group; the older form (one compound dataset) is read as a whole."""

    def __init__(self, element: Any) -> None:
        self._element = element
        self._whole: pd.DataFrame | None = None
        if not hasattr(element, "keys") or "_index" not in element.attrs:
            self._whole = pd.DataFrame(read_elem(element))

    @property
    def columns(self) -> list[str]:
        if self._whole is not None:
            return [str(name) for name in self._whole.columns]
        return [str(name) for name in self._element.attrs["column-order"]]

    def index(self) -> npt.NDArray[Any]:
        """(n,) names of the rows as compact strings."""
        if self._whole is not None:
            return np.asarray(self._whole.index.astype(str), dtype=object).astype(Strings)
        key = self._element.attrs["_index"]
        element = self._element[key.decode() if isinstance(key, bytes) else key]
        if hasattr(element, "keys"):
            return np.asarray(pd.Index(read_elem(element)).astype(str), dtype=object).astype(Strings)
        return read_strings(element)

    def column(self, name: str) -> pd.Series:
        """(n,) one column as a Series without index."""
        if self._whole is not None:
            return self._whole[name].reset_index(drop=True)
        return pd.Series(read_elem(self._element[name]))

    def whole(self) -> pd.DataFrame:
        """All of it, indexed by name."""
        columns = {name: self.column(name).array for name in self.columns}
        return pd.DataFrame(columns, index=pd.Index(self.index().astype(object)))


def read_strings(element: Any) -> npt.NDArray[Any]:
    """(n,) compact strings from a string array of HDF5 or Zarr, read in pieces."""
    total = element.shape[0]
    strings = np.empty(total, dtype=Strings)
    for start in range(0, total, _READ_AT_ONCE):
        part = element[start : start + _READ_AT_ONCE]
        if isinstance(part, np.ndarray) and part.dtype.kind in "OS":
            part = np.array([_decode(text) for text in part.tolist()], dtype=object)
        strings[start : start + _READ_AT_ONCE] = part.astype(Strings)
    return strings


def _decode(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


@dataclass(frozen=True)
class View:
    """A frame whose rows belong to some of a source's cells."""

    frame: Frame
    rows: npt.NDArray[np.int64] | None
    """(n,) row of each cell in the frame, -1 where it has none; None: cell i is row i."""

    def column(self, name: str) -> pd.Series:
        """(n,) the column by cell, missing where the cell has no row."""
        values = self.frame.column(name)
        return values if self.rows is None else take(values, self.rows)


def take(values: pd.Series, rows: npt.NDArray[np.int64]) -> pd.Series:
    """values[rows], missing where a row is -1."""
    if len(rows) and rows.min() >= 0:
        return pd.Series(values.array[rows])
    return pd.Series(pd.api.extensions.take(_nullable(values.array), rows, allow_fill=True))


def _nullable(values: Any) -> Any:
    plain = values.to_numpy() if isinstance(values, pd.arrays.NumpyExtensionArray) else values
    # Booleans with gaps would otherwise become objects.
    return pd.array(plain, dtype="boolean") if isinstance(plain, np.ndarray) and plain.dtype == bool else plain


class ObsTable:
    """What is known of a source's cells: a common table, and the tables of its modalities.

    A column of the common table counts. A column that only modalities have is put together from them where they agree,
    and stays in the modalities' own obs where they do not (a number of counts, for example).
    """

    def __init__(self, root: View | None, parts: Mapping[str, View], names: Sequence[str] = ()) -> None:
        self._root = root
        self._parts = dict(parts)
        own = {column for view in parts.values() for column in view.frame.columns}
        root_columns = [] if root is None else root.frame.columns
        prefixes = tuple(f"{name}:" for name in names)
        self._root_columns = [
            column
            for column in root_columns
            # mudata copies modality columns to the top as `rna:batch`: the same values once more.
            if not (column.startswith(prefixes) and (column.split(":", 1)[1] in own.union(root_columns)))
        ]
        self._part_columns = [
            column
            for column in dict.fromkeys(column for view in parts.values() for column in view.frame.columns)
            if column not in self._root_columns
        ]
        self._disagreeing: set[str] | None = None

    @property
    def columns(self) -> list[str]:
        """Columns that have one value per cell."""
        apart = self.disagreeing
        return [*self._root_columns, *(column for column in self._part_columns if column not in apart)]

    @property
    def disagreeing(self) -> set[str]:
        """Columns of which modalities give a cell different values."""
        if self._disagreeing is None:
            self._disagreeing = {column for column in self._part_columns if not self._agree(column)}
        return self._disagreeing

    def _views(self, column: str) -> list[View]:
        return [view for view in self._parts.values() if column in view.frame.columns]

    def _agree(self, column: str) -> bool:
        views = self._views(column)
        if len(views) < 2:
            return True
        first, *others = (view.column(column).astype(object) for view in views)
        for other in others:
            both = first.notna() & other.notna()
            if not (first[both] == other[both]).all():
                return False
            first = first.where(first.notna(), other)
        return True

    def column(self, name: str) -> pd.Series:
        """(n,) values of one column by cell."""
        if name in self._root_columns:
            assert self._root is not None
            return self._root.column(name)
        first, *others = (view.column(name) for view in self._views(name))
        for other in others:
            first = fill_missing(first, other)
        return first

    def modality_column(self, modality: str, name: str) -> pd.Series | None:
        """(n,) values of one column in a modality's own table, by cell."""
        view = self._parts.get(modality)
        return view.column(name) if view is not None and name in view.frame.columns else None


def fill_missing(first: pd.Series, other: pd.Series) -> pd.Series:
    """`first`, and `other` where first is missing."""
    missing = first.isna().to_numpy()
    if not missing.any():
        return first
    kept = join_columns([first, other])
    rows = np.where(missing, np.arange(len(first)) + len(first), np.arange(len(first)))
    return take(kept, rows)


def join_columns(parts: Sequence[pd.Series | int]) -> pd.Series:
    """One column under the other; a number stands for that many missing values. Labels become one categorical."""
    given = [part for part in parts if not isinstance(part, int)]
    if all(_is_label(part) for part in given):
        return _join_labels(parts)
    if any(_is_label(part) for part in given):
        parts = [part if isinstance(part, int) else _as_text(part) for part in parts]
        return _join_labels(parts)
    whole = pd.concat(given, ignore_index=True)
    if len(given) == len(parts):
        return whole
    rows, start = [], 0
    for part in parts:
        if isinstance(part, int):
            rows.append(np.full(part, -1))
        else:
            rows.append(np.arange(start, start + len(part)))
            start += len(part)
    return take(whole, np.concatenate(rows))


def _is_label(values: pd.Series) -> bool:
    if isinstance(values.dtype, pd.CategoricalDtype):
        return True
    return values.dtype == object or isinstance(values.dtype, pd.StringDtype)


def _as_text(values: pd.Series) -> pd.Series:
    text = values.astype(object)
    return text.where(text.isna(), text.map(str))


def _join_labels(parts: Sequence[pd.Series | int]) -> pd.Series:
    categories: dict[str, int] = {}
    codes, ordered = [], []
    for part in parts:
        if isinstance(part, int):
            codes.append(np.full(part, -1, np.int64))
            continue
        own = part.array if isinstance(part.dtype, pd.CategoricalDtype) else pd.Categorical(_as_text(part))
        names = [str(name) for name in own.categories]
        places = np.array([categories.setdefault(name, len(categories)) for name in names] + [-1], np.int64)
        codes.append(places[own.codes])
        ordered.append((bool(own.ordered), tuple(names)))
    # An order survives only where every source has the same.
    is_ordered = len(set(ordered)) == 1 and ordered[0][0]
    return pd.Series(
        pd.Categorical.from_codes(np.concatenate(codes), pd.Index(list(categories), dtype=object), ordered=is_ordered)
    )
