"""Obs and var columns of AnnData's Zarr encoding: read one at a time, categories never spelt out per cell."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from loaders.stores.base import ObsColumn


def encode(values: Any) -> ObsColumn:
    """Codes of categorical, string, boolean or integer values; missing values become -1.

    A categorical keeps its order of categories; other values get their distinct values, sorted.

    Raises
    ------
    ValueError
        The values are of another kind (floating point, dates).
    """
    series = pd.Series(values)
    kind = series.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return ObsColumn(np.asarray(series.cat.codes, np.int32), tuple(str(c) for c in kind.categories))
    is_text = pd.api.types.is_object_dtype(kind) or pd.api.types.is_string_dtype(kind)
    if not (is_text or pd.api.types.is_bool_dtype(kind) or pd.api.types.is_integer_dtype(kind)):
        raise ValueError(f"got values of type {kind}; name a categorical, string, boolean or integer column")
    codes, distinct = pd.factorize(series, sort=True, use_na_sentinel=True)
    return ObsColumn(codes.astype(np.int32), tuple(str(value) for value in distinct))


def column_names(frame: zarr.Group) -> tuple[str, ...]:
    """Columns of an encoded data frame, in order, without its index."""
    return tuple(str(name) for name in frame.attrs.get("column-order", []))


def read_index(frame: zarr.Group, start: int = 0, stop: int | None = None) -> npt.NDArray[np.str_]:
    """Entries [start, stop) of a data frame's index as a NumPy array of str."""
    node = _node(frame, frame.attrs.get("_index", "_index"))
    if isinstance(node, zarr.Group):  # nullable-string-array, or an index written as a categorical
        return _text(anndata.io.read_elem(node)[start:stop])
    return _text(node[start:stop])


def index_length(frame: zarr.Group) -> int:
    """Number of rows of an encoded data frame."""
    node = _node(frame, frame.attrs.get("_index", "_index"))
    if isinstance(node, zarr.Group):
        node = node["codes" if "codes" in node else "values"]
    return int(node.shape[0])


def read_column(frame: zarr.Group, name: str) -> ObsColumn:
    """One column as codes. Of a categorical only the codes and the distinct values are read."""
    node = _node(frame, name)
    if isinstance(node, zarr.Group) and node.attrs.get("encoding-type") == "categorical":
        codes = np.asarray(node["codes"][:]).astype(np.int32)
        return ObsColumn(codes, tuple(str(value) for value in node["categories"][:]))
    if isinstance(node, zarr.Array) and "categories" in node.attrs:  # AnnData before 0.8
        categories = _node(frame, str(node.attrs["categories"]).removeprefix("obs/"))
        return ObsColumn(np.asarray(node[:]).astype(np.int32), tuple(str(value) for value in categories[:]))
    values = np.asarray(node[:]) if isinstance(node, zarr.Array) else anndata.io.read_elem(node)
    try:
        return encode(values.astype(object) if isinstance(values, np.ndarray) and values.dtype.kind == "T" else values)
    except ValueError as error:
        raise ValueError(f"obs[{name!r}]: {error}") from None


def read_frame(frame: zarr.Group) -> pd.DataFrame:
    """The whole data frame."""
    return pd.DataFrame(anndata.io.read_elem(frame))


def _text(values: Any) -> npt.NDArray[np.str_]:
    """NumPy's variable-width strings, which zarr-python hands out, cannot be cast to fixed width: by way of objects."""
    return np.asarray(np.asarray(values, dtype=object), dtype=str)


def _node(group: zarr.Group, name: str) -> Any:
    return group[name]
