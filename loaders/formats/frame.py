"""obs and var tables in files and in memory, read one column at a time: memory is one column, whatever their number."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem

from loaders.formats.root import reading
from loaders.schema import ObsColumn

Strings = np.dtypes.StringDType()
"""Variable-length strings at 16 bytes and the text: Python objects need 60 bytes more."""

_READ_AT_ONCE = 100_000


class Frame:
    """An anndata dataframe in an HDF5 or Zarr group, or in memory.

    The form of AnnData before 0.7 (one compound dataset) is read as a whole.

    Parameters
    ----------
    where
        The file, for messages.
    """

    def __init__(self, element: Any, where: str) -> None:
        self._element, self._where = element, where
        self._whole: pd.DataFrame | None = element if isinstance(element, pd.DataFrame) else None
        if self._whole is None and (not hasattr(element, "keys") or "_index" not in element.attrs):
            self._whole = _of_records(element) if hasattr(element, "dtype") else pd.DataFrame(read_elem(element))

    @property
    def columns(self) -> list[str]:
        """Columns in their order, without the index."""
        if self._whole is not None:
            return [str(name) for name in self._whole.columns]
        return [str(name) for name in self._element.attrs["column-order"]]

    @property
    def num_rows(self) -> int:
        """Of a table in a file, by its names."""
        element = self._element[self._element.attrs["_index"]]
        return int((element["values"] if hasattr(element, "keys") else element).shape[0])

    def index(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Names of the rows [start, stop) as compact strings."""
        with reading(self._where, "names"):
            return self._index(start, stop)

    def column(self, name: str) -> pd.Series:
        """(n,) one column as a Series without index."""
        with reading(self._where, f"a column {name!r}"):
            return self._column(name)

    def _index(self, start: int, stop: int | None) -> npt.NDArray[Any]:
        if self._whole is not None:
            return _compact(self._whole.index[start:stop])
        key = self._element.attrs["_index"]
        element = self._element[key.decode() if isinstance(key, bytes) else key]
        if hasattr(element, "keys"):  # nullable strings, or an index written as a categorical
            return _compact(pd.Index(read_elem(element))[start:stop])
        return read_strings(element, start, stop)

    def _column(self, name: str) -> pd.Series:
        if self._whole is not None:
            return self._whole[name].reset_index(drop=True)
        element = self._element[name]
        if "categories" in element.attrs and not hasattr(element, "keys"):  # AnnData before 0.8
            # A reference in HDF5, a path in Zarr; of anndata's own attributes the last that is no column.
            named = element.attrs["categories"]
            held = self._element[named if not isinstance(named, str) else f"__categories/{named.rpartition('/')[2]}"]
            names = pd.Index([as_text(category) for category in held[:]])
            return pd.Series(pd.Categorical.from_codes(np.asarray(element[:]), names))
        return pd.Series(read_elem(element))

    def whole(self) -> pd.DataFrame:
        """All of it, indexed by name."""
        columns = {name: self.column(name).array for name in self.columns}
        return pd.DataFrame(columns, index=pd.Index(self.index().astype(object)))


def _of_records(array: Any) -> pd.DataFrame:
    """The table of AnnData before 0.7: records, names first, of labels their codes; the labels stand in uns."""
    if not isinstance(array, h5py.Dataset) or not array.dtype.names:
        raise ValueError(f"got a table of the type {array.dtype}, expected records")
    records, uns = array[:], array.parent.get("uns", {})
    columns: dict[str, Any] = {}
    for name in records.dtype.names:
        values, key = records[name], f"{name}_categories"
        if values.dtype.kind in "SO":
            values = np.array([as_text(value) for value in values.tolist()], object)
        elif values.dtype.kind in "iu" and key in uns:
            labels = [as_text(label) for label in np.atleast_1d(uns[key][()]).tolist()]
            # obs and var may have a column of one name, of which uns keeps the labels of one.
            values = pd.Categorical.from_codes(values, pd.Index(labels)) if values.max() < len(labels) else values
        columns[name] = values
    first, *others = columns
    return pd.DataFrame({name: columns[name] for name in others}, index=pd.Index(columns[first]))


def _compact(index: pd.Index) -> npt.NDArray[Any]:
    return np.asarray(index.astype(str), dtype=object).astype(Strings)


def as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def read_strings(element: Any, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """Elements [start, stop) of a string array of HDF5 or Zarr as compact strings, read in pieces."""
    total = element.shape[0]
    strings = np.empty(len(range(*slice(start, stop).indices(total))), dtype=Strings)
    for begin in range(0, len(strings), _READ_AT_ONCE):
        end = min(len(strings), begin + _READ_AT_ONCE)
        part = element[start + begin : start + end]
        if isinstance(part, np.ndarray) and part.dtype.kind in "OS":
            part = np.array([as_text(text) for text in part.tolist()], dtype=object)
        strings[begin:end] = part.astype(Strings)
    return strings


def encode(values: pd.Series) -> ObsColumn:
    """Codes of categorical, string, boolean or integer values; missing values become -1.

    A categorical keeps its order of categories; other values get their distinct values, sorted.

    Raises
    ------
    ValueError
        The values are of another kind (floating point, dates).
    """
    kind = values.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return ObsColumn(np.asarray(values.cat.codes, np.int32), tuple(str(c) for c in kind.categories))
    is_text = pd.api.types.is_object_dtype(kind) or pd.api.types.is_string_dtype(kind)
    if not (is_text or pd.api.types.is_bool_dtype(kind) or pd.api.types.is_integer_dtype(kind)):
        raise ValueError(f"got values of type {kind}; name a categorical, string, boolean or integer column")
    try:
        codes, distinct = pd.factorize(values, sort=True, use_na_sentinel=True)
    except TypeError as error:  # objects of any kind, such as lists
        raise ValueError(f"got values that are no labels ({error}); save the column as text") from None
    return ObsColumn(codes.astype(np.int32), tuple(str(value) for value in distinct))


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

    def at(self, cells: npt.NDArray[np.int64]) -> View:
        return View(self.frame, cells if self.rows is None else self.rows[cells])


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

    def is_common(self, name: str) -> bool:
        """Whether a column stands in the common table."""
        return name in self._root_columns

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

    def index(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Ids of the cells [start, stop) as compact strings."""
        assert self._root is not None
        return self._root.frame.index(start, stop)

    def at(self, cells: npt.NDArray[np.int64]) -> ObsTable:
        """The table of these of the cells."""
        own = copy.copy(self)
        own._root = None if self._root is None else self._root.at(cells)
        own._parts = {name: view.at(cells) for name, view in self._parts.items()}
        own._disagreeing = None
        return own

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
